"""Mixture of sparse attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["mosa"]


@twin("mosa")
def mosa(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    dense_heads: int,
    sparsity: float,
    choice: str,
    include_first: bool,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Masked attention of all pairs: head e lets t see j <= t if it chose both, times s_te; else zero.

    Args:
        x: `(B, L, d)`.
        parameters: the module's state.
        heads, dense_heads: H and how many of them, the first, read all.
        sparsity: ρ; a head chooses max(2, ⌊T / ρ⌋) tokens, of equal ones the earlier.
        choice: "prefix": among the real tokens up to each one, T of them; "sequence": among all.
        include_first: the first real token is one of the chosen.
        mask, padding: bool; see `reference`. No mask takes away that j <= t.
    """
    batch, length, _ = x.shape
    kept = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    source = real(x, padding)
    scores = (source @ parameters["choice.score.weight"].double().T).sigmoid()
    seen = torch.ones(batch, heads, length, length, dtype=torch.bool).tril() & kept[:, None, None]
    gates = torch.ones(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        there = [t for t in range(length) if kept[b, t]]
        for e in range(heads - dense_heads):
            s = scores[b, :, e]

            def best(tokens: list[int], s: Tensor = s) -> list[int]:
                k = max(2, int(len(tokens) / sparsity))
                sure = tokens[: int(include_first)]
                rest = sorted(tokens[len(sure) :], key=lambda one: (-float(s[one]), one))
                return (sure + rest)[:k]

            if choice == "sequence":
                mine = best(there)
            else:
                mine = [t for n, t in enumerate(there) if t in best(there[: n + 1])]
            inside = torch.zeros(length, dtype=torch.bool)
            inside[mine] = True
            h = dense_heads + e
            seen[b, h] &= inside & inside[:, None]
            gates[b, h] = torch.where(inside, s, 0.0)
    q, k, v = (heads_of(source, parameters, name, heads) for name in ("query", "key", "value"))
    out = attend(q, k, v, mask=seen if mask is None else seen & mask)
    return joined(out * gates[..., None], parameters)
