"""The score maps of a call on the way there and back, strip by strip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from polyhead.attend.scores import Chain, Positional, Score
from polyhead.attend.scores.base import heads_of
from polyhead.attend.stream import OwnGradients, trainable
from polyhead.attend.strip_work import Operands, StripWork
from polyhead.attend.toeplitz import diagonal_sums, expand_diagonals

__all__ = ["ScoreMaps", "score_maps"]


class ScoreMaps:
    """Any score maps: applied to a strip, and differentiated by autograd where that is asked for.

    Attributes:
        may_hide: whether a map might put -inf where the mask allows a pair.
    """

    may_hide = True

    def __init__(self, score: Score, own: OwnGradients | None) -> None:
        self.score, self.own = score, own
        self.leaves = () if own is None else trainable(score)

    def there(self, raw: Tensor, part: StripWork) -> Tensor:
        """The mapped scores, which may be overwritten, as may `raw`."""
        if self.own is not None:
            with torch.enable_grad():
                self.source = raw.detach().requires_grad_()
                self.result = self.score.apply(self.source, part.tile)
            return self.result.detach().clone()
        mapped = self.score.apply(raw, part.tile)
        # the mask is written in place, which must not reach a tensor of the caller's
        return mapped.clone() if mapped is raw or not mapped.is_contiguous() else mapped

    def back(self, grad: Tensor, part: StripWork) -> Tensor:
        """The gradient for the raw scores; those for the maps' own tensors are added to the totals."""
        if not self.result.requires_grad:
            return torch.zeros_like(grad)
        for_raw, *rest = torch.autograd.grad(
            self.result, (self.source, *self.leaves), grad, allow_unused=True
        )
        self._collect(rest)
        return torch.zeros_like(grad) if for_raw is None else for_raw.contiguous()

    def done(self) -> None:
        """All strips were there and back."""

    def _collect(self, grads: Sequence[Tensor | None]) -> None:
        assert self.own is not None
        for leaf, grad in zip(self.leaves, grads, strict=True):
            self.own.add(leaf, grad)


class _Biases(ScoreMaps):
    """Maps that only add a bias: what comes in goes on as it is."""

    may_hide = False

    def there(self, raw: Tensor, part: StripWork) -> Tensor:
        with torch.set_grad_enabled(bool(self.leaves)):
            self.bias = self.score.bias(part.tile, raw.dtype)
        return raw if self.bias is None else raw.add_(self.bias.detach())

    def back(self, grad: Tensor, part: StripWork) -> Tensor:
        if self.bias is not None and self.bias.requires_grad:
            down = over_batch(grad).sum_to_size(self.bias.shape)
            self._collect(torch.autograd.grad(self.bias, self.leaves, down, allow_unused=True))
        return grad


class _Distances(ScoreMaps):
    """Biases by distance: all L + S - 1 values are asked for once, and every strip is made of them."""

    may_hide = False

    def __init__(self, score: Score, own: OwnGradients | None, x: Operands) -> None:
        super().__init__(score, own)
        self.x, self.keys = x, x.frame.keys
        # from the most distant key behind to the most distant one ahead, as columns go
        distance = torch.arange(self.keys - 1, -x.frame.queries, -1, device=x.frame.device)
        with torch.set_grad_enabled(bool(self.leaves)):
            values = [one.at(distance).to(x.q.dtype) for one in _positional(score)]
            self.values = torch.stack(torch.broadcast_tensors(*values)).sum(0) if values[1:] else values[0]
        self.detached = self.values.detach()
        self.total = torch.zeros_like(self.detached) if self.leaves else None

    def _runs(self, part: StripWork) -> Iterator[tuple[slice, slice]]:
        """For each run of columns: the diagonals that it has, and its columns in the strip."""
        strip, start = part.strip, 0
        rows = strip.r1 - strip.r0
        for run in strip.runs:
            columns = run.stop - run.start
            first = self.keys - 1 - (self.x.frame.offset + strip.r1 - 1) + run.start
            yield slice(first, first + rows + columns - 1), slice(start, start + columns)
            start += columns

    def there(self, raw: Tensor, part: StripWork) -> Tensor:
        rows = part.shape[2]
        for diagonals, columns in self._runs(part):
            values = heads_of(self.score, self.detached, part.tile)[:, diagonals]
            size = (values.shape[0], rows, values.shape[1])
            bias = expand_diagonals(values, rows, self.x.buffer("bias", size))
            raw[..., columns].add_(bias)
        return raw

    def back(self, grad: Tensor, part: StripWork) -> Tensor:
        if self.total is not None:
            heads = part.tile.head_slice if self.total.shape[0] > 1 else slice(0, 1)
            down = over_batch(grad)
            for diagonals, columns in self._runs(part):
                sums = diagonal_sums(down[..., columns])
                target = self.total[heads, diagonals]
                target += sums.sum_to_size(target.shape)
        return grad

    def done(self) -> None:
        if self.total is not None and self.values.requires_grad:
            self._collect(torch.autograd.grad(self.values, self.leaves, self.total, allow_unused=True))


class _Nothing(ScoreMaps):
    """No maps."""

    may_hide = False

    def __init__(self) -> None:
        """Nothing to hold."""

    def there(self, raw: Tensor, part: StripWork) -> Tensor:
        return raw

    def back(self, grad: Tensor, part: StripWork) -> Tensor:
        return grad


def over_batch(grad: Tensor) -> Tensor:
    """(b, h, r, c) summed over b: a view where there is one, since a sum would copy."""
    return grad[0] if grad.shape[0] == 1 else grad.sum(0)


def _positional(score: Score) -> list[Positional]:
    """The scores by distance that a score is made of; none if it has any other."""
    parts = score.scores if isinstance(score, Chain) else (score,)
    plain = [p for p in parts if isinstance(p, Positional) and type(p).bias is Positional.bias]
    return plain if len(plain) == len(parts) else []


def score_maps(score: Score | None, x: Operands, own: OwnGradients | None = None) -> ScoreMaps:
    """The maps of a call: with `own`, on the way there and back; else only there."""
    if score is None:
        return _Nothing()
    if _positional(score):
        return _Distances(score, own, x)
    return (_Biases if score.positional else ScoreMaps)(score, own)
