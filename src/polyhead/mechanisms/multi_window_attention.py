"""Multi-window attention: every head has a window size of its own, from a few tokens to all of them.

    head_h = softmax over the j in i's window of (q_i · k_j / √D + r_h[j - i]) v_j,   ⌊i/w_h⌋ = ⌊j/w_h⌋
    heads with w_h = 0 attend to everything and have no bias;   y = concat_h(head_h) W_O

Windows do not overlap, and all layers have the same list, so that every layer sees near and far at once.
r_h: 2 w_h - 1 learned numbers, truncated normal with deviation 0.02; leave them out of weight decay. The last
window is shorter where w_h does not divide the length. With all windows 0 it is `grouped_query`.

Cost: the parameters of grouped-query attention and Σ_h (2 w_h - 1); a head reads w_h keys a query. `cost`
counts all pairs, as it does with masks. Causal calls attend within the same windows to what is past.

Paper 143: Masked Autoencoders with Multi-Window Local-Global Attention Are Better Audio Learners, arXiv
2306.00561. There the windows are the divisors of the length but 1 and itself, and heads that are left are
global: (2, 5, 10, 25, 50, 125, 0, 0) for 250 patches. A module does not know the length: by default the last
quarter of the heads, at least one, is global, and the others have 2, 4, 8, ... up to 128. A class token would
be one of the first window: leave it out, as the paper's decoder does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from polyhead.attend.masks import Mask, blocks, per_head, window
from polyhead.attend.scores import WindowBias, chain, window_bias
from polyhead.attend.scores.window import window_offsets
from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.registry import register
from polyhead.nn.patterned import PatternedAttention
from polyhead.nn.projections import at_least_one

__all__ = ["MultiWindow"]


@register(
    "multi_window_attention",
    aliases=("mw_attention",),
    paper="143",
    title="Masked Autoencoders with Multi-Window Local-Global Attention Are Better Audio Learners",
    family="sparse",
    summary="every head attends within windows of a size of its own, some to everything, with a learned bias",
    equation="head_h = Σ_j softmax_j(q_i·k_j / √D + r_h[j - i]) v_j over j with ⌊i/w_h⌋ = ⌊j/w_h⌋",
    supports=frozenset({"self", "causal_self"}),
)
class MultiWindow(GroupedConfig):
    """Attention with a window size for every head.

    Attributes:
        windows: w_h of every head, 0 for a head that sees everything; default as the module says.
    """

    windows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        at_least_one("MultiWindow", heads=self.heads)
        without_context(self)
        found = self.windows
        if found is None:
            near = self.heads - max(1, self.heads // 4)
            found = tuple(min(2 << n, 128) for n in range(near)) + (0,) * (self.heads - near)
        if not several(found) or len(found) != self.heads:
            raise ConfigError(
                f"windows must have a size for each of the {self.heads} heads, 0 where it sees all; got "
                f"{given(self.windows)}"
            )
        object.__setattr__(self, "windows", tuple(whole("windows", n, 0, 1 << 20) for n in found))
        super().__post_init__()

    def pattern(self) -> Mask:
        """Who looks at whom, head by head."""
        assert self.windows is not None
        return per_head([blocks(n) if n else window(None, None) for n in self.windows])

    def build(self, *, device: Any = None, dtype: Any = None) -> PatternedAttention:
        """The module."""
        module = partial(PatternedAttention, pattern=self.pattern(), name="multi_window_attention")
        bias = self._bias(device)

        def assembled(*parts: Any, **options: Any) -> PatternedAttention:
            if bias is not None:
                own = options["score"]
                options["score"] = chain(bias if own is None else (bias, chain(own)))  # type: ignore[arg-type]
            return module(*parts, **options)

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=assembled
        )

    def _bias(self, device: Any) -> WindowBias | None:
        """The learned bias, freshly drawn; None where all heads are global."""
        assert self.windows is not None
        own = [(n,) if n else () for n in self.windows]
        if not any(own):
            return None
        table = torch.empty(sum(map(window_offsets, own)), device=device)
        return window_bias(nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04).requires_grad_(), own)
