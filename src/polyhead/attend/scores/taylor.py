"""Logits whose softmax is a normalised Taylor polynomial instead of an exponential."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.attend.scores.base import Score
from polyhead.attend.tile import Tile

__all__ = ["LogTaylor", "log_taylor"]


class LogTaylor(Score):
    """log(1 + s + s²/2): behind a softmax the weights are (1 + s + s²/2) over their sum.

    The polynomial is ((1 + s)² + 1) / 2, never below one half: every key that is seen has a weight.
    """

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return torch.log1p(torch.addcmul(scores, scores, scores, value=0.5))


def log_taylor() -> LogTaylor:
    """Weights by the second Taylor polynomial of the exponential: put it last, before a softmax."""
    return LogTaylor()
