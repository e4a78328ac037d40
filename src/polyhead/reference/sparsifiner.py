"""Attention to the keys that a low-rank predictor names."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["sparsifiner"]


@twin("sparsifiner")
def sparsifiner(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    keep: float,
    class_token: bool,
    coefficients: int,
    least: float,
    scale_by: str,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, the ⌈keep · L⌉ keys with the largest Σ_m c_im |B_jm|), L counting real tokens.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; `reduce_query.weight` and `reduce_key.weight` `(c, D)`, their biases
            `(c,)`, `tokens_in` and `tokens_out` `(N, n)`.
        heads, kv_heads: H and G, g = h // (H / G).
        keep: share of the keys; of equal ones the later.
        class_token: whether token 0 reads all.
        coefficients: of c_im so many are kept, the largest.
        least: |B_jm| counts where it is larger.
        scale_by: "channels" or "heads".
        padding: bool; see `reference`.
    """
    batch, length, _ = x.shape
    kept = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    source = real(x, padding)
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    of_query, of_key = (parameters[f"reduce_{name}.weight"].double() for name in ("query", "key"))
    with_query, with_key = (parameters[f"reduce_{name}.bias"].double() for name in ("query", "key"))
    tokens, basis = (parameters[f"tokens_{name}"].double() for name in ("in", "out"))
    scale = 1 / math.sqrt(heads if scale_by == "heads" else len(of_query))
    read = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        there = [j for j in range(length) if kept[b, j]]
        count = max(1, math.ceil(keep * len(there) - 1e-9))
        for h in range(heads):
            own = k[b, h // (heads // kv_heads)]
            sums = torch.zeros(tokens.shape[1], len(of_key), dtype=torch.float64)
            for j in there:
                sums = sums + tokens[j][:, None] * (of_key @ own[j] + with_key)
            for i in range(length):
                logits = scale * (sums @ (of_query @ q[b, h, i] + with_query))
                mixed = [float(c) for c in logits.softmax(0)]
                best = sorted(range(len(mixed)), key=lambda m: -mixed[m])[:coefficients]
                worth = []
                for j in there:
                    row = [float(abs(basis[j, m])) for m in best]
                    worth.append((sum(mixed[m] * z for m, z in zip(best, row, strict=True) if z > least), j))
                for _, j in sorted(worth, reverse=True)[:count]:
                    read[b, h, i, j] = True
            if class_token:
                read[b, h, 0, there] = True
    return joined(attend(q, k, v, mask=read), parameters)
