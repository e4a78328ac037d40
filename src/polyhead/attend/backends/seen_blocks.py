"""The blocks of which a mask lets something be seen, as if they had been chosen: by torch's fused kernel."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.attend.backends.chosen import ChosenBlocks
from polyhead.attend.masks import Mask, TileMap, chosen, tile_map
from polyhead.attend.plan import Request

__all__ = ["SeenBlocks"]

_BLOCK = 64
_MOST = 0.5  # of all pairs: where more is seen, the tile engine is as quick


class SeenBlocks:
    """Plain softmax on a CPU under a mask that hides most blocks of 64 × 64 pairs.

    Args:
        backend: what reads chosen blocks.
    """

    name = "seen_blocks"
    dense = False
    opt_in = ""

    def __init__(self, backend: ChosenBlocks) -> None:
        self.backend = backend

    def refuse(self, request: Request) -> str:
        mask = request.problem.mask
        if mask is None:
            return "no mask hides anything"
        nothing = chosen(torch.zeros(1, 1, 1, 1, dtype=torch.int64), rows=_BLOCK, cols=_BLOCK)
        reason = self.backend.refuse(_under(request, mask & nothing))
        if reason:
            return reason
        q, k = request.q, request.k
        tiles = _tiles(mask, request)
        if tiles.density() > _MOST:
            return f"of {q.shape[2]} × {k.shape[2]} pairs most lie in blocks of which something is seen"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        mask = request.problem.mask
        assert mask is not None
        some = _tiles(mask, request).some
        width = max(1, int(some.sum(-1).amax()))
        seen, index = some.to(torch.int8).sort(dim=-1, descending=True, stable=True)
        index = index[..., :width].masked_fill(seen[..., :width] == 0, -1)
        first = request.k.shape[2] - request.q.shape[2]
        found = chosen(index, rows=_BLOCK, cols=_BLOCK, first=first)
        return self.backend.run(_under(request, mask & found))


def _under(request: Request, mask: Mask) -> Request:
    return replace(request, problem=replace(request.problem, mask=mask))


def _tiles(mask: Mask, request: Request) -> TileMap:
    batch, heads, queries, _ = request.q.shape
    keys = request.k.shape[2]
    return tile_map(mask, batch=batch, heads=heads, queries=queries, keys=keys, rows=_BLOCK, cols=_BLOCK)
