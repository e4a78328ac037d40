"""Tokens per second of a league's training, against the shortest training loop around the same model.

Both train the same model on the same questions with the same optimiser. The loop by hand makes its questions
before the clock runs, clips no gradient, has one learning rate and looks at nothing; what is measured is what
everything that a league does besides costs: questions made anew, seeds, rates, checks, looks left out.
"""

from __future__ import annotations

import torch
from _harness import aim, arguments, begin, interleave, report, save

from polyhead.league import Recipe, plan
from polyhead.league.training import train

AIM = 0.9
STEPS = 30


def by_hand(task, fitted, recipe, device):
    """A training loop as one writes it without a library."""
    torch.manual_seed(0)
    model = fitted.model(task, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, fused=True)
    batches = [task.batch("train", n, recipe.batch, 0).to(device) for n in range(STEPS)]

    def run() -> None:
        for batch in batches:
            loss = model.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def main() -> None:
    options = begin(arguments(__doc__, repeats=9))
    results, reached = [], True
    for name in ("recall", "text", "digits"):
        settled = plan(["mha"], name, steps=STEPS, recipe=None)
        task, fitted, recipe = settled.rules.task, settled.contenders[0], settled.rules.recipe
        once = Recipe(**{f: getattr(recipe, f) for f in ("steps", "batch", "rate")}, looks=1)
        seconds: list[float] = []

        def league(task=task, fitted=fitted, once=once, seconds=seconds) -> None:
            outcome = train(task, fitted, once, 0, device=options.device, threads=torch.get_num_threads())
            seconds.append(outcome.seconds)

        calls = {"by hand": by_hand(task, fitted, recipe, options.device), "league": league}
        times = interleave(calls, options.repeats, device=options.device)
        # what a run says of itself: its steps, without the model being made and the questions at the end
        times["league"] = seconds[1:]
        found = report(f"{name}, {STEPS} steps of {recipe.batch} × {task.length} tokens", times, "by hand")
        reached &= aim("tokens per second of the loop by hand", found["ratio"]["league"], AIM)
        results.append(found)
    print(f"\nall aims reached: {'yes' if reached else 'NO'}")
    save(options, results)


if __name__ == "__main__":
    main()
