"""Selectors that look at no content: the same blocks for every call."""

from __future__ import annotations

from torch import Tensor

from polyhead.attend.masks import Mask, sink, window
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.selector import Kept, Selector
from polyhead.attend.selectors.visible import tiles
from polyhead.checks import given, whole
from polyhead.errors import ConfigError

__all__ = ["Fixed", "a_shape", "fixed"]


class Fixed(Selector):
    """The blocks of which a mask lets something be seen. See `fixed`."""

    mask: Mask
    rows: int = 64
    cols: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise ConfigError(f"fixed: mask must be a mask such as sink(4); got {given(self.mask)}")
        for name in ("rows", "cols"):
            whole(f"fixed: {name}", getattr(self, name), 1)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            return visible & tiles(self.mask, grid, start, stop, q.device)

        return kept


def fixed(mask: Mask, *, rows: int = 64, cols: int = 64) -> Selector:
    """Every block of which `mask` lets something be seen, whatever the content.

    Use it to add blocks to what another selector reads, without taking from its budget:
    `select(...) | fixed(sink(1) | window(0))`. What `select(always=...)` reads counts as kept.

    Args:
        mask: such as `sink(4) | window(255)`.
        rows, cols: length of a block of queries and of keys.
    """
    return Fixed(mask, rows, cols)


def a_shape(first: int = 1024, nearest: int = 4096, *, rows: int = 64, cols: int = 64) -> Selector:
    """The first keys and the nearest ones: the blocks that hold any of them.

    With `cols=1` and `rows=1` it is the mask `sink(first) | window(nearest - 1)`, and where nothing else is
    read the mask is the better way to say it: `attend(q, k, v, mask=causal() & (sink(4) | window(255)))`.

    Static pattern of Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", arXiv 2407.02490.

    Args:
        first: keys at the start, padding or not, at least 1.
        nearest: keys up to and with the query's own, at least 1.
        rows, cols: length of a block of queries and of keys.
    """
    whole("a_shape: first", first, 1)
    whole("a_shape: nearest", nearest, 1)
    return Fixed(sink(first) | window(nearest - 1), rows, cols)
