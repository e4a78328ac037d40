"""Scores of all pairs by few numbers a token, learned for a sequence of known length.

    q'_i = W_Q q_i + b_Q,   k'_j = W_K k_j + b_K
    c_i  = softmax over the n columns m of (s · q'_i · Σ_j P_jm k'_j)
    A~_i = Σ_m c_im B_m

W_Q, W_K: (c, D), the same for all heads; P: (S, n), which sums the tokens up; B: (n, S), rows that every
query mixes. A~ stands for the weights of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.precision import exact
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.scorers import Scorer, Scores
from polyhead.checks import floating, given, number, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["LowRankScores", "low_rank_scores"]


class LowRankScores(Scorer):
    """A~ of a call. See `low_rank_scores`."""

    queries: Tensor
    keys: Tensor
    tokens: Tensor
    basis: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    scale: float | None = None
    least: float | None = None
    coefficients: int | None = None

    def __post_init__(self) -> None:
        floating("low_rank_scores: queries", self.queries, 2, "(c, D)")
        floating("low_rank_scores: keys", self.keys, 2, "(c, D)")
        floating("low_rank_scores: tokens", self.tokens, 2, "(S, n)")
        floating("low_rank_scores: basis", self.basis, 2, "(S, n)")
        if self.queries.shape != self.keys.shape or self.tokens.shape != self.basis.shape:
            raise ConfigError(
                "low_rank_scores: queries and keys must both be (c, D), tokens and basis both (S, n); got "
                + ", ".join(str(tuple(x.shape)) for x in (self.queries, self.keys, self.tokens, self.basis))
            )
        for name in ("query_bias", "key_bias"):
            bias = getattr(self, name)
            if bias is not None:
                floating(f"low_rank_scores: {name}", bias, 1, "(c,)")
                if len(bias) != len(self.queries):
                    raise ConfigError(
                        f"low_rank_scores: {name} must have {len(self.queries)} numbers; got {len(bias)}"
                    )
        for name in ("scale", "least"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(f"low_rank_scores: {name}", getattr(self, name)))
        if self.coefficients is not None:
            whole("low_rank_scores: coefficients", self.coefficients, 1)

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        if grid.rows != 1 or grid.cols != 1:
            raise ConfigError(
                "low_rank_scores: pairs are scored, of one query and one key; use rows=1, cols=1, got "
                f"rows={grid.rows}, cols={grid.cols}"
            )
        summed = grid.spread(self._summed(k, grid.real))
        basis = self.basis[: grid.keys].to(summed.dtype)
        if self.least is not None:
            size = basis.abs()
            basis = size.masked_fill(size <= self.least, 0.0)

        def scores(start: int, stop: int) -> Tensor:
            mixed = self._mixed(q[:, :, start:stop], summed)
            if self.coefficients is not None and self.coefficients < mixed.shape[-1]:
                best = mixed.topk(self.coefficients, dim=-1)
                mixed = torch.zeros_like(mixed).scatter_(-1, best.indices, best.values)
            return mixed @ basis.mT

        return scores

    def attention(self, q: Tensor, k: Tensor, real: Tensor | None = None) -> Tensor:
        """A~ `(B, H, L, S)` of a whole call, neither `least` nor `coefficients` being heeded; 0 at padding.

        What is to be brought near the weights of attention, with gradients for the tensors. It holds all
        pairs.

        Args:
            q, k: `(B, H, L, D)` and `(B, G, S, D)`.
            real: bool `(B or 1, S)`, which keys are no padding.
        """
        summed = self._summed(k, real).repeat_interleave(q.shape[1] // k.shape[1], 1)
        mixed = self._mixed(q, summed)
        with exact(q.device):
            found = mixed @ self.basis[: k.shape[2]].to(summed.dtype).mT
        return found if real is None else found.masked_fill(~real[:, None, None], 0.0)

    def _summed(self, k: Tensor, real: Tensor | None) -> Tensor:
        """Σ_j P_jm k'_j, `(B, G, n, c)`."""
        most, width = len(self.tokens), self.keys.shape[1]
        if k.shape[-1] != width:
            raise ShapeError(f"low_rank_scores: it reads keys {width} wide; those of the call are {given(k)}")
        if k.shape[2] > most:
            raise ShapeError(
                f"low_rank_scores: it knows the places of {most} tokens, and the call has {k.shape[2]}"
            )
        reduced = _mapped(k, self.keys, self.key_bias)
        if real is not None:
            reduced = reduced.masked_fill(~real[:, None, :, None], 0.0)
        with exact(k.device):
            return self.tokens[: k.shape[2]].to(reduced.dtype).mT @ reduced

    def _mixed(self, q: Tensor, summed: Tensor) -> Tensor:
        """c `(B, H, L, n)`."""
        scale = len(self.queries) ** -0.5 if self.scale is None else self.scale
        reduced = _mapped(q, self.queries, self.query_bias)
        with exact(q.device):
            return (reduced @ summed.mT * scale).softmax(-1)

    def flops(self, grid: Grid, width: int) -> int:
        """With all coefficients, as the products are run."""
        channels, rank = len(self.queries), self.tokens.shape[1]
        of_queries = grid.heads * grid.queries * (width * channels + channels * rank + rank * grid.keys)
        of_keys = grid.kv_heads * grid.keys * (width * channels + channels * rank)
        return 2 * grid.batch * (of_queries + of_keys)


def _mapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    with exact(x.device):
        found = x.to(kind) @ weight.to(kind).mT
    return found if bias is None else found + bias.to(kind)


def low_rank_scores(
    queries: Tensor,
    keys: Tensor,
    tokens: Tensor,
    basis: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    least: float | None = None,
    coefficients: int | None = None,
) -> Scorer:
    """A key is worth what A~, an attention map of rank n that was learned, says of the pair.

        A~_i = Σ_m softmax_m(s · (W_Q q_i + b_Q) · Σ_j P_jm (W_K k_j + b_K)) B_m

    For `rows=1, cols=1`, and for calls of at most S tokens: P and B belong to places. All keys have a part in
    A~, later ones too, so this is not for causal calls. Padding has none. It is worked out in float32 or
    better; c·D + c·n + n·S products a query.

    The predictor of paper 019, Sparsifiner, arXiv 2303.13755; the mechanism `sparsifiner` trains it.

    Args:
        queries, keys: W_Q and W_K, `(c, D)`.
        tokens: P `(S, n)`.
        basis: B transposed, `(S, n)`.
        query_bias, key_bias: b_Q and b_K `(c,)`; None: 0.
        scale: s; default 1/√c.
        least: take |B| for B, and 0 where it is not larger than this; None: B as it is.
        coefficients: so many of the n are kept for a query, the largest, and not made to sum to 1; None: all.
    """
    return LowRankScores(queries, keys, tokens, basis, query_bias, key_bias, scale, least, coefficients)
