"""Blocks of a video: which budget loses least of what attention gives, at equally many keys?

The small check of paper 190. Queries and keys of 8 heads, 32 wide, on a grid of 8 × 16 × 16 places: a random
field, smooth over three places or so along every axis, that queries and keys have in common, and noise of
their own. Heads 1 to 4 are concentrated, with logits of a spread of 3, heads 5 to 8 nearly flat, with 0.5.
Values are a smooth field too. Every query reads its own block and others by `mean_keys`, a quarter of all
pairs in every case: blocks of whole frames (1, 16, 16), of columns (8, 4, 4) and of cubes (2, 4, 8); by a
threshold for all queries of a head together, for all heads together, for each query, and by the best few of
each query.

The error of the outputs, as a share of their norm, mean over heads, and of the concentrated and flat ones;
and the share that is read in the head with most and the head with least.

It shows if the threshold over a head has a smaller error than the other budgets of a head, with cubes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.masks import Chosen
from polyhead.attend.selectors import Selector, choose
from polyhead.league.seeds import generator

GRID, HEADS, WIDTH = (8, 16, 16), 8, 32
TOKENS, SPREAD, PART = 2048, (3.0, 0.5), 0.25
BLOCKS = {"frames": (1, 16, 16), "columns": (8, 4, 4), "cubes": (2, 4, 8)}
Make = Callable[[tuple[int, ...], float], Selector]
BUDGETS: dict[str, Make] = {
    "head": lambda block, x: ph.vmoba(block, GRID, share=x),
    "all heads": lambda block, x: ph.vmoba(block, GRID, share=x, over="call"),
    "query": lambda block, x: ph.vmoba(block, GRID, share=x, over="query"),
    "best few": lambda block, x: ph.grid_blocks(ph.mean_keys(), ph.keep_share(x), block, GRID),
}


def field(draw: torch.Generator) -> Tensor:
    """A smooth random field (1, H, L, D), of variance 1."""
    noise = torch.randn(1, HEADS * WIDTH, *GRID, generator=draw)
    smooth = F.avg_pool3d(F.pad(noise, (2,) * 6, mode="replicate"), 5, 1)
    smooth = (smooth - smooth.mean()) / smooth.std()
    return smooth.flatten(2).unflatten(1, (HEADS, WIDTH)).mT


def tensors(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, H, L, D)."""
    draw = generator("video", seed)
    common, values = field(draw), field(draw)
    q, k = (common + 0.5 * torch.randn(common.shape, generator=draw) for _ in range(2))
    logits = (q[:, :, ::16] @ k.mT / WIDTH**0.5).std((0, 2, 3))
    wanted = torch.tensor(SPREAD).repeat_interleave(HEADS // 2)
    return q * (wanted / logits)[:, None, None], k, values


def read(own: Selector, q: Tensor, k: Tensor) -> Tensor:
    """The share of the keys that heads read, (H,)."""
    found = choose(own, q, k, None, WIDTH**-0.5)
    assert isinstance(found, Chosen)
    return (found.index >= 0).sum((0, 2, 3)) * found.cols / TOKENS**2


def level(make: Make, block: tuple[int, ...], q: Tensor, k: Tensor) -> float:
    """The number at which the selector reads a quarter of all pairs, or the next above it."""
    low, high = 0.0, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        if float(read(make(block, middle), q, k).mean()) < PART:
            low = middle
        else:
            high = middle
    return high


def run(seed: int) -> dict[str, float]:
    """All budgets and blocks."""
    numbers: dict[str, float] = {}
    q, k, v = tensors(seed)
    full = ph.attend(q, k, v)
    for shape, block in BLOCKS.items():
        for name, make in BUDGETS.items():
            own = make(block, level(make, block, q, k))
            y = ph.attend(q, k, v, select=own)
            off = torch.linalg.vector_norm(y - full, dim=(0, 2, 3))
            off = off / torch.linalg.vector_norm(full, dim=(0, 2, 3))
            parts = read(own, q, k)
            numbers |= {
                f"{shape}, {name}: error": float(off.mean()),
                f"{shape}, {name}: error, concentrated": float(off[: HEADS // 2].mean()),
                f"{shape}, {name}: error, flat": float(off[HEADS // 2 :].mean()),
                f"{shape}, {name}: read": float(parts.mean()),
                f"{shape}, {name}: read, most": float(parts.max()),
                f"{shape}, {name}: read, least": float(parts.min()),
            }
    return numbers


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            f"{shape}: head less {name}": (f"{shape}, head: error", f"{shape}, {name}: error")
            for shape in BLOCKS
            for name in ("query", "best few")
        },
        seeds=2,
    )
