"""Heads that choose among a whole text: how much of what they predict do they owe to what comes later?

The small check of paper 094. Language models of two layers, 250 steps, as many parameters each: plain heads;
two dense heads and six that choose an eighth of the tokens, among the whole text as in the paper ("sequence")
or among those so far ("prefix"). Bits per byte of held-out text.

The model of "sequence" is read once more without what comes later: at the 8th, 16th and 32nd of 64 tokens,
with the text cut after it, so that only what is past can choose. And all of its tokens are read with the
other choice, with which it was not trained.

It shows that the paper's likelihoods owe something to later tokens if the bits rise where the text is cut.
"""

from __future__ import annotations

import torch
from _shared import learn, main, score

from polyhead.league import Batch, Recipe, Sizes, plan
from polyhead.league.tasks.text import TextTask
from polyhead.nn.expert_choice import ExpertChoice

SIZES = Sizes(dim=64, heads=4, layers=2, mlp=256)
RECIPE = Recipe(steps=250, batch=8, warmup=0.05, decay=0.1)
MOSA = "mosa:heads=8,dense_heads=2,head_dim=16,sparsity=8,choice="
SPECS = {"plain": "mha", "sequence": MOSA + "sequence", "prefix": MOSA + "prefix"}
PLACES = (8, 16, 32)


@torch.no_grad()
def at_places(model: torch.nn.Module, task: TextTask) -> dict[str, float]:
    """Bits per byte of the tokens at some places, with the whole text there and with it cut after them."""
    found: dict[str, float] = {}
    for place in PLACES:
        sums = {"whole": [0.0, 0.0], "cut": [0.0, 0.0]}
        for number in range(8):
            batch = task.batch("validation", number, 32, 0)
            asked = torch.full_like(batch.targets, -100)
            asked[:, place - 1] = batch.targets[:, place - 1]
            for name, end in (("whole", batch.inputs.shape[1]), ("cut", place)):
                part = Batch(batch.inputs[:, :end], asked[:, :end])
                bits, size = task.measure(model(part).float(), part)
                sums[name][0] += float(bits.sum())
                sums[name][1] += float(size.sum())
        found |= {f"token {place}, {name}": bits / size for name, (bits, size) in sums.items()}
    return found


def run(seed: int) -> dict[str, float]:
    """Train every kind, and read "sequence" without what comes later."""
    found: dict[str, float] = {}
    for kind, spec in SPECS.items():
        league = plan([spec], TextTask(tokens=64), sizes=SIZES, recipe=RECIPE)
        task = league.rules.task
        assert isinstance(task, TextTask)
        torch.manual_seed(seed)
        model = league.contenders[0].model(task)
        learn(model, task, RECIPE, seed, loss=model.loss)
        model.eval()
        found[kind] = score(model, task, 32, 8)
        if kind == "sequence":
            found |= at_places(model, task)
            for part in model.modules():
                if isinstance(part, ExpertChoice):
                    part.prefix = True
            found["sequence, read with the choice of prefix"] = score(model, task, 32, 8)
    return found


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            "sequence - plain": ("sequence", "plain"),
            "prefix - plain": ("prefix", "plain"),
            "sequence - prefix": ("sequence", "prefix"),
            **{
                f"token {place}: cut - whole": (f"token {place}, cut", f"token {place}, whole")
                for place in PLACES
            },
        },
    )
