"""Maps of logits or weights on the way there and back, strip by strip.

A map may overwrite what it is given, unless it needs that on the way back: every stage keeps what it was
given itself, and hands on memory that nobody else needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from polyhead.attend.across_heads import AcrossHeads
from polyhead.attend.across_pairs import PairConvolution, parts_of
from polyhead.attend.scores import Score
from polyhead.attend.stream import OwnGradients, trainable
from polyhead.attend.strip_work import Operands, StripWork
from polyhead.attend.weight_maps import WeightMap, same_shape

__all__ = ["ClosedForm", "Convolved", "InTurn", "Stage", "weight_stage"]


class Stage:
    """Any map: applied to a strip, and differentiated by autograd where that is asked for.

    Attributes:
        may_hide: whether the map might put -inf where the mask allows a pair.
    """

    may_hide = True

    def __init__(self, part: Score | WeightMap, own: OwnGradients | None) -> None:
        self.part, self.own = part, own
        self.leaves = () if own is None else trainable(part)

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        """The mapped numbers, which may be overwritten, as may `raw`."""
        if self.own is not None:
            with torch.enable_grad():
                self.source = raw.detach().requires_grad_()
                self.result = same_shape(self.part, self.part.apply(self.source, work.tile), raw)
            return self.result.detach().clone(memory_format=torch.contiguous_format)
        mapped = same_shape(self.part, self.part.apply(raw, work.tile), raw)
        # the mask is written in place, which must not reach a tensor of the caller's
        return mapped.clone() if mapped is raw or not mapped.is_contiguous() else mapped

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        """The gradient for the raw numbers; those for the maps' own tensors are added to the totals."""
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


class ClosedForm(Stage):
    """A map that knows its own gradient. `name` is that of its memory, one for every such stage."""

    may_hide = False

    def __init__(self, part: AcrossHeads, own: OwnGradients | None, x: Operands, name: str) -> None:
        self.closed, self.x, self.name = part, x, name
        self.totals = tuple(None if own is None else own.total(t) for t in part.tensors())

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        self.raw = raw
        return self.closed.mapped(raw, work.tile, self.x.buffer(self.name, work.shape))

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        # what was handed on has been used up: its memory takes the gradient
        out = self.x.buffer(self.name, work.shape)
        return self.closed.vjp(self.raw, grad, work.tile, out, self.totals)


class Convolved(Stage):
    """A convolution over neighbouring pairs; forbidden ones are put to 0, of `weights` behind it, too."""

    may_hide = False

    def __init__(self, part: PairConvolution, own: OwnGradients | None, *, weights: bool) -> None:
        self.convolution, self.weights = part, weights
        self.total = None if own is None else own.total(part.kernel)

    def _by_run(self, work: StripWork) -> Iterator[slice]:
        """The strip's columns, run by run: what stands between two runs is forbidden, so 0."""
        start = 0
        for run in work.strip.runs:
            yield slice(start, start + run.stop - run.start)
            start += run.stop - run.start

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        self.raw = work.clear(raw)
        kernel = self.convolution.heads(raw, work.tile)
        made = self._joined([self.convolution.mapped(raw[..., s], kernel) for s in self._by_run(work)])
        return work.clear(made) if self.weights else made

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        if self.weights:
            grad = work.clear(grad)
        kernel, heads = self.convolution.heads(grad, work.tile), work.tile.head_slice
        if self.total is not None:
            for s in self._by_run(work):
                self.total[heads] += self.convolution.kernel_gradient(self.raw[..., s], grad[..., s])
        runs = [self.convolution.transposed(grad[..., s], kernel) for s in self._by_run(work)]
        return work.clear(self._joined(runs))


class InTurn(Stage):
    """Stages one after another."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.may_hide = any(stage.may_hide for stage in stages)

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        for stage in self.stages:
            raw = stage.there(raw, work)
        return raw

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        for stage in reversed(self.stages):
            grad = stage.back(grad, work)
        return grad

    def done(self) -> None:
        for stage in self.stages:
            stage.done()


class _Cleared(InTurn):
    """Maps of weights, after which forbidden pairs are put to zero again."""

    def __init__(self, stages: Sequence[Stage], keeps_zeros: bool) -> None:
        super().__init__(stages)
        self.keeps_zeros = keeps_zeros

    def _clear(self, weights: Tensor, work: StripWork) -> Tensor:
        # where all heads are forbidden the same pairs, those had no weight to bring in
        if self.keeps_zeros and (work.forbidden is None or work.forbidden.shape[1] == 1):
            return weights
        return work.clear(weights)

    def there(self, raw: Tensor, work: StripWork) -> Tensor:
        return self._clear(super().there(raw, work), work)

    def back(self, grad: Tensor, work: StripWork) -> Tensor:
        return super().back(self._clear(grad, work), work)


def weight_stage(part: WeightMap | None, x: Operands, own: OwnGradients | None = None) -> Stage | None:
    """The weight maps of a call: with `own`, on the way there and back; else only there."""
    if part is None:
        return None
    stages: list[Stage] = []
    for n, one in enumerate(parts_of(part)):
        if isinstance(one, AcrossHeads):
            stages.append(ClosedForm(one, own, x, f"weights {n}"))
        elif isinstance(one, PairConvolution):
            stages.append(Convolved(one, own, weights=True))
        else:
            stages.append(Stage(one, own))
    return _Cleared(stages, part.keeps_zeros)
