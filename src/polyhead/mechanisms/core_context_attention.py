"""Core context attention: near tokens are read one by one, groups of earlier ones by one core token each.

    group i: the tokens s = i·g .. i·g + g - 1,   z_i = i·g + g - 1 the last of them
    c_is = softmax_s(q_{z_i}·k_s / √D),   k̃_i = Σ_s c_is k_s,   ṽ_i = Σ_s c_is v_s
    G(t) = max(0, ⌊(t + 1 - w) / g⌋)
    o_t = softmax([q_t·k̃_i / √D for i < G(t);  q_t·k_j / √D for G(t)·g <= j <= t]) [ṽ; v]

q: (B, H, L, D); k, v: (B, G', L, D), read by H/G' heads each; positions are turned before keys are averaged.
The core tokens k̃, ṽ are those of a query head, whose query weighs them. Every past token is read once, by
itself or in its group, in one softmax; at least the w nearest are read by themselves. With w tokens or fewer,
and with g = 1, it is `mha`, whose weights it takes over: there are no parameters besides.

A core token weighs as one token, so that a group of g alike weighs a g-th of what they would. `log_size=True`
adds log g to its score, and what is alike within groups is then read as full attention reads it.

Cost: L·(w + g + L/g) pairs are read; `cost` counts all pairs of tokens, as it does with masks. A cache holds
keys and values of some w + 2·g tokens, the queries of a group that is not complete, and for each group, which
is summed up once, a key and a value for every query head: H/g numbers where grouped-query attention has G'.

Paper 157: Core Context Aware Attention for Long Context Language Modeling, arXiv 2412.12465; the single
softmax of its official code, in place of two attentions that are fused. Our readings: groups are counted from
the first token of a row, padding or not; padding is in no core token, and the query of a group whose last
token is padding is that of zeros. `pool` takes means or largest features in place of weighed averages. Masks
other than the causal one are refused, and so is a context.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, given, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.own_scores import OwnScoresConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.block_summaries import BlockSummary, GuidedByLast, Pooled
from polyhead.nn.summarised import SummarisedAttention

__all__ = ["CoreContextAttention"]


class CoreTokensAttention(SummarisedAttention):
    """Causal attention to near tokens and to the core tokens of earlier groups."""

    called = "core_context_attention"
    past_only = "reads groups that are past"


@register(
    "core_context_attention",
    aliases=("cca_attention",),
    paper="157",
    title="Core Context Aware Attention for Long Context Language Modeling",
    family="hierarchical",
    summary="near tokens are read one by one, each group of earlier ones by one average of its own",
    equation=(
        "o_t = softmax([q_t·k̃_i for i < G(t); q_t·k_j for G(t)g ≤ j ≤ t] / √D) [ṽ; v];  "
        "k̃_i, ṽ_i = Σ_s softmax_s(q_{last of i}·k_s / √D) (k_s, v_s)"
    ),
    supports=frozenset({"causal_self"}),
    facets=Facets(levels="multi"),
    promises=Promises(any_mask=False),
)
class CoreContextAttention(OwnScoresConfig):
    """Core context attention; further options are those of `OwnScoresConfig`.

    Attributes:
        group: g, tokens of a core token.
        window: w, tokens that are read one by one at least, the query's own among them.
        pool: what a core token is, "query": averages that the last query weighs, "mean", or "max".
        log_size: add the logarithm of the real tokens of a group to the score of its core token.
    """

    group: int = 16
    window: int = 1024
    pool: str = "query"
    log_size: bool = False

    def __post_init__(self) -> None:
        for name in ("group", "window"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        if self.pool not in ("query", "mean", "max"):
            raise ConfigError(f'pool must be "query", "mean" or "max"; got {given(self.pool)}')
        flag("log_size", self.log_size)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> CoreTokensAttention:
        """The module."""
        summary: BlockSummary = GuidedByLast() if self.pool == "query" else Pooled(self.pool)
        module = partial(
            CoreTokensAttention, size=self.group, near=self.window, summary=summary, log_size=self.log_size
        )
        return self.assemble(module, device=device, dtype=dtype)
