"""A polynomial of a pointer: sums over what several hops reach."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from polyhead.checks import whole
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task

__all__ = ["PolynomialTask"]


class PolynomialTask(Task):
    """y_n = (x_n + x_p(n) + x_p(p(n)) + ...) / √(k+1): k hops along a permutation p, new in every sequence.

    A token is (code of n, code of p(n), x_n), with codes that are fixed unit vectors; x ~ N(0, 1), so y has
    variance 1 but for cycles shorter than k + 1. All y_n are asked; the score is the mean squared error.

    Paper 058: Interleaved Head Attention, arXiv 2602.21371, asks for Σ_j A^j x with one matrix A; that A is a
    permutation, and that the sequence says which, are ours.

    Attributes:
        nodes: N.
        hops: k.
        code: width of a code.
    """

    name = "polynomial"
    summary = "sums over what several hops along a random permutation reach"
    answer = "numbers"
    metric = "squared error"
    better = "lower"
    causal = False
    positions = "none"
    grows = ("nodes",)
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=1500, batch=64, rate=2e-3)

    nodes: int = 16
    hops: int = 4
    code: int = 24

    def __post_init__(self) -> None:
        whole("nodes", self.nodes, 2)
        whole("hops", self.hops, 1)
        whole("code", self.code, 2)

    @property
    def width(self) -> int:
        return 2 * self.code + 1

    @property
    def outputs(self) -> int:
        return 1

    @property
    def length(self) -> int:
        return self.nodes

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        codes = F.normalize(
            torch.randn(self.nodes, self.code, generator=generator(self.name, "codes")), dim=-1
        )
        draw = generator(self.name, split, number, seed)
        to = torch.rand(size, self.nodes, generator=draw).argsort(-1)
        x = torch.randn(size, self.nodes, generator=draw)
        total, there = x, to
        for _ in range(self.hops):
            total = total + x.gather(1, there)
            there = to.gather(1, there)
        own = codes.expand(size, -1, -1) * self.code**0.5
        inputs = torch.cat(
            [own, own.gather(1, to[..., None].expand(-1, -1, self.code)), x[..., None]], dim=-1
        )
        return Batch(inputs, total[..., None] / (self.hops + 1) ** 0.5)

    def yardsticks(self) -> Mapping[str, float]:
        batch = self.batch("yardsticks", 0, 2048, 0)
        y, x = batch.targets[..., 0], batch.inputs[..., -1]
        slope = float((x * y).mean() / x.square().mean())
        return {
            "nothing learned": float(y.square().mean()),
            "no hop followed": float((y - slope * x).square().mean()),
        }
