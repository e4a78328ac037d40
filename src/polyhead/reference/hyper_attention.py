"""Attention to one block of like keys, and to a sample of the others that stands for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["hyper_attention"]


def order_of_buckets(bits: int) -> list[tuple[int, ...]]:
    """The signs of every bucket, neighbours differing in one: built by reflection."""
    if bits == 1:
        return [(0,), (1,)]
    smaller = order_of_buckets(bits - 1)
    return [(*code, 0) for code in smaller] + [(*code, 1) for code in reversed(smaller)]


class _Counts:
    """How often each pair counts."""

    def __init__(
        self, q: Tensor, k: Tensor, planes: Tensor, draw: Callable[[int], Tensor], block: int, least: int
    ):
        codes = order_of_buckets(planes.shape[1])
        self.q_bucket, self.k_bucket = (
            [
                [[codes.index(tuple(int(s > 0) for s in row @ planes)) for row in head] for head in item]
                for item in x
            ]
            for x in (q, k)
        )
        self.draw, self.block, self.least = draw, block, least
        self.group = q.shape[1] // k.shape[1]
        self.table = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)

    def past(self, rows: range, cols: range) -> None:
        """The queries `rows` and the keys `cols`, the last of which are their own places."""
        before = len(cols) - len(rows)
        if len(rows) <= self.least:
            for n, i in enumerate(rows):
                self.table[:, :, i, list(cols[: before + n + 1])] = 1
        elif before:
            self.past(rows, cols[before:])
            self.every(rows, cols[:before], ranked=False)
        else:
            half = (len(rows) + 1) // 2
            self.past(rows[:half], cols[:half])
            self.past(rows[half:], cols[half:])
            self.every(rows[half:], cols[:half], ranked=False)

    def every(self, rows: range, cols: range, ranked: bool) -> None:
        """All queries `rows` and all keys `cols`."""
        keys, blocks = len(cols), -(-len(cols) // self.block)
        if len(rows) < self.least or blocks == 1:
            for i in rows:
                self.table[:, :, i, list(cols)] = 1
            return
        drawn = self.draw(keys)
        for b in range(self.table.shape[0]):
            for h in range(self.table.shape[1]):
                g = h // self.group
                bucket = self.k_bucket[b][g]
                ordered = sorted(cols, key=lambda j: bucket[j])
                asked = self.q_bucket[b][h]
                queries = sorted(rows, key=lambda i: asked[i])
                for i in rows:
                    if ranked:
                        own = queries.index(i) // -(-len(rows) // blocks)
                    else:
                        below = sum(bucket[j] < asked[i] for j in cols)
                        same = sum(bucket[j] == asked[i] for j in cols)
                        own = min((2 * below + same) // 2, keys - 1) // self.block
                    self.table[b, h, i, ordered[own * self.block : (own + 1) * self.block]] += 1
                    for place in drawn[b, g].tolist():
                        if place // self.block != own:
                            self.table[b, h, i, ordered[place]] += keys / drawn.shape[-1]


@twin("hyper_attention")
def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    planes: Tensor,
    draw: Callable[[int], Tensor],
    block: int,
    least: int,
) -> tuple[Tensor, Tensor]:
    """The output `(B, H, L, Dv)`, and how often each pair counts, `(B, H, L, S)`.

    planes: `(D, bits)`. draw: places among so many sorted keys, `(B, G, samples)`, asked anew for every part.
    """
    q, k, v, planes = q.double(), k.double(), v.double(), planes.double()
    counts = _Counts(q, k, planes, draw, block, least)
    rows, cols = range(q.shape[2]), range(k.shape[2])
    if causal:
        counts.past(rows, cols)
    else:
        counts.every(rows, cols, ranked=True)
    k, v = (x.repeat_interleave(counts.group, 1) for x in (k, v))
    weights = counts.table * (q @ k.mT / q.shape[3] ** 0.5).exp()
    return weights @ v / weights.sum(-1, keepdim=True), counts.table
