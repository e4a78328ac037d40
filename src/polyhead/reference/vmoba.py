"""Video mixture of block attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["block_of", "chosen_pairs", "vmoba"]

Pair = tuple[int, int, int]  # head, query, block


def block_of(token: int, grid: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """The block of a token, by its number along every axis of the grid."""
    found = []
    for length, size in zip(reversed(grid), reversed(block), strict=True):
        token, place = divmod(token, length)
        found.append(place // size)
    return tuple(reversed(found))


def chosen_pairs(scores: dict[Pair, float], own: set[Pair], share: float) -> set[Pair]:
    """The own pairs, and of the others the best until all of them have `share` of the sum, at least one."""
    low, high = min(scores.values()), max(scores.values())
    span = high - low if high - low >= 1e-6 else 1.0
    like = {pair: (score - low) / span for pair, score in scores.items()}
    total, taken = sum(like.values()), sum(like[pair] for pair in own)
    found = set(own)
    for pair in sorted(scores.keys() - own, key=lambda p: (like[p], p), reverse=True):
        if len(found) > len(own) and taken >= share * total and share < 1:
            break
        found.add(pair)
        taken += like[pair]
    return found


@twin("vmoba")
def vmoba(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    grid: tuple[int, ...] | None,
    block: int | tuple[int, ...],
    share: float,
    over: str,
    padding: Tensor | None = None,
) -> Tensor:
    """head_t = attend(q_t, the tokens of its own block and of those that it was left).

    Padded tokens are in no mean and are not read; a block of them alone is not there. As queries they compete
    with no other: they read their own block, or the best one if that is not there.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        grid, block: lengths of the axes and of a block; a number for all axes, no grid for one of L tokens.
        share: τ.
        over: which pairs of a query and a block compete: those of a "head", a "query", a "block", or all.
        padding: bool; see `reference`.
    """
    batch, length, _ = x.shape
    grid = (length,) if grid is None else grid
    block = (block,) * len(grid) if isinstance(block, int) else block
    source = real(x, padding)
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    names = [block_of(t, grid, block) for t in range(length)]
    order = sorted(set(names))
    read = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        alive = [t for t in range(length) if padding is None or padding[b, t]]
        members = [[t for t in alive if names[t] == name] for name in order]
        rows: dict[object, dict[Pair, float]] = {}
        for h in range(heads):
            for c, tokens in enumerate(members):
                for t in range(length) if tokens else []:
                    row: object = {"head": h, "query": (h, t), "block": c, "call": None}[over]
                    if t not in alive and over != "query":
                        row = ("padding", h, t)
                    like = q[b, h, t] @ k[b, h // (heads // kv_heads), tokens].mean(0)
                    rows.setdefault(row, {})[h, t, c] = float(like)
        for row, scores in rows.items():
            own = {(h, t, c) for h, t, c in scores if names[t] == order[c]}
            aside = isinstance(row, tuple) and row[0] == "padding"
            for h, t, c in own if aside and own else chosen_pairs(scores, own, 0.0 if aside else share):
                read[b, h, t, members[c]] = True
    return joined(attend(q, k, v, mask=read), parameters)
