"""Hierarchical self-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["hierarchical_self_attention", "row", "windows"]


@cache
def leaves(tree: Any) -> list[int]:
    """The leaves below a node, from left to right."""
    return [tree] if isinstance(tree, int) else [leaf for child in tree for leaf in leaves(child)]


def row(q: Tensor, k: Tensor, tree: Any, i: int, before: bool, known: dict[Any, Tensor]) -> Tensor:
    """The weights `(H, n)` of leaf i; q, k `(H, n, D)`, leaves are the integers in nested tuples.

    With `before`, siblings are those that stand before a node. What is found of subtrees is put in `known`.
    """

    def score(a: Any, c: Any) -> Tensor:
        return (q[:, leaves(a)].mean(1) * k[:, leaves(c)].mean(1)).sum(-1) / math.sqrt(q.shape[-1])

    def siblings(parent: Any, n: int) -> list[Any]:
        return [c for m, c in enumerate(parent) if (m < n if before else m != n)]

    def log_d(parent: Any, n: int) -> Tensor:
        of = [score(parent[n], c) + math.log(len(leaves(c))) for c in siblings(parent, n)]
        return torch.stack([-phi(parent[n]), *of]).logsumexp(0)

    def phi(node: Any) -> Tensor:
        if node in known:
            return known[node]
        if isinstance(node, int):
            return -score(node, node)
        shares = [len(leaves(child)) / len(leaves(node)) for child in node]
        return known.setdefault(node, -sum(s * log_d(node, n) for n, s in enumerate(shares)))  # type: ignore[arg-type]

    weights, mass, node = q.new_zeros(q.shape[:2]), q.new_ones(len(q)), tree
    while not isinstance(node, int):
        n = next(n for n, child in enumerate(node) if i in leaves(child))
        total = log_d(node, n)
        for c in siblings(node, n):
            weights[:, leaves(c)] = (mass * (score(node[n], c) - total).exp())[:, None]
        mass, node = mass * (-phi(node[n]) - total).exp(), node[n]
    weights[:, i] = mass
    return weights


def windows(tokens: list[int], branch: int, levels: int | None) -> Any:
    """The tree of the tokens: of every level, those whose places fall into a window are siblings."""
    level: dict[int, Any] = dict(zip(tokens, tokens, strict=True))
    while max(level) >= branch and levels != 0:
        places = sorted({place // branch for place in level})
        level = {p: tuple(level[c] for c in sorted(level) if c // branch == p) for p in places}
        levels = None if levels is None else levels - 1
    return tuple(level.values())


@twin("hierarchical_self_attention")
def hierarchical_self_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    branch: int,
    levels: int | None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The equations node by node. A mask means the causal one: row i is that of a tree of tokens 0..i."""
    x = real(x, padding)
    q = heads_of(x, parameters, "query", heads)
    k = heads_of(x, parameters, "key", kv_heads).repeat_interleave(heads // kv_heads, 1)
    v = heads_of(x, parameters, "value", kv_heads).repeat_interleave(heads // kv_heads, 1)
    out = torch.zeros_like(v)
    for b in range(len(x)):
        known: dict[Any, Tensor] = {}
        every = [t for t in range(x.shape[1]) if padding is None or padding[b, t]]
        whole = windows(every, branch, levels)
        for n, i in enumerate(every):
            tree = whole if mask is None else windows(every[: n + 1], branch, levels)
            weights = row(q[b], k[b], tree, i, mask is not None, known)
            out[b, :, i] = (weights[:, None] @ v[b])[:, 0]
    return joined(out, parameters)
