"""Spans of heads found by an integer programme: do they keep more than one window for all at equal density?

The small check of paper 107. SmolLM2-135M; influence of blocks of 16 × 16 by one backward pass over two
stretches of the packaged prose and one with passkeys, at each of 256 and 512 tokens; alpha in 0..512 and beta
in 0, 1/4, 1/2, 1; plans that keep up to 25 and 50 % of the keys, of which up to three are tried on prose of
768 tokens. What they lose is measured on held-out prose of 512 and 768 tokens (nats of the last half) and on
passkeys (nats of the answers), against the dense model, a window that grows with the length alike for all
heads, and the plan's own spans dealt out to other heads. A seed draws the stretches, the passkeys and the
dealing.

It shows if the plan's loss is nearer to the dense one's than that of the window, by more than seeds differ.
"""

from __future__ import annotations

import itertools

import torch
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.cache import duo, spans
from polyhead.cache.influence import loss_of
from polyhead.tasks import held_out_text, sample_text

BLOCK, LENGTHS, UNSEEN = 16, (256, 512), 768
RULES = [
    (float(a), b)
    for a, b in itertools.product((0, 32, 64, 128, 256, 512), (0.0, 0.25, 0.5, 1.0))
    if a + b * LENGTHS[0] > 0 and all(a + b * n <= n for n in (*LENGTHS, UNSEEN))
]

model, tokenizer = ph.hf.load("smollm2")


def stretches(text: str, length: int, count: int, draw: torch.Generator) -> list[Tensor]:
    """Some stretches of a text."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return [ids[s : s + length] for s in torch.randint(len(ids) - length, (count,), generator=draw).tolist()]


def late(ids: Tensor) -> duo.Sample:
    """The last half counts."""
    counted = torch.zeros(1, len(ids), dtype=torch.bool)
    counted[0, len(ids) // 2 : -1] = True
    return duo.Sample(ids[None], counted)


def passkeys(text: str, length: int, seed: int) -> duo.Sample:
    """Four words behind two ordinals, asked for at the end."""
    return next(duo.passkeys(tokenizer, text, length=length, count=2, words=4, seed=seed))


def dealt(plan: spans.SpanPlan, draw: torch.Generator) -> spans.SpanPlan:
    """The plan's spans, each to another group of heads."""
    alpha, beta = (torch.stack(list(x)) for x in (plan.alpha, plan.beta))  # type: ignore[arg-type]
    order = torch.randperm(alpha.numel() // 3, generator=draw)  # three query heads share keys
    moved = [x.view(-1, 3)[order].view_as(x).unbind() for x in (alpha, beta)]
    return spans.SpanPlan(tuple(moved[0]), tuple(moved[1]), BLOCK)


def alike(density: float) -> spans.SpanPlan:
    """The window that keeps as many keys at every length, for all heads."""
    like = torch.ones(9, dtype=torch.float64)
    return spans.SpanPlan((like * -BLOCK,) * 30, (like * density,) * 30, BLOCK)


@torch.no_grad()
def nats(plan: spans.SpanPlan | None, samples: list[duo.Sample]) -> float:
    """Mean loss of the model with a plan; None: dense."""
    own = [None] * 30 if plan is None else plan.selectors()
    with ph.sparse(model, own):
        return float(torch.cat([loss_of(model, *one) for one in samples]).mean())


def run(seed: int) -> dict[str, float]:
    """Search with some texts, measure on others."""
    draw = torch.Generator().manual_seed(seed)
    prose = sample_text()
    samples = [
        one for n in LENGTHS for one in (*stretches(prose, n, 2, draw), passkeys(prose, n, 100 * seed + n))
    ]
    found = spans.influence(model, samples, block=BLOCK)
    tried = [late(ids) for ids in stretches(prose, UNSEEN, 1, draw)]
    asked = {
        "prose 512": [late(ids) for ids in stretches(held_out_text(), 512, 1, draw)],
        "prose 768": [late(ids) for ids in stretches(held_out_text(), UNSEEN, 1, draw)],
        "passkeys 512": [passkeys(held_out_text(), 512, 100 * seed + 7)],
        "passkeys 768": [passkeys(held_out_text(), UNSEEN, 100 * seed + 8)],
    }
    numbers = {f"dense, {what}": nats(None, one) for what, one in asked.items()}
    for density in (0.25, 0.5):
        plans = spans.search(found, density, rules=RULES, least=0.5, points=3, seconds=20.0)
        plan = spans.validated(model, plans[:3], tried)[0]
        print(
            f"{density:.0%}: {len(plans)} plans, gap {plan.gap:.1e}, densities {plan.densities}", flush=True
        )
        numbers[f"{density:.0%} density at 768"] = float(plan.kept(UNSEEN).flat.mean() / UNSEEN)
        moved = dealt(plan, draw)
        for what, texts in asked.items():
            length = texts[0].ids.shape[1]
            share = float(plan.kept(length).flat.mean() / length)
            arms = {"plan": plan, "one window": alike(share), "dealt": moved}
            numbers |= {f"{density:.0%} {arm}, {what}": nats(one, texts) for arm, one in arms.items()}
    return numbers


if __name__ == "__main__":
    whats = ("prose 512", "prose 768", "passkeys 512", "passkeys 768")
    main(
        __doc__,
        run,
        {
            f"{density} plan less {arm}, {what}": (f"{density} plan, {what}", f"{density} {arm}, {what}")
            for density, arm, what in itertools.product(("25%", "50%"), ("one window", "dealt"), whats)
        },
    )
