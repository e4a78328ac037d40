"""Two sources of which one may be noise: does attention over sources follow the flag that tells?

The small check of paper 140. Source A holds eight keys with the left halves of their values, source B the
same keys with the right halves, both in an order of their own; in every second question B is keys and halves
drawn at random. The question is a key and a flag that says whether B is noise. The answer is the left half,
and the right one or "none". All modes have 50,000 parameters within 1 %: the width of the MLP makes up for
the projections.

It shows if the share of B is lower where the flag says noise, and if hierarchical attention answers more than
the contexts side by side (concat) do, at the end or after 300 of 1500 steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _shared import main
from _training import train
from torch import Tensor, nn

import polyhead as ph
from polyhead.league import Recipe
from polyhead.league.seeds import generator

DIM, KEYS, PAIRS, HALVES = 32, 16, 8, 6
PARAMETERS = 50_000
MODES = ("concat", "flat", "hierarchical")
RECIPE, EARLY = Recipe(steps=1500, batch=64, rate=3e-3), 300


class Reader(nn.Module):
    """A question that attends to two sources, then an MLP."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.key = nn.Embedding(KEYS, DIM)
        self.flag = nn.Embedding(2, DIM)
        self.part = nn.Embedding(2 * HALVES, DIM)
        self.sources = ph.build("multi_source_attention", dim=DIM, heads=4, sources=2, mode=mode)
        self.norm = nn.RMSNorm(DIM)
        answers = HALVES * (HALVES + 1)
        have = sum(p.numel() for p in self.parameters()) + DIM * answers + answers
        width = round((PARAMETERS - have) / (2 * DIM + 1))
        self.mlp = nn.Sequential(nn.Linear(DIM, width), nn.GELU(), nn.Linear(width, DIM))
        self.read = nn.Linear(DIM, answers)

    def inputs(self, asked: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The question (B, 1, d) and both sources (B, 8, d), of columns: key, flag, then A and B."""
        x = (self.key(asked[:, 0]) + self.flag(asked[:, 1]))[:, None]
        a, b = asked[:, 2:].unflatten(1, (2, 2, PAIRS)).unbind(1)
        return x, (self.key(a[:, 0]) + self.part(a[:, 1]), self.key(b[:, 0]) + self.part(b[:, 1] + HALVES))

    def forward(self, asked: Tensor) -> Tensor:
        x, sources = self.inputs(asked)
        x = x + self.sources(x, sources)
        return self.read((x + self.mlp(self.norm(x)))[:, 0])


def questions(split: str, number: int, seed: int, count: int = RECIPE.batch) -> tuple[Tensor, Tensor]:
    """Columns of `Reader.inputs`, and the answers."""
    draw = generator("two sources", split, number, seed)
    keys = torch.rand(count, KEYS, generator=draw).argsort(-1)[:, :PAIRS]
    left, right = torch.randint(HALVES, (2, count, PAIRS), generator=draw)
    noise = torch.randint(2, (count, 1), generator=draw)
    order = torch.rand(count, PAIRS, generator=draw).argsort(-1)
    drawn = torch.rand(count, KEYS, generator=draw).argsort(-1)[:, :PAIRS]
    b = torch.where(noise.bool(), drawn, keys.gather(1, order))
    halves = torch.where(noise.bool(), torch.randint(HALVES, b.shape, generator=draw), right.gather(1, order))
    asked = torch.cat([keys[:, :1], noise, keys, left, b, halves], 1)
    second = torch.where(noise[:, 0].bool(), HALVES, right[:, 0])
    return asked, left[:, 0] * (HALVES + 1) + second


def run(seed: int) -> dict[str, float]:
    """Train every mode."""
    numbers: dict[str, float] = {}
    asked, answers = questions("test", 0, 0, 4096)
    noise = asked[:, 1].bool()
    for mode in MODES:
        torch.manual_seed(seed)
        model = Reader(mode)

        def right(model: Reader = model) -> Tensor:
            with torch.no_grad():
                return (model(asked).argmax(-1) == answers).float()

        def loss(number: int, model: Reader = model, mode: str = mode) -> Tensor:
            if number == EARLY:
                numbers[f"{mode}, accuracy after {EARLY} steps"] = float(right(model).mean())
            found, wanted = questions("train", number, seed)
            return F.cross_entropy(model(found), wanted)

        train(model, loss, RECIPE, seed)
        found = right()
        numbers[f"{mode}, accuracy with both"] = float(found[~noise].mean())
        numbers[f"{mode}, accuracy with noise"] = float(found[noise].mean())
        if mode != "concat":
            with torch.no_grad():
                share = model.sources.source_shares(*model.inputs(asked))[..., 1].flatten(1).mean(-1)
            numbers[f"{mode}, share of B with both"] = float(share[~noise].mean())
            numbers[f"{mode}, share of B with noise"] = float(share[noise].mean())
    return numbers


if __name__ == "__main__":
    early = {
        f"{mode} less concat, after {EARLY} steps": tuple(
            f"{m}, accuracy after {EARLY} steps" for m in (mode, "concat")
        )
        for mode in MODES[1:]
    }
    shares = {
        f"{mode}, share of B, both less noise": tuple(
            f"{mode}, share of B with {how}" for how in ("both", "noise")
        )
        for mode in MODES[1:]
    }
    main(__doc__, run, early | shares)
