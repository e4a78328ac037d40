"""Attention in which heads have the maps of others, and values of their own.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference" (paper 066, arXiv 2403.08058).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.attend import attend
from polyhead.attend.masks import Mask, some_of
from polyhead.attend.stream import of_heads
from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = ["shared_attention"]


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: Sequence[int],
    *,
    mask: Mask | None,
    items: Sequence[int],
    score: Any,
    normalizer: Any,
    scale: float,
) -> Tensor:
    """Attention `(B, H, L, Dv)` in which head h has the map of head `used[h]`, and its own values.

    Every map is made once. Values of heads that use it go side by side.

    Args:
        q, k, v: `(B, H, L, D)`, `(B, G, S, D)` and `(B, G, S, Dv)`.
        used: head by head.
        mask: of a call of more items, of which `items` are here.
        items, score, normalizer, scale: of the call.
    """
    heads, repeat = q.shape[1], q.shape[1] // k.shape[1]
    readers: dict[int, list[int]] = {}
    for head, other in enumerate(used):
        readers.setdefault(other, []).append(head)
    # heads that share their values as well need them once
    values = {r: sorted({head // repeat for head in members}) for r, members in readers.items()}
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for width in sorted({len(own) for own in values.values()}):
        chosen = [r for r, own in values.items() if len(own) == width]
        at = torch.tensor(chosen, device=q.device)
        of = torch.tensor([values[r] for r in chosen], device=q.device)  # (C, width)
        found = attend(
            q[:, at],
            k[:, at // repeat],
            v[:, of].transpose(2, 3).flatten(3),
            mask=None if mask is None else some_of(mask, batch=torch.tensor(items), heads=at),
            score=_of_heads(score, at, heads),
            normalizer=_of_heads(normalizer, at, heads),
            scale=scale,
        ).unflatten(3, (width, -1))
        for n, r in enumerate(chosen):
            for head in readers[r]:
                out[:, head] = found[:, n, :, values[r].index(head // repeat)]
    return out


def _of_heads(part: Part | None, heads: Tensor, total: int) -> Any:
    """A part of a call for some of its heads: its tensors `(H,)` by these."""
    if part is None:
        return None
    if any(t.ndim > 1 for t in part.tensors()):
        raise ConfigError(
            f"clustered: {type(part).__name__} holds a table of all heads, so that a head cannot stand for "
            "others; leave this layer out with None among the counts"
        )
    return of_heads(part, heads, total)
