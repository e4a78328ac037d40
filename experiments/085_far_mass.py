"""The mass of far keys told by their mean and covariance: is it right, and are the right queries kept near?

The small check of paper 085. SmolLM2-135M reads 768 tokens of held-out prose, and 768 with passkeys; near
are 4 first and 128 nearest keys, in blocks of 16. The far mass of every query of every head among the last
256 is told by the moments of keys of other prose, by those of the near keys, and truly. Then, for 60 and
for 85 % of these decisions near, the threshold of each way that gives so many with the dense model's
queries; besides, the heads with the largest true share once for all (static), and decisions at random. Nats
of the last 256 tokens, and of the answers. A seed draws the stretches.

It shows if deciding by moments loses less than by heads and at random, and how far it is from the truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from _samples import prose_and_passkeys
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import FarMass, Grid, NearOrAll
from polyhead.cache import duo
from polyhead.cache.influence import loss_of
from polyhead.heads import key_gaussians
from polyhead.hf import Call, attach
from polyhead.tasks import held_out_text, sample_text

LENGTH, LAST, COLS, FIRST, NEAREST = 768, 256, 16, 4, 128

model, tokenizer = ph.hf.load("smollm2")


class DrawnFar(FarMass):
    """Any number, whatever the keys."""

    def prepare(self, k: Tensor, grid: Grid) -> Callable[[Any, Tensor, Tensor], Tensor]:
        def log_mass(strip: Any, at: Tensor, far: Tensor) -> Tensor:
            near = strip.logits.logsumexp(-1)
            return near + torch.randn_like(near)

        return log_mass


def own(tau: float | Tensor, far: FarMass) -> NearOrAll:
    """The selector of a layer."""
    found = ph.qada(tau, far, first=FIRST, nearest=NEAREST, cols=COLS)
    assert isinstance(found, NearOrAll)
    return found


@torch.no_grad()
def told(ids: Tensor, ways: dict[str, list[FarMass]]) -> dict[str, Tensor]:
    """By each way the log of far over near mass, of the last queries of the dense model (layers, H, n)."""
    found: dict[str, list[Tensor]] = {way: [] for way in ways}

    def look(call: Call) -> Tensor:
        assert isinstance(call.k, Tensor)
        grid = Grid(1, 9, 3, LENGTH, LENGTH, 1, COLS, call.scale)
        for way, far in ways.items():
            shares = own(0.5, far[call.layer.index]).shares(call.q, call.k, call.mask, grid)
            found[way].append(-shares(LENGTH - LAST, LENGTH)[0].double().logit(eps=1e-12))
        return call.proceed()

    with attach(model, handler=look):
        model(ids, use_cache=False, logits_to_keep=1)
    return {way: torch.stack(rows) for way, rows in found.items()}


@torch.no_grad()
def nats(sample: duo.Sample, selectors: Any) -> float:
    """Loss of the sample where it counts."""
    with ph.sparse(model, selectors):
        return float(loss_of(model, *sample))


def run(seed: int) -> dict[str, float]:
    """One stretch of prose, one with passkeys."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    prose = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"])
    start = int(torch.randint(len(prose) - LENGTH, (), generator=draw))
    asked = prose_and_passkeys(tokenizer, prose[start:], length=LENGTH, last=LAST, seed=seed)
    ways: dict[str, list[FarMass]] = {
        "truth": [ph.ExactFar()] * 30,
        "other prose": list(key_gaussians(model, tokenizer, sample_text(), length=LENGTH, first=FIRST)),
        "near keys": [ph.NearGaussian()] * 30,
        "random": [DrawnFar()] * 30,
    }
    numbers: dict[str, float] = {}
    logs = told(ids, ways)
    true = logs["truth"]
    for way in ("other prose", "near keys"):
        x, y = logs[way].flatten(0, 1), true.flatten(0, 1)
        both = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x, y, strict=True)])
        numbers[f"{way}: correlation within a head, median"] = float(both.nanmedian())
        numbers[f"{way}: told less true, mean nats"] = float((x - y).mean())
        numbers[f"{way}: told less true, median nats"] = float((x - y).median())
        numbers[f"{way}: share told too large"] = float((x > y).double().mean())
    for what, one in asked.items():
        numbers[f"dense, {what}"] = nats(one, [None] * 30)
    for near in (0.6, 0.85):
        for way, far in ways.items():
            log = logs[way].flatten().quantile(near)  # these log ratios are the largest of the near ones
            tau = float((-log).sigmoid())
            numbers[f"{near:.0%} {way}, tau"] = tau
            for what, one in asked.items():
                numbers[f"{near:.0%} {way}, {what}"] = nats(one, [own(tau, x) for x in far])
        means = true.neg().sigmoid().mean(-1)  # (layers, H)
        static = torch.where(means >= means.flatten().quantile(1 - near), 0.0, 2.0)
        for what, one in asked.items():
            numbers[f"{near:.0%} static, {what}"] = nats(one, [own(x, ph.NearGaussian()) for x in static])
    return numbers


if __name__ == "__main__":
    arms = ("truth", "near keys", "static", "random")
    main(
        __doc__,
        run,
        {
            f"{near} other prose less {arm}, {what}": (f"{near} other prose, {what}", f"{near} {arm}, {what}")
            for near, arm, what in itertools.product(("60%", "85%"), arms, ("prose", "passkeys"))
        },
    )
