"""The dense backend: any combination, any dtype, plain torch operations in the order of the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.across_pairs import PairConvolution, parts_of
from polyhead.attend.masks import densify
from polyhead.attend.normalizers import Softmax
from polyhead.attend.plan import Request
from polyhead.attend.precision import exact, wide
from polyhead.attend.tile import Tile
from polyhead.attend.weight_maps import same_shape

__all__ = ["Reference", "dense_weights"]


class Reference:
    """Holds all B·H·L·S scores: the truth that the other backends are held against."""

    name = "reference"
    dense = True
    opt_in = ""

    def refuse(self, request: Request) -> str:
        if request.want_lse and not isinstance(request.problem.normalizer, Softmax):
            return f"return_lse is defined for softmax only, not for {request.problem.normalizer}"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        with exact(request.q.device):
            return self._run(request)

    def _run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        q, v, problem = request.q, request.v, request.problem
        weights, lse = dense_weights(request)
        v = v.to(weights.dtype).repeat_interleave(q.shape[1] // max(v.shape[1], 1), dim=1)
        weights = torch.dropout(weights, problem.dropout, train=problem.dropout > 0)
        return (weights @ v).to(q.dtype), lse


def dense_weights(request: Request) -> tuple[Tensor, Tensor | None]:
    """The weights `(B, H, L, S)` before dropout, and if wanted the log-sum-exp `(B, H, L)`."""
    q, k, problem = request.q, request.k, request.problem
    batch, heads, queries, _ = q.shape
    keys, repeat = k.shape[2], heads // max(k.shape[1], 1)
    dtype = wide(q.dtype)
    k = k.to(dtype).repeat_interleave(repeat, dim=1)
    scores = q.to(dtype) * problem.scale @ k.transpose(-1, -2)
    tile = Tile(
        batch,
        heads,
        torch.arange(queries, device=q.device) + keys - queries,
        torch.arange(keys, device=q.device),
        consecutive=True,
    )
    allowed = None
    if problem.mask is not None:
        allowed = densify(problem.mask, batch=batch, heads=heads, queries=queries, keys=keys, device=q.device)
    for one in parts_of(problem.score):
        if isinstance(one, PairConvolution):
            scores = one.mapped(_cleared(scores, allowed), one.heads(scores, tile))
        else:
            scores = one.apply(scores, tile)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    lse = None
    if request.want_lse:
        assert isinstance(problem.normalizer, Softmax)
        lse = problem.normalizer.lse(scores)
    weights = problem.normalizer(scores)
    for part in parts_of(problem.weight_map):
        if isinstance(part, PairConvolution):
            weights = _cleared(weights, allowed)
            weights = _cleared(part.mapped(weights, part.heads(weights, tile)), allowed)
        else:
            weights = same_shape(part, part.apply(weights, tile), weights)
    return weights if problem.weight_map is None else _cleared(weights, allowed), lse


def _cleared(x: Tensor, allowed: Tensor | None) -> Tensor:
    return x if allowed is None else x.masked_fill(~allowed, 0.0)
