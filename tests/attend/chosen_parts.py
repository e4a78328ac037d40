"""What a selector chooses, as tables for tests to look at."""

from __future__ import annotations

import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import Selector, choose


def blocks_read(selector: Selector, q: Tensor, k: Tensor) -> Tensor:
    """Which blocks are read under a causal mask: bool (B, H, M, N)."""
    found = choose(selector, q, k, ph.causal(), q.shape[-1] ** -0.5)
    assert isinstance(found, Chosen)
    blocks = -(-k.shape[2] // selector.cols)
    table = torch.zeros(*found.index.shape[:3], blocks + 1, dtype=torch.bool)
    return table.scatter_(-1, found.index.masked_fill(found.index < 0, blocks), True)[..., :-1]


def pairs_read(selector: Selector, q: Tensor, k: Tensor, mask: ph.Mask | None = None) -> Tensor:
    """Which pairs are read of those that the mask allows, the same ones for all heads: bool (B, L, S)."""
    mask = ph.causal() if mask is None else mask
    found = mask & choose(selector, q, k, mask, q.shape[-1] ** -0.5)
    sizes = {"batch": q.shape[0], "heads": q.shape[1], "queries": q.shape[2], "keys": k.shape[2]}
    table = densify(found, **sizes).expand(q.shape[0], q.shape[1], -1, -1)
    assert (table == table[:, :1]).all()
    return table[:, 0]
