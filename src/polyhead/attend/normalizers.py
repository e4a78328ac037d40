"""Normalisers: how the logits of a row become weights.

A `Normalizer` sees whole rows, `(B, H, r, c)` with all visible keys of each row and -inf at forbidden pairs.
Its backward is in closed form from the weights alone, so nothing but the weights of one strip is held.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polyhead.attend.entmax import as_rows, check_alpha
from polyhead.attend.entmax_rows import entmax_, entmax_alpha_vjp, entmax_vjp_
from polyhead.attend.precision import wide
from polyhead.checks import number_or_heads
from polyhead.description import Part
from polyhead.errors import ConfigError, PolyheadError

__all__ = ["Entmax", "Normalizer", "Sigmoid", "Softmax", "entmax", "sigmoid", "softmax", "sparsemax"]


class Normalizer(Part):
    """A map from rows of logits to rows of weights."""

    def weights(self, scores: Tensor) -> Tensor:
        """The weights of whole rows; exactly 0 where `scores` is -inf. May overwrite `scores`.

        A row of only -inf has no defined weights: what stands there is for the caller to zero.
        """
        raise NotImplementedError

    def vjp(self, weights: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradient for the scores, and those for the tensors of this part in the order of `flatten`.

        Args:
            weights: what `weights` returned, rows of only -inf zeroed.
            grad: the gradient for the weights; may be overwritten.
        """
        raise NotImplementedError

    def __call__(self, scores: Tensor) -> Tensor:
        """The weights under autograd: `scores` is kept as it is, rows of only -inf give zeros."""
        spec, tensors = self.flatten()
        return _Rows.apply(spec, scores, *tensors)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(spec: Normalizer, scores: Tensor, *tensors: Tensor) -> Tensor:
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        return spec.unflatten(tensors).weights(scores.clone()).masked_fill(nothing, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            raise PolyheadError(
                f"{ctx.spec} can be differentiated once only; leave create_graph=True out, or use softmax()"
            )
        weights, *tensors = ctx.saved_tensors
        for_scores, own = ctx.spec.unflatten(tuple(tensors)).vjp(weights, grad.clone())
        return (None, for_scores, *own)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], spec: Normalizer, scores: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[2:]):
            raise ConfigError(f"torch.func.vmap over the tensors of {spec} is not supported; vmap q, k and v")
        many = scores.movedim(in_dims[1], 0)
        return _Rows.apply(spec, many.flatten(0, 1), *tensors).unflatten(0, many.shape[:2]), 0


def _per_head(part: Normalizer, name: str) -> None:
    """Check a field that is None, a number, or a tensor `(H,)`; a number becomes a float."""
    value = getattr(part, name)
    if value is not None:
        object.__setattr__(part, name, number_or_heads(name, value))


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or `(H,)` as a tensor that broadcasts against `(B, H, r, 1)`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _to_heads(grad: Tensor, like: Tensor) -> Tensor:
    """`(B, H, r, 1)` summed to the `(H,)` or `(1,)` of a head-wise tensor."""
    return grad.sum((0, 2, 3)).sum_to_size(like.shape).to(like.dtype)


class Softmax(Normalizer):
    """w_j = exp(s_j) / (exp(sink) + sum_k exp(s_k)), without the sink term when `sink` is None."""

    sink: Tensor | float | None = None

    def __post_init__(self) -> None:
        _per_head(self, "sink")

    def weights(self, scores: Tensor) -> Tensor:
        if self.sink is None:
            return torch.softmax(scores, -1, out=scores)
        if scores.shape[-1] == 0:
            return scores
        sink = _column(self.sink, scores)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        scores = scores.sub_(top).exp_()
        return scores.div_(scores.sum(-1, keepdim=True).add_((sink - top).exp_()))

    def vjp(self, weights: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not isinstance(self.sink, Tensor):  # one pass; rows need not sum to 1 for it
            vjp = torch.ops.aten._softmax_backward_data.out
            return vjp(grad, weights, -1, grad.dtype, grad_input=grad), ()
        grad = grad.mul_(weights)
        inner = grad.sum(-1, keepdim=True)
        taken = 1 - weights.sum(-1, keepdim=True)
        return grad.addcmul_(weights, inner, value=-1), (_to_heads(-taken * inner, self.sink),)

    def __call__(self, scores: Tensor) -> Tensor:
        # in torch's own operations, so that it can be differentiated any number of times
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        safe = scores.masked_fill(nothing, 0.0)
        weights = torch.softmax(safe, -1)
        if self.sink is not None:
            weights = weights * torch.sigmoid(
                torch.logsumexp(safe, -1, keepdim=True) - _column(self.sink, scores)
            )
        return weights.masked_fill(nothing, 0.0)

    def lse(self, scores: Tensor) -> Tensor:
        """The logarithm of each row's denominator, `(B, H, r)`, the sink's term included."""
        lse = torch.logsumexp(scores, -1)
        if self.sink is None:
            return lse
        return torch.logaddexp(lse, _column(self.sink, scores).squeeze(-1))

    def weights_and_lse(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """`weights` and `lse`. May overwrite `scores`."""
        if self.sink is not None or scores.shape[-1] == 0:
            lse = self.lse(scores)
            return self.weights(scores), lse
        # the largest weight is exp(top - lse), at least one over the row's length: no exponentials anew
        top = scores.amax(-1)
        weights = self.weights(scores)
        return weights, torch.where(top.isfinite(), top - weights.amax(-1).log(), top)

    def lse_vjp(self, weights: Tensor, grad: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`own`, the gradients of this part's tensors, with the share added that comes through `lse`.

        Args:
            grad: the gradient for `lse`, `(B, H, r, 1)`. That for the scores is `weights * grad`.
        """
        if not isinstance(self.sink, Tensor):
            return own
        taken = 1 - weights.sum(-1, keepdim=True)
        return (own[0] + _to_heads(taken * grad, self.sink),)


def softmax(*, sink: Tensor | float | None = None) -> Softmax:
    """Softmax over the visible keys of a row.

    Args:
        sink: a logit that joins the denominator only, for all heads or `(H,)` for one a head (learned if
            it requires gradient): a row can then give less than 1 in sum, as in GPT-OSS. `sink=0.0` is
            "softmax plus one". Default None: rows sum to 1.
    """
    return Softmax(sink)


class Sigmoid(Normalizer):
    """w_j = 1 / (1 + exp(-(s_j + bias)))."""

    bias: Tensor | float | None = None

    def __post_init__(self) -> None:
        _per_head(self, "bias")

    def weights(self, scores: Tensor) -> Tensor:
        if self.bias is not None:
            scores = scores.add_(_column(self.bias, scores))
        return scores.sigmoid_()

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores if self.bias is None else scores + _column(self.bias, scores))

    def vjp(self, weights: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        grad = torch.addcmul(weights, weights, weights, value=-1).mul_(grad)
        own = (_to_heads(grad, self.bias),) if isinstance(self.bias, Tensor) else ()
        return grad, own


def sigmoid(*, bias: Tensor | float | None = None) -> Sigmoid:
    """Sigmoid attention: each key is weighted by itself, rows need not sum to 1.

    Args:
        bias: added to every logit, a number or `(H,)`. Default None, which is 0. Ramapuram et al., "Theory,
            Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431, set it to
            `-math.log(S)` for sequences of length S, so that the sum of a row starts near 1.
    """
    return Sigmoid(bias)


class Entmax(Normalizer):
    """w_j = ((alpha - 1) s_j - tau)_+^(1 / (alpha - 1)) with tau such that a row sums to 1."""

    alpha: Tensor | float = 1.5

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        _per_head(self, "alpha")

    def _rows(self, scores: Tensor) -> float | Tensor:
        if not isinstance(self.alpha, Tensor):
            return self.alpha
        alpha = self.alpha.to(scores.device, wide(scores.dtype)).view(-1, 1, 1)
        return alpha.expand(*scores.shape[:-1], 1).reshape(-1, 1)

    def weights(self, scores: Tensor) -> Tensor:
        rows = as_rows(scores.to(wide(scores.dtype)))
        return entmax_(rows, self._rows(scores)).view(scores.shape).to(scores.dtype)

    def vjp(self, weights: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        dtype, shape = wide(weights.dtype), weights.shape
        w, g = (as_rows(x.to(dtype)) for x in (weights, grad))
        alpha = self._rows(weights)
        own: tuple[Tensor, ...] = ()
        if isinstance(self.alpha, Tensor):
            own = (_to_heads(entmax_alpha_vjp(w, g, alpha).view(*shape[:-1], 1), self.alpha),)
        return entmax_vjp_(w, g, alpha).view(shape).to(grad.dtype), own


def entmax(alpha: Tensor | float = 1.5) -> Entmax:
    """α-entmax: like softmax, but low scores get a weight of exactly 0 (`polyhead.attend.entmax`).

    Args:
        alpha: in (1, 2]: towards 1 it nears softmax, 2 is `sparsemax()`; a number, or `(H,)` for one a head,
            learned if it requires gradient. Adaptively sparse attention (Correia et al., arXiv 1909.00015)
            learns `alpha = 1 + torch.sigmoid(a)`. Default 1.5, which is also the fastest.
    """
    return Entmax(alpha)


def sparsemax() -> Entmax:
    """Sparsemax, the Euclidean projection of a row onto the probability simplex: `entmax(2.0)`.

    Martins and Astudillo, "From Softmax to Sparsemax", arXiv 1602.02068.
    """
    return Entmax(2.0)
