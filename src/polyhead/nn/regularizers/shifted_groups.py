"""Shifted groups: in training heads attend within groups of tokens, some within groups that are shifted.

    most heads      i sees j  if  ⌊i/g⌋ = ⌊j/g⌋                  or  j < s
    shifted heads   i sees j  if  ⌊(i - g/2)/g⌋ = ⌊(j - g/2)/g⌋  or  j < s

and in all of it only what the mask of the call lets it see. Of H heads the second half would be shifted; a
share `returned` of them is not. The first s tokens, on which attention parks itself, are seen by all. There
are no parameters, and evaluation is attention to everything: a model is tuned on long texts so, at
O(L·(g + s)) a head, and read as it was.

Papers: SinkLoRA, arXiv 2406.05678, whose code of this part is not public; what it starts from, with
`returned=0` and `sinks=0`, is S2-Attn of LongLoRA, arXiv 2309.12307. Our readings: heads are returned from
the first on; s = 4; shifted groups do not wrap, so the first has g/2 tokens. In LongLoRA the last half group
and the first are one, in which the first tokens see the last ones: causal attention is not causal there.
Cross-attention and calls with a cache are left alone.
"""

from __future__ import annotations

import math

from polyhead.attend.masks import Mask, blocks, per_head, sink
from polyhead.checks import number, whole
from polyhead.nn.regularizers.base import Regularizer

__all__ = ["ShiftedGroups", "shifted_groups"]


class ShiftedGroups(Regularizer):
    """Heads attend within groups of `group` tokens, some of them within shifted ones: see the module."""

    group: int | None = None
    returned: float = 0.5
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.group is not None:
            whole("shifted_groups: group", self.group, 1)
        object.__setattr__(
            self, "returned", number("shifted_groups: returned", self.returned, least=0, most=1)
        )
        whole("shifted_groups: sinks", self.sinks, 0)

    def pattern(self, heads: int, length: int) -> Mask:
        """Who looks at whom in a call of so many heads and tokens."""
        size = max(1, -(-length // 4)) if self.group is None else self.group
        # rounded up, so that some heads are shifted unless all are returned; by 9 digits, not by an error
        shifted = math.ceil(round(heads // 2 * (1 - self.returned), 9))
        masks = [blocks(size)] * (heads - shifted) + [blocks(size, size // 2)] * shifted
        return per_head([own | sink(self.sinks) if self.sinks else own for own in masks])

    def narrow(self, mask: Mask | None, *, heads: int, length: int, **call: object) -> Mask | None:
        own = self.pattern(heads, length)
        return own if mask is None else mask & own


def shifted_groups(group: int | None = None, *, returned: float = 0.5, sinks: int = 4) -> ShiftedGroups:
    """In training, attend within groups of tokens, in some heads within shifted ones, and to first tokens.

    Args:
        group: g, tokens of a group; None: a quarter of the call.
        returned: the share of the second half of the heads whose groups are not shifted.
        sinks: s, the first tokens, which all see.
    """
    return ShiftedGroups(group, returned, sinks)
