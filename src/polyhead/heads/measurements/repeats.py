"""Measurements on repeated random tokens: induction and duplicate-token heads.

In a sequence of random tokens, repeated, nothing but the repetition tells where to look: what a head gives
to the right places there is not owed to language.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.heads.inputs import Repeats
from polyhead.heads.measurement import RowMean, register
from polyhead.heads.rows import Rows

__all__ = ["DuplicateToken", "Induction"]


class _OnRepeats(RowMean):
    """The mean over rows whose token came before of the attention to some set of earlier tokens."""

    source: Repeats = Repeats()

    def targets(self, rows: Rows) -> Tensor:
        """Which keys are meant, bool `(b, 1, r, c)`."""
        raise NotImplementedError

    def of(self, rows: Rows) -> Tensor:
        return (rows.weights * self.targets(rows)).sum(-1)

    def where(self, rows: Rows) -> Tensor:
        ids = rows.ids
        earlier = torch.arange(ids.shape[-1], device=ids.device) < rows.i[:, None]
        came_before = ((ids[:, rows.i].unsqueeze(-1) == ids.unsqueeze(-2)) & earlier).any(-1)
        return rows.counted & came_before.unsqueeze(1)


@register
class Induction(_OnRepeats):
    """mean_t sum_{j in T(t)} w_tj, T(t) = {p + 1 : p < t, x_p = x_t}, over the tokens t that came before."""

    name = "induction"
    title = "induction (prefix matching)"
    meaning = (
        "on repeated random tokens, mean attention of a token to those that followed its earlier occurrences"
    )
    unit = "share"
    direction = "higher: looks at what came next last time"
    paper = "Olsson et al. 2022, In-context Learning and Induction Heads, arXiv 2209.11895"

    def targets(self, rows: Rows) -> Tensor:
        ids = rows.ids
        before = ids.roll(1, -1)[:, rows.j]  # x_{j-1}; what rolls in at j = 0 is excluded below
        same = ids[:, rows.i].unsqueeze(-1) == before.unsqueeze(-2)
        return (same & (rows.j >= 1) & (rows.j <= rows.i[:, None])).unsqueeze(1)


@register
class DuplicateToken(_OnRepeats):
    """mean_t sum_{j < t, x_j = x_t} w_tj over the tokens t that came before."""

    name = "duplicate_token"
    title = "attention to the same token"
    meaning = "on repeated random tokens, mean attention of a token to its earlier occurrences"
    unit = "share"
    direction = "higher: looks at the same token earlier on"
    paper = "Olsson et al. 2022, In-context Learning and Induction Heads, arXiv 2209.11895"

    def targets(self, rows: Rows) -> Tensor:
        ids = rows.ids
        same = ids[:, rows.i].unsqueeze(-1) == ids[:, rows.j].unsqueeze(-2)
        return (same & (rows.j < rows.i[:, None])).unsqueeze(1)
