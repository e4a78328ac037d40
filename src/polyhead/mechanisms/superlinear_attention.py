"""Superlinear attention: a search over a few far keys says which spans are read beside the nearest tokens.

    n = t + 1,   W = ⌊(s + 1)^(1/p)⌋ - 1,   anchors a_i = t - ⌊i^(1/p)⌋ + 1 >= 0 for i > s
    r_i = u_t · k_{a_i},   C = the k anchors with the largest r,   g = softmax over C of r
    span of a: from a - ⌈b n^σ⌉ to min(a + ⌈f n^σ⌉, t - W);   window: from t - W + 1 to t
    o_t = Σ_{c in C} g_c · softmax over (span of c ∪ window) of (q_t · k_j / √D) v_j

u: search queries (B, H, L, D), by a projection of their own; q: (B, H, L, D); k, v: (B, G, L, D), read by H/G
heads each. Positions turn u as they turn q. With p = 1/2 anchors stand at square numbers, as in a jump
search: there are √n of them, and with b >= 2 and σ = 1/2 every past token lies in the span of some anchor.
What is kept is chosen hard, and u learns by the shares g: with k = 1 the share is 1, and u learns nothing.
Spans may overlap; each is a softmax of its own. Up to W tokens it is `mha`. So it is where every span reaches
from the first token to the window, whatever the search says.

Cost: d·H·D parameters more than grouped-query attention, and its cache. A query scores √n anchors and reads
at most k (1 + (b + f) n^σ) + W keys, O(L^{3/2}) for a sequence. Gathering keys costs more than products of
matrices do: only where an eighth of the keys or less is needed are they gathered, at the default numbers from
some ten thousand tokens on. Otherwise all pairs are scored, in strips, in O(L) memory. `cost` says what is
done.

Paper 152: Superlinear Multi-Step Attention, arXiv 2601.18401, with its two steps; more steps, which the paper
describes and does not build, are left out, and so are fused kernels. There keys come from layers of a state
space model. Defaults are those of the released model but s, which is 3 there, a window of 15. Our readings:
scores of the search have no scale, as in the official code; of equal anchors the nearest is taken; `qk_norm`
normalises search queries with a gain of their own; lengths count from the first real token, as there; anchors
at padding are not candidates. In half precision nearly equal anchors may change places.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import number, whole
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.own_scores import OwnScoresConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.search_projection import SearchProjection
from polyhead.nn.span_search import SpanRule, SpanSearchAttention

__all__ = ["SuperlinearAttention"]


@register(
    "superlinear_attention",
    aliases=("superlinear",),
    paper="152",
    title="Superlinear Multi-Step Attention",
    family="sparse",
    summary="a query scores keys at growing distances, and reads spans around the best ones and a window",
    equation=(
        "o_t = Σ_{c in top_k of u_t·k_a} g_c softmax_j(q_t·k_j / √D) v_j over j in span(c) ∪ window;  "
        "g = softmax of u_t·k_c,  a = t + 1 - ⌊i^(1/p)⌋"
    ),
    supports=frozenset({"causal_self"}),
    facets=Facets(positions="hard", complexity="subquadratic"),
    promises=Promises(any_mask=False),
)
class SuperlinearAttention(OwnScoresConfig):
    """Superlinear attention; further options are those of `OwnScoresConfig`.

    Attributes:
        window_index: s; with p = 1/2 the window holds (s + 1)² - 1 tokens, the query's own among them.
        top_k: k, anchors whose spans are read.
        backward, forward: b and f, factors of a span's reach before and behind its anchor.
        search_power: p, between 0 and 1.
        span_power: σ, from 0 to 1.
    """

    window_index: int = 1
    top_k: int = 3
    backward: float = 3.0
    forward: float = 1.0
    search_power: float = 0.5
    span_power: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("window_index", 0), ("top_k", 1)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        for name in ("backward", "forward"):
            object.__setattr__(self, name, number(name, getattr(self, name), least=0))
        object.__setattr__(self, "search_power", number("search_power", self.search_power, above=0, below=1))
        object.__setattr__(self, "span_power", number("span_power", self.span_power, least=0, most=1))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> SpanSearchAttention:
        """The module."""
        rule = SpanRule(self.window_index, self.backward, self.forward, self.search_power, self.span_power)
        module = partial(SpanSearchAttention, rule=rule, top_k=self.top_k)
        return self.assemble(module, device=device, dtype=dtype, projection=SearchProjection)
