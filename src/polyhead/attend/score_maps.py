"""The score maps of a call on the way there and back, strip by strip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from polyhead.attend.across_heads import AcrossHeads
from polyhead.attend.across_pairs import PairConvolution
from polyhead.attend.map_stages import ClosedForm, Convolved, InTurn, Stage
from polyhead.attend.scores import Chain, Positional, Score
from polyhead.attend.scores.base import heads_of
from polyhead.attend.stream import OwnGradients
from polyhead.attend.strip_work import Operands, StripWork
from polyhead.attend.toeplitz import diagonal_sums, expand_diagonals

__all__ = ["score_maps"]

_ALONE = (AcrossHeads, PairConvolution)


class _Biases(Stage):
    """Maps that only add a bias: what comes in goes on as it is."""

    may_hide = False
    part: Score

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        with torch.set_grad_enabled(bool(self.leaves)):
            self.bias = self.part.bias(work.tile, raw.dtype)
        return raw if self.bias is None else raw.add_(self.bias.detach())

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        if self.bias is not None and self.bias.requires_grad:
            down = over_batch(grad).sum_to_size(self.bias.shape)
            self._collect(torch.autograd.grad(self.bias, self.leaves, down, allow_unused=True))
        return grad


class _Distances(Stage):
    """Biases by distance: all L + S - 1 values are asked for once, and every strip is made of them."""

    may_hide = False

    def __init__(self, score: Score, own: OwnGradients | None, x: Operands) -> None:
        super().__init__(score, own)
        self.x, self.keys = x, x.frame.keys
        # from the most distant key behind to the most distant one ahead, as columns go
        count = max(self.keys + x.frame.queries - 1, 0)
        distance = self.keys - 1 - torch.arange(count, device=x.frame.device)
        with torch.set_grad_enabled(bool(self.leaves)):
            values = [one.at(distance).to(x.v.dtype) for one in _positional(score)]
            self.values = torch.stack(torch.broadcast_tensors(*values)).sum(0) if values[1:] else values[0]
        self.detached = self.values.detach()
        self.total = torch.zeros_like(self.detached) if self.leaves else None

    def _runs(self, work: StripWork) -> Iterator[tuple[slice, slice]]:
        """For each run of columns: the diagonals that it has, and its columns in the strip."""
        strip, start = work.strip, 0
        rows = strip.r1 - strip.r0
        for run in strip.runs:
            columns = run.stop - run.start
            first = self.keys - 1 - (self.x.frame.offset + strip.r1 - 1) + run.start
            yield slice(first, first + rows + columns - 1), slice(start, start + columns)
            start += columns

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        rows = work.shape[2]
        for diagonals, columns in self._runs(work):
            values = heads_of(self.part, self.detached, work.tile)[:, diagonals]
            size = (values.shape[0], rows, values.shape[1])
            bias = expand_diagonals(values, rows, self.x.buffer("bias", size))
            raw[..., columns].add_(bias)
        return raw

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        if self.total is not None:
            heads = work.tile.head_slice if self.total.shape[0] > 1 else slice(0, 1)
            down = over_batch(grad)
            for diagonals, columns in self._runs(work):
                sums = diagonal_sums(down[..., columns], room=partial(self.x.buffer, "diagonals"))
                target = self.total[heads, diagonals]
                target += sums.sum_to_size(target.shape)
        return grad

    def done(self) -> None:
        if self.total is not None and self.values.requires_grad:
            self._collect(torch.autograd.grad(self.values, self.leaves, self.total, allow_unused=True))


class _Nothing(Stage):
    """No maps."""

    may_hide = False

    def __init__(self) -> None:
        """Nothing to hold."""

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        return raw

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        return grad


def over_batch(grad: Tensor) -> Tensor:
    """(b, h, r, c) summed over b: a view where there is one, since a sum would copy."""
    return grad[0] if grad.shape[0] == 1 else grad.sum(0)


def _positional(score: Score) -> list[Positional]:
    """The scores by distance that a score is made of; none if it has any other."""
    parts = score.scores if isinstance(score, Chain) else (score,)
    plain = [p for p in parts if isinstance(p, Positional) and type(p).bias is Positional.bias]
    return plain if len(plain) == len(parts) else []


def score_maps(score: Score | None, x: Operands, own: OwnGradients | None = None) -> Stage:
    """The maps of a call: with `own`, on the way there and back; else only there."""
    if score is None:
        return _Nothing()
    if isinstance(score, AcrossHeads):
        return ClosedForm(score, own, x, "scores 0")
    if isinstance(score, PairConvolution):
        return Convolved(score, own, weights=False)
    if _positional(score):
        return _Distances(score, own, x)
    if isinstance(score, Chain) and any(isinstance(one, _ALONE) for one in score.scores):
        return InTurn(_stages(score, x, own))
    return (_Biases if score.positional else Stage)(score, own)


def _stages(score: Chain, x: Operands, own: OwnGradients | None) -> list[Stage]:
    """Each map across heads or pairs by itself, the other maps before, between and behind them together."""
    stages: list[Stage] = []
    for alone, run in groupby(score.scores, lambda one: isinstance(one, _ALONE)):
        parts = tuple(run)
        if alone:
            for one in parts:
                if isinstance(one, PairConvolution):
                    stages.append(Convolved(one, own, weights=False))
                else:
                    stages.append(ClosedForm(one, own, x, f"scores {len(stages)}"))  # type: ignore[arg-type]
        else:
            stages.append(score_maps(parts[0] if len(parts) == 1 else Chain(parts), x, own))
    return stages
