"""A convolution over neighbouring pairs: the number of a pair is mixed from those of the pairs around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.scores.base import Chain, Score
from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import WeightChain, WeightMap
from polyhead.checks import floating, given, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["PairConvolution", "check_single_pairs", "pair_convolution", "parts_of"]


class PairConvolution(Score, WeightMap):
    """y_hij = sum_a sum_b kernel[h, a, b + back] x_h,i-a,j+b over 0 <= a < c_q, -back <= b <= ahead.

    x is 0 at forbidden pairs and beyond the first query and the first and last key of the call. An operator
    shows it some rows before those that it needs; whatever holds a map cannot hold this one.

    Attributes:
        kernel: `(H, c_q, c_k)`.
        ahead: of the c_k keys, how many stand behind the pair's own.
    """

    kernel: Tensor
    ahead: int

    def __post_init__(self) -> None:
        shape = "(H, c_q, c_k), one kernel for every head"
        floating("kernel", self.kernel, 3, shape)
        if 0 in self.kernel.shape:
            raise ConfigError(f"kernel must be a tensor {shape}, with a number in it; got an empty one")
        whole("ahead", self.ahead, 0, self.kernel.shape[2] - 1)

    @property
    def rows_back(self) -> int:  # type: ignore[override]
        return self.kernel.shape[1] - 1

    @property
    def _back(self) -> int:
        return self.kernel.shape[2] - 1 - self.ahead

    def apply(self, x: Tensor, tile: Tile) -> Tensor:
        raise ConfigError(
            "pair_convolution reads the pairs around a pair, and cannot stand inside another map; hand it to "
            "attend, in score= or weight_map=, by itself or in a sequence"
        )

    def heads(self, x: Tensor, tile: Tile) -> Tensor:
        """The kernels of the tile's heads, in the dtype of x."""
        total = tile.total_heads or tile.heads
        if self.kernel.shape[0] != total:
            raise ShapeError(
                f"kernel holds kernels for {self.kernel.shape[0]} heads, but the call has {total} query heads"
            )
        return self.kernel[tile.head_slice].to(x)

    def mapped(self, x: Tensor, kernel: Tensor) -> Tensor:
        """y of x `(b, h, r, c)`, whose columns have no gap."""
        rows = self.rows_back
        return _correlated(x, kernel.flip(1), (self._back, self.ahead, rows, 0))

    def transposed(self, grad: Tensor, kernel: Tensor) -> Tensor:
        """The gradient for x of that for y."""
        rows = self.rows_back
        return _correlated(grad, kernel.flip(2), (self.ahead, self._back, 0, rows))

    def kernel_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient `(h, c_q, c_k)` for the kernels: sums of products at every shift, by FFT."""
        size = _fast(max(x.shape[-1] + max(self.ahead, self._back), self.kernel.shape[2]))
        waves, heads = torch.fft.rfft(x, n=size), x.shape[1]
        upper = torch.fft.rfft(grad, n=size).conj()
        rows, found = x.shape[2], waves.new_zeros(heads, self.rows_back + 1, size // 2 + 1)
        for a in range(min(self.rows_back + 1, rows)):
            found[:, a] = (waves[:, :, : rows - a] * upper[:, :, a:]).sum((0, 2))
        shifted = torch.fft.irfft(found, n=size)
        return shifted.roll(self._back, -1)[..., : self.kernel.shape[2]]


def parts_of(part: Score | WeightMap | None) -> tuple[Score | WeightMap, ...]:
    """The maps of a call, from left to right."""
    if part is None:
        return ()
    if isinstance(part, Chain):
        return part.scores
    return part.maps if isinstance(part, WeightChain) else (part,)


def check_single_pairs(owner: str, score: Score | None) -> None:
    """Raise a `ConfigError` if a map of the logits reads other pairs than the one that it maps."""
    if any(isinstance(one, PairConvolution) for one in parts_of(score)):
        raise ConfigError(
            f"{owner}: score must map each pair by itself, for what is not read must have no part in the "
            f"logits of what is; got {given(score)}"
        )


def _correlated(x: Tensor, kernel: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    if not x.numel():
        return x.clone()
    return F.conv2d(F.pad(x, margins), kernel[:, None], groups=x.shape[1])


def _fast(least: int) -> int:
    """A length from `least` on for which Fourier series are fast: a small multiple of a power of 2."""
    power = 1 << max(0, (least - 1).bit_length() - 3)
    return -(-least // power) * power


def pair_convolution(kernel: Tensor, ahead: int | None = None) -> PairConvolution:
    """Mix the numbers of neighbouring pairs, of each head by itself:

        y_hij = sum_{a=0..c_q-1} sum_{b=-back..ahead} kernel[h, a, b + back] x_h,i-a,j+b

    where back + ahead = c_k - 1. Forbidden pairs count as 0, and stay forbidden. As a score it convolves the
    logits, as a weight map the weights, whose sum over a row it changes. With L queries those before them are
    not known, and count as 0: who decodes hands over the c_q - 1 queries before. Cost: 2·c_q·c_k operations a
    pair and head; memory is O(L).

    Multi-Token Attention, arXiv 2504.00927. `multi_token_attention` is the module of it.

    Args:
        kernel: `(H, c_q, c_k)`, learned if it requires gradient; a single 1 at [h, 0, back] changes nothing.
        ahead: keys behind the pair's own that it reads, of c_k in all; default c_k // 2, as many as before.

    Raises:
        ConfigError: kernel is no such tensor, or ahead not in 0..c_k - 1.
    """
    floating("kernel", kernel, 3, "(H, c_q, c_k), one kernel for every head")
    return PairConvolution(kernel, kernel.shape[2] // 2 if ahead is None else ahead)
