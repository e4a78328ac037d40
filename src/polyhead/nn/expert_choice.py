"""Which tokens every head chooses for itself, of a whole sequence or of what has come so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyhead.nn.best_so_far import ranks_of, thresholds
from polyhead.nn.routing import RouterLinear

__all__ = ["ExpertChoice"]


class ExpertChoice(nn.Module):
    """Every head chooses the tokens that it scores highest.

        s = sigmoid(W x);   I_e = the k tokens with the largest s_e,   k = max(2, ⌊T / ρ⌋)

    Args:
        dim: width of the inputs d.
        heads: E, heads that choose.
        sparsity: ρ.
        prefix: a token is chosen if it is among the k best when it comes, with T the tokens up to it; False:
            among the k best of the sequence, T long.
        include_first: the first token is chosen in any case, as one of the k.
        device, dtype: of the parameters.
    """

    acts_on = "heads"

    def __init__(
        self,
        dim: int,
        heads: int,
        sparsity: float,
        *,
        prefix: bool,
        include_first: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.heads, self.sparsity, self.prefix = heads, sparsity, prefix
        self.include_first = include_first
        self.score = RouterLinear(dim, heads, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The scores `(B, E, L)` of inputs `(B, L, d)`, in float32 or better."""
        return self.score(x).sigmoid().transpose(1, 2)

    @torch.no_grad()
    def choose(self, scores: Tensor, first: int, real: Tensor | None) -> Tensor:
        """Which of the tokens from `first` on are chosen.

        Args:
            scores: `(B, E, T)`, of all tokens so far; of equal ones the earlier is taken.
            first: the first token that is asked about.
            real: bool `(B, T)`, which tokens are no padding; None: all.

        Returns:
            bool `(B, E, T - first)`.
        """
        batch, heads, length = scores.shape
        there = scores.new_ones(batch, length, dtype=torch.bool) if real is None else real
        count = there.cumsum(1)
        if self.include_first:
            opening = there & (count == 1)
            scores = scores.masked_fill(opening[:, None], torch.inf)
        ranks = ranks_of(scores, there[:, None].expand_as(scores), later=False).flatten(0, 1)
        own = ranks[:, first:].view(batch, heads, length - first)
        tokens = count if self.prefix else count[:, -1:].expand_as(count)
        keep = (tokens / self.sparsity).floor().long().clamp(min=2)[:, None, first:]
        if self.prefix:
            least = thresholds(ranks, keep.expand(-1, heads, -1).flatten(0, 1), first).view_as(own)
            return own >= least
        whole = ranks.view(batch, heads, length)
        best = whole.topk(min(int(keep.max()), length), dim=-1).values
        least = best.gather(-1, keep[..., :1].clamp(max=best.shape[-1]).expand(-1, heads, -1) - 1)
        return (own >= least) & (own >= 0)

    def expected(self, tokens: int) -> int:
        """How many of so many tokens a head chooses; of a prefix, where they come in any order alike."""
        if not self.prefix:
            return min(tokens, max(2, int(tokens / self.sparsity)))
        return round(sum(min(1.0, max(2, int(n / self.sparsity)) / n) for n in range(1, tokens + 1)))

    def flops(self, tokens: int) -> int:
        """Operations for so many tokens."""
        return 2 * tokens * self.score.in_features * self.heads
