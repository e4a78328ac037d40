"""Landmark attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["landmark_attention", "landmark_weights"]


def landmark_weights(q: Tensor, k: Tensor, block_size: int, top_k: int | None, real: list[bool]) -> Tensor:
    """The weights `(L, L)` of one head, q and k `(L, D)`: row i of tokens j, by the definition."""
    length, width = q.shape
    weights = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        score = [float(q[i] @ k[j]) / math.sqrt(width) for j in range(i + 1)]
        start = i // block_size * block_size
        past = {}  # landmark: the ordinary tokens of its block
        for mark in range(block_size - 1, start, block_size):
            members = [j for j in range(mark - block_size + 1, mark) if real[j]]
            if real[mark] and members:
                past[mark] = members
        marks = sorted(past, key=lambda j: (score[j], j), reverse=True)[:top_k]
        last = min(i, start + block_size - 2)  # the own block's landmark is no member
        section = [j for j in range(start, last + 1) if real[j]]
        powers = {j: math.exp(score[j]) for j in section + marks}
        total = sum(powers.values())
        for j in section:
            weights[i, j] = powers[j] / total
        for mark in marks:
            inner = sum(math.exp(score[j]) for j in past[mark])
            for j in past[mark]:
                weights[i, j] = powers[mark] / total * math.exp(score[j]) / inner
    return weights


@twin("landmark_attention")
def landmark_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    block_size: int,
    top_k: int | None,
    padding: Tensor | None = None,
) -> Tensor:
    """o_i = Σ_j w_ij v_j with the weights of `landmark_weights`, token by token.

    Args:
        x: `(B, L, d)`; token j is a landmark where j + 1 is a multiple of `block_size`.
        parameters: the module's state.
        heads, kv_heads: H and G, g = h // (H / G).
        block_size, top_k: b, and the past blocks that are read.
        padding: bool `(B, L)`, True at real tokens.
    """
    x = real(x, padding)
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(x, parameters, "key", kv_heads)
    v = heads_of(x, parameters, "value", kv_heads)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(len(x)):
        kept = [True] * x.shape[1] if padding is None else padding[b].tolist()
        for h in range(heads):
            g = h // (heads // kv_heads)
            weights = landmark_weights(q[b, h], k[b, g], block_size, top_k, kept)
            out[b, h] = weights @ v[b, g]
    return joined(out, parameters)
