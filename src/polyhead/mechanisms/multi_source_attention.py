"""Attention to several sources at once: languages, an image and a text, two views of one sequence.

    c^k = attend(x W_Q^k, h^k W_K^k, h^k W_V^k),  k = 1..K
    hierarchical:  y = Σ_k β^k c̃^k W_V' W_O',   β = softmax_k((x W_Q')·(c̃^k W_K') / √D),  c̃^k = c^k W_O^k
    flat:          one softmax over the tokens of all sources, W_Q^k = W_Q:  y = (Σ_k P(k) c^k) W_O
    concat:        y = [c^1; ...; c^K] W_c

With `sentinel` a token may also look at itself, behind a gate, s = σ(x W_ψ) ⊗ x:

    hierarchical:  one more context, c̃^{K+1} = s W_O^{K+1}
    flat:          one more key s W_K^{K+1} and value s W_V^{K+1}, which this query alone sees

h^k: (B, S_k, ·). Each source has projections of its own. In the flat one P(k), the weight of a source as a
whole, is the softmax of the log-sum-exps of the sources' logits: so every source is attended to by itself, by
whatever backend is fastest, and nothing is copied side by side: the sentinel's logit is one more of these
log-sum-exps. `source_shares` gives β or P, (B, H, L, K), or K + 1 with the sentinel's share as the last.

`context` is a tuple of K tensors with `padding` a tuple too, or one tensor that all sources read, or nothing:
then all read x. A source of which a token sees nothing has no part in it: P(k) = 0, and β is the softmax of
the others. With one source, flat is multi-head attention.

No mask and no padding hides the sentinel: a token that sees nothing of any source gets it alone, where
without one it gets zeros.

Cost: K times the keys, values and their cache; flat 2·d² + 2·K·d² parameters with G = H, concat (4·K)·d²,
hierarchical 4·(K + 1)·d². A sentinel takes 3·d² more in flat, 2·d² in hierarchical, and nothing in a cache:
it is made of the tokens of the call. Flat makes the queries anew for every source, and for the sentinel.

Paper 140: Attention Strategies for Multi-Source Sequence-to-Sequence Learning, arXiv 1704.06567. It is for
recurrent decoders with additive scores; here scores are those of multi-head attention. Attending in parallel
and adding up is concat, its matrix in blocks; one source after the other is a stack of layers. That a source
without visible tokens drops out of β is our reading. Losses of weights, such as `attention_diversification`,
are of every source by itself, in flat of all tokens together.

Readings of ours about the sentinel. The paper's gate reads the decoder's previous state and its input word,
σ(W_ψ [s_{t-1}; y_t]), and its sentinel is the gated state: a transformer has but the token, so x stands for
all of them. In flat the sentinel stands nowhere, since where a query stands differs from source to source:
its logit is q·k / √D with q = x W_Q, without the position encoding and without maps of scores. Concat refuses
it: no weights are there of which a sentinel could have one. Dropout of weights, and what acts on the outputs
of heads, such as `drop_head`, act on it in flat, as on the tokens of a source; in hierarchical on the sources
alone. Losses of weights leave its weight out, since no two tokens look at the same sentinel: in flat the rows
that they read sum to the sources' share.
"""

from __future__ import annotations

from typing import Any

from polyhead.attend.normalizers import softmax
from polyhead.checks import flag, given, several
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import AttentionConfig, key_value_heads
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.flow import Flow, Step
from polyhead.mechanisms.registry import register
from polyhead.nn.multi_source import (
    Concatenated,
    Flat,
    Hierarchical,
    MultiSourceAttention,
    SourceAttention,
    SourceHeads,
    SourceOutput,
)
from polyhead.nn.projections import FanInLinear, OutputProjection, Projection, at_least_one
from polyhead.nn.sentinel import SentinelContext, SentinelKey

__all__ = ["MultiSource"]

_PICTURE = Flow(
    (Step("x", "(L, d)"), Step("projection", "query: H heads, for every source"), Step("position")),
    (
        Step("c", "K contexts (S_k, d_k), or one for all, or x"),
        Step("projection", "key, value: G heads, for every source"),
        Step("position"),
        Step("cache", "keys and values of every source"),
    ),
    (
        Step("scores", "q·k / √D: H maps of L × S_k for every source"),
        Step("mask", "that of the call, padding of every source"),
        Step("normaliser", "softmax, in every source or over all"),
        Step("values", "weights · v: K contexts"),
        Step("sources", "attention to the K contexts; or their sum by their weight; or side by side"),
        Step("output", "heads → d"),
        Step("y", "(L, d)"),
    ),
)
_MODES = ("hierarchical", "flat", "concat")


@register(
    "multi_source_attention",
    aliases=("multi_source",),
    paper="140",
    title="Attention Strategies for Multi-Source Sequence-to-Sequence Learning",
    family="sources",
    summary="several sources, attended to one by one, and their contexts attended to in turn, or as one",
    equation="c^k = MHA_k(x, h^k);  y = Σ_k β^k c^k W_V' W_O',  β = softmax_k((x W_Q')·(c^k W_K') / √D)",
    facets=Facets(levels="multi", alignment="scaled_dot", distribution="softmax"),
    picture=_PICTURE,
)
class MultiSource(AttentionConfig):
    """Multi-source attention.

    Attributes:
        sources: K.
        mode: "hierarchical", "flat" or "concat".
        kv_heads: key/value heads G of every source, a divisor of `heads`; default `heads`.
        context_dims: width of every source; default `context_dim` for all.
        sentinel: whether a token may look at itself, behind a gate, beside all sources; not in "concat".
    """

    sources: int = 2
    mode: str = "hierarchical"
    kv_heads: int | None = None
    context_dims: tuple[int, ...] | None = None
    sentinel: bool = False

    def __post_init__(self) -> None:
        at_least_one("MultiSource", dim=self.dim, heads=self.heads, sources=self.sources)
        if not isinstance(self.mode, str) or self.mode not in _MODES:
            raise unknown_name("mode of multi-source attention", self.mode, _MODES)
        if self.mode == "flat" and (self.normalizer != softmax() or self.weight_map is not None):
            raise ConfigError(
                "flat takes one softmax over all sources: leave normalizer and weight_map as they are, or "
                'take mode="hierarchical"'
            )
        flag("sentinel", self.sentinel)
        if self.sentinel and self.mode == "concat":
            raise ConfigError(
                "concat weighs no source against another, so that there is no weight for a sentinel: leave "
                'sentinel=False, or take mode="hierarchical" or "flat"'
            )
        dims = self.context_dims
        if dims is not None and (not several(dims) or len(dims) != self.sources):
            raise ConfigError(
                f"context_dims must be {self.sources} widths, one for each source; got {given(dims)}"
            )
        object.__setattr__(self, "context_dims", None if dims is None else tuple(dims))
        object.__setattr__(self, "kv_heads", key_value_heads("MultiSource", self.heads, self.kv_heads))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiSourceAttention:
        """The module."""
        kind = {"device": device, "dtype": dtype}
        dims = (self.context_dim,) * self.sources if self.context_dims is None else self.context_dims

        def source(width: int | None) -> SourceAttention:
            def projection(*sizes: int, **options: Any) -> Projection:
                return Projection(*sizes, **options | {"context_dim": width})

            def output(*sizes: int, **options: Any) -> Any:
                return SourceOutput(*sizes, **options) if self.mode == "hierarchical" else SourceHeads()

            return self.assemble(
                heads=self.heads,
                kv_heads=self.kv_heads,
                projection=projection,
                output=output,
                module=SourceAttention,
                **kind,
            )

        sources = [source(width) for width in dims]
        first = sources[0]
        made = first.projection

        def joined() -> OutputProjection:
            return OutputProjection(self.dim, made.heads, made.value_dim, bias=self.bias, **kind)

        def of_tokens(kv_heads: int | None) -> Projection:
            return Projection(
                self.dim,
                self.heads,
                kv_heads=kv_heads,
                head_dim=self.head_dim,
                value_dim=self.value_dim,
                bias=self.bias,
                qk_norm=self.qk_norm,
                **kind,
            )

        def square() -> FanInLinear:
            return FanInLinear(self.dim, self.dim, bias=self.bias, **kind)

        if self.mode == "concat":
            return MultiSourceAttention(sources, Concatenated([joined() for _ in sources]))
        if self.mode == "hierarchical":
            second = Hierarchical(of_tokens(self.heads), joined())
            context = SentinelContext(square(), square()) if self.sentinel else None
            return MultiSourceAttention(sources, second, context)
        key, others = None, [other.projection for other in sources[1:]]
        if self.sentinel:
            own = of_tokens(self.kv_heads)
            key = SentinelKey(square(), own, dropout=first.dropout, regularizers=first.regularizers)
            others.append(own)
        for other in others:
            other.query, other.query_norm = made.query, made.query_norm
        return MultiSourceAttention(sources, Flat(joined()), key)
