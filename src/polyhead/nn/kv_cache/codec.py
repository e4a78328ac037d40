"""Rows that a cache holds in fewer bytes than they are computed with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BareSigns", "FlagBits", "RowCodec", "SignBits", "row_bytes"]


@runtime_checkable
class RowCodec(Protocol):
    """How the rows of a stream are held, as uint8: the third entry of a stream, `(heads, width, codec)`.

    A cache returns such a stream as it is held: packed as uint8, or, while autograd records, as rows.
    """

    def nbytes(self, width: int, dtype: torch.dtype) -> int:
        """Bytes of one row."""

    def pack(self, rows: Tensor) -> Tensor:
        """Rows `(..., width)` as uint8 `(..., nbytes)`."""

    def unpack(self, held: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The rows again."""


def row_bytes(streams: tuple[tuple, ...], dtype: torch.dtype) -> int:
    """Bytes that a token takes in a cache of these streams."""
    return sum(
        heads * (codec[0].nbytes(width, dtype) if codec else width * dtype.itemsize)
        for heads, width, *codec in streams
    )


class SignBits:
    """Rows of one magnitude each: ⌈width / 8⌉ bytes of signs, then the magnitude.

    Bit c of byte n is set where channel 8 n + c is not negative.
    """

    def nbytes(self, width: int, dtype: torch.dtype) -> int:
        return -(-width // 8) + dtype.itemsize

    def pack(self, rows: Tensor) -> Tensor:
        signs = _bytes_of(rows >= 0)
        size = rows.detach()[..., :1].abs().contiguous().view(torch.uint8)
        return torch.cat([signs, size], dim=-1)

    def unpack(self, held: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        signs, size = held.split([-(-width // 8), dtype.itemsize], dim=-1)
        bytes_, bits = torch.arange(256, device=held.device), torch.arange(8, device=held.device)
        table = ((bytes_[:, None] >> bits & 1) * 2 - 1).to(dtype)  # of every byte, its eight signs
        rows = F.embedding(signs.int(), table).flatten(-2)[..., :width]
        # a copy, since a view as another dtype has to begin where one of its numbers may
        return rows * size.clone(memory_format=torch.contiguous_format).view(dtype)


class FlagBits:
    """Rows of zeros and ones, ⌈width / 8⌉ bytes: bit c of byte n is set where channel 8 n + c is not zero."""

    def nbytes(self, width: int, dtype: torch.dtype) -> int:
        return -(-width // 8)

    def pack(self, rows: Tensor) -> Tensor:
        return _bytes_of(rows != 0)

    def unpack(self, held: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        bits = held[..., None] >> torch.arange(8, dtype=torch.uint8, device=held.device) & 1
        return bits.flatten(-2)[..., :width].to(dtype)


class BareSigns(FlagBits):
    """Rows of -1 and +1, ⌈width / 8⌉ bytes: bit c of byte n is set where channel 8 n + c is +1."""

    def pack(self, rows: Tensor) -> Tensor:
        return super().pack(rows > 0)

    def unpack(self, held: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        return super().unpack(held, width, dtype) * 2 - 1


def _bytes_of(flags: Tensor) -> Tensor:
    """Bool `(..., width)` as uint8 `(..., ⌈width / 8⌉)`."""
    bits = F.pad(flags, (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    powers = (1 << torch.arange(8, device=flags.device)).to(torch.uint8)
    return (bits.to(torch.uint8) * powers).sum(-1, dtype=torch.uint8)
