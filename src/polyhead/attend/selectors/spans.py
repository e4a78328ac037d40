"""A span of its own for every head, which grows with the length of the call."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import heads_fit, per_head
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.selector import Kept, Selector
from polyhead.checks import whole

__all__ = ["Spans", "spans"]


class Spans(Selector):
    """The first keys, and the nearest alpha + beta · length. See `spans`."""

    alpha: float | Tensor
    beta: float | Tensor = 0.0
    first: int = 64
    rows: int = 64
    cols: int = 64
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            own = per_head(f"spans: {name}", getattr(self, name), None, None, False)
            object.__setattr__(self, name, own)
        whole("spans: first", self.first, 0)
        for name in ("rows", "cols"):
            whole(f"spans: {name}", getattr(self, name), 1)
        if self.length is not None:
            whole("spans: length", self.length, 1)

    def check(self, heads: int) -> None:
        heads_fit("spans: alpha", self.alpha, heads)
        heads_fit("spans: beta", self.beta, heads)

    def blocks(self, keys: int) -> Tensor:
        """Blocks of a span in a call on so many keys, the own one among them: `(H,)`, or `(1,)` for all."""
        held = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (self.alpha, self.beta))
        alpha, beta = (x.reshape(-1) for x in held)
        tokens = alpha + beta * (keys if self.length is None else self.length)
        return (tokens / self.cols).floor().clamp(1, max(1, -(-keys // self.cols))).long()

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        reach = self.blocks(grid.keys).to(q.device)[:, None, None]
        block = torch.arange(grid.col_blocks, device=q.device)
        always = block < -(-self.first // self.cols)

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            row = torch.arange(start, stop, device=q.device)[:, None] * grid.rows + grid.offset
            last = row + grid.rows - 1
            # the first of the queries reaches back furthest, the last one furthest ahead
            near = block > row.div(grid.cols, rounding_mode="floor") - reach
            near = near & (block <= last.div(grid.cols, rounding_mode="floor"))
            return visible & (near | always)

        return kept


def spans(
    alpha: float | Tensor,
    beta: float | Tensor = 0.0,
    *,
    first: int = 64,
    rows: int = 64,
    cols: int = 64,
    length: int | None = None,
) -> Selector:
    """Every head reads the first keys and a span of the nearest ones, which grows with the length.

        s_h = max(1, ⌊(alpha_h + beta_h · N) / cols⌋) blocks
        query i reads key j    if  0 <= ⌊i/cols⌋ - ⌊j/cols⌋ < s_h,  or if the block of j holds one of `first`

    N is the number of keys of the call. A block of queries reads what any of its queries does. With beta 0 it
    is a window as in StreamingLLM, with alpha 0 and beta 1 everything (N that `cols` does not divide: all but
    what lies in the first block, which `first` covers). `polyhead.cache.spans` finds the numbers.

    Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (paper 107,
    arXiv 2406.14909), later Mixture of Attention Spans.

    Args:
        alpha: tokens of a span at length 0, any number; or a tensor `(H,)`, one number a head.
        beta: by how much it grows with every token; or a tensor `(H,)`.
        first: keys at the start that are always read; 0 for none.
        rows, cols: length of a block of queries and of keys.
        length: N for all calls. None: the keys of the call, so that spans grow while a model decodes; the
            paper fixes them by the length of the prompt, and so a cache can forget what they leave out.
    """
    return Spans(alpha, beta, first, rows, cols, length)
