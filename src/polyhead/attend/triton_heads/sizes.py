"""How large the kernels' tiles are, for which calls they were compiled, and what the mask says of a pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.attend.masks import Mask, Padding, all_of, span, terms_of

__all__ = ["FEWEST", "MOST_HEADS", "MOST_REPEAT", "WIDTHS", "Near", "Sizes", "near", "padded"]

MOST_HEADS = 16
MOST_REPEAT = 4
WIDTHS = (16, 128)
FEWEST = 16


def padded(number: int) -> int:
    """The next power of two."""
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True)
class Sizes:
    """The sizes that a kernel is compiled for.

    Attributes:
        kv_heads, repeat: G, and the query heads that share one of them.
        padded_kv, padded_repeat: the same, padded to powers of two.
        rows, cols: query rows (M) and keys (N) of a tile.
        rank: size of the matrix over the heads as the kernels multiply it, at least 16.
        split: parts of a tile whose products for the gradient of a matrix are summed apart, by other warps.
        step: columns of q, k, v and dout that are read at a time.
        sums: numbers of an output that a program sums up at most.
        warps: of a program.
    """

    kv_heads: int
    repeat: int
    padded_kv: int
    padded_repeat: int
    rows: int
    cols: int
    rank: int
    split: int
    step: int
    sums: int
    warps: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> Sizes:
        """Those of a call."""
        repeat, full = heads // kv_heads, dtype == torch.float32
        p_kv, p_repeat = padded(kv_heads), padded(repeat)
        together = p_kv * p_repeat
        # more than 64 rows of heads that share keys are more than the compiler keeps in registers
        rows, cols = 32 if together <= 8 and p_repeat <= 2 else 16, 16
        return cls(
            kv_heads=kv_heads,
            repeat=repeat,
            padded_kv=p_kv,
            padded_repeat=p_repeat,
            rows=rows,
            cols=cols,
            rank=max(16, together),
            split=min(8, together * rows * cols // (16 * max(16, together))),
            step=min(16 if full else 32, max(16, padded(width))),
            sums=1 << 13 if full else 1 << 14,
            warps=8 if together * rows * cols >= 4096 else 4,
        )

    def columns(self, width: int) -> int:
        """Columns of an output that one program sums up: the rest is for other programs."""
        room = self.sums // (self.padded_kv * self.padded_repeat * self.rows)
        return min(max(16, room), max(16, padded(width)))


@dataclass(frozen=True)
class Near:
    """Query i sees key j if i - left <= j <= i + right (None: unbounded) and `real` (B or 1, S) says so."""

    left: int | None = None
    right: int | None = None
    real: Tensor | None = None


def near(mask: Mask | None) -> Near | None:
    """A mask as a window and a padding, however it is spelled; None if it is more than that."""
    terms = terms_of(mask)
    paddings = [term for term in terms if isinstance(term, Padding)]
    others = all_of(term for term in terms if not isinstance(term, Padding))
    left = right = None
    if others is not None:
        found = span(others)
        if found is None:
            return None
        left, right = found
    real = None
    for term in paddings:
        real = term.mask if real is None else real & term.mask.to(real.device)
    return Near(left, right, real)
