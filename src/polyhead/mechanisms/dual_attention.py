"""Dual attention: some heads receive features of what they look at, the others relations to it.

    w_h = softmax(q_h k_gᵀ / √D);   head_h = w_h v_g for the first H - Hr heads
    head_hi = Σ_j w_hij (W_rh r(i, j) + W_s s_j) for the others,   r_l(i, j) = act(a_il · b_jl / √P), l = 1..R
    y = [concat_h(first heads) W_O ; concat_h(relational heads) W_O']

a = x W_a, b = c W_b: (B, L, R, P), shared by the relational heads. s: (B, S, d), symbols, which say which
token it is without telling its features: s_j = concat_m(softmax((x_j W_m + b_m) T_mᵀ / √w) S_m) out of a
library of n templates T and symbols S, or one learned vector for every position, or one for every relative
position, s_ij = E_{clip(j - i, -r, r)} with E (2r + 1, d), in the place of s_j. W_r: (Hr, Dv, R).

No relation is ever made: Σ_j w_ij (a_il · b_jl) = a_il · Σ_j w_ij b_jl, attention whose values are b. That
holds under every mask, map, normaliser and dropout, and takes O(L) memory. A single query, as in decoding,
makes its R relations with every key, which are then values of width R. With an activation, calls of several
queries make the R relations and Hr weights of every pair, for some queries at a time.

So they are made where symbols are relative. The weights are then summed by clipped distance, and the 2r + 1
sums of a query multiply E W_s, so that no pair has a symbol of its own.

Cost: with G = H, h = Hr·D and R·P = h, 4·d·h + Hr·D·R + h² parameters for the relational heads besides the
symbols' d² + d + 2·n·d, n·d or (2r + 1)·d, and L·S·Hr·(D + h + Dv) multiplications; with all relations made
it is h + Hr·R in place of Hr·h, but of small products. The cache holds b and W_s s, not the symbols: h +
Hr·Dv numbers a token besides the keys. Where symbols are relative it holds b alone, h numbers, and
L·S·Hr·Dv are not among the multiplications, but L·Hr·d·(2r + 1 + Dv), or L·Hr·(2r + 1)·Dv and those of E
W_s where these are fewer. On a CPU the relational heads run on the tile engine, because values are wider
than keys; a weight map, or a score map across heads, puts all heads into one such call. Where weights are
made, of masks `causal()` alone saves some.

Paper 049: Disentangling and Integrating Relational and Sensory Information in Transformer Architectures,
arXiv 2405.16727. Our readings: n = d symbols and as many symbol heads as heads, where those divide d, else
one; every module has a retriever of its own, and modules that share one have the same in `symbols`; the two
output maps make shares of the d outputs in proportion to their heads; a bias, where asked for, is in all
maps but W_r. E is drawn as other symbols are, and r = 64. Relative positions are counted in tokens, as
masks and biases count them, whatever `positions` say; those to a context, which the paper does not have, as
if the queries were its last tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, given, whole
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import AttentionConfig, key_value_heads
from polyhead.mechanisms.registry import register
from polyhead.nn.dual_attention import DualAttention
from polyhead.nn.dual_projection import DualOutput, DualProjection
from polyhead.nn.projections import at_least_one
from polyhead.nn.symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention, SymbolRetriever

__all__ = ["DualHeads"]

_SYMBOLS = ("attention", "positional", "relative")
_FARTHEST = 1 << 20  # no text comes near; a typing error must not fill the memory


@register(
    "dual_attention",
    aliases=("relational_attention",),
    paper="049",
    title="Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
    family="interaction",
    summary="some heads receive values, the others relations between receiver and sender, and symbols",
    equation=(
        "head_hi = Σ_j w_hij v_gj for some heads, Σ_j w_hij (W_rh r(i,j) + W_s s_j) for the others,  "
        "r_l(i,j) = (x_i W_al)·(x_j W_bl) / √P"
    ),
)
class DualHeads(AttentionConfig):
    """Dual attention.

    Attributes:
        relational_heads: Hr, from 0 (multi-head attention) to `heads`; default half of them, at least one.
        kv_heads: key heads G, a divisor of `heads`; the heads that share one are all relational or none.
            Default `heads`.
        relations: R; default Hr.
        relation_dim: P; default so that R·P = Hr·D.
        symmetric: one map for both sides, r(i, j) = r(j, i).
        activation: "identity", "relu" or "tanh".
        symbols: "attention", "positional" or "relative".
        library: symbols n; default `dim`, for positions 2048, of which a sequence then has no more; None for
            relative ones.
        symbol_heads: heads of the attention to the library.
        reach: the distance r from which on relative symbols are the same; default 64, None for the others.
    """

    relational_heads: int | None = None
    kv_heads: int | None = None
    relations: int | None = None
    relation_dim: int | None = None
    symmetric: bool = False
    activation: str = "identity"
    symbols: str = "attention"
    library: int | None = None
    symbol_heads: int | None = None
    reach: int | None = None

    def __post_init__(self) -> None:
        at_least_one("DualHeads", dim=self.dim, heads=self.heads)
        flag("symmetric", self.symmetric)
        if not isinstance(self.symbols, str) or self.symbols not in _SYMBOLS:
            raise unknown_name("kind of symbols", self.symbols, _SYMBOLS)
        self._check_table()
        defaults = {
            "kv_heads": key_value_heads("DualHeads", self.heads, self.kv_heads),
            "relational_heads": max(1, self.heads // 2),
            "library": {"attention": self.dim, "positional": 2048}.get(self.symbols),
            "reach": {"relative": 64}.get(self.symbols),
            "symbol_heads": self.heads if self.dim % self.heads == 0 else 1,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        assert self.relational_heads is not None
        whole("relational_heads", self.relational_heads, 0, self.heads)
        if self.relations is None:
            object.__setattr__(self, "relations", max(1, self.relational_heads))
        super().__post_init__()

    def _check_table(self) -> None:
        """Each size belongs to its kind of symbols."""
        if self.symbols != "relative" and self.reach is not None:
            raise ConfigError(
                f"reach must be left out with symbols={self.symbols!r}, whose size is library; got "
                f"{given(self.reach)}"
            )
        if self.symbols == "relative" and self.library is not None:
            raise ConfigError(
                "library must be left out with symbols='relative', whose size is 2·reach + 1; got "
                f"{given(self.library)}"
            )
        if self.reach is not None:
            whole("reach", self.reach, 1, _FARTHEST)

    def _retriever(self, device: Any, dtype: Any) -> SymbolRetriever | RelativeSymbols | None:
        if not self.relational_heads:
            return None
        if self.symbols == "relative":
            assert self.reach is not None
            return RelativeSymbols(self.dim, self.reach, device=device, dtype=dtype)
        assert self.library is not None
        assert self.symbol_heads is not None
        if self.symbols == "positional":
            return PositionalSymbols(self.dim, self.library, device=device, dtype=dtype)
        inputs = self.dim if self.context_dim is None else self.context_dim
        return SymbolicAttention(
            inputs, self.dim, self.library, self.symbol_heads, device=device, dtype=dtype
        )

    def build(self, *, device: Any = None, dtype: Any = None) -> DualAttention:
        """The module."""
        assert self.relational_heads is not None
        assert self.relations is not None
        projection = partial(
            DualProjection,
            relational_heads=self.relational_heads,
            relations=self.relations,
            relation_dim=self.relation_dim,
            symmetric=self.symmetric,
        )
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=projection,
            output=partial(DualOutput, relational_heads=self.relational_heads),  # type: ignore[arg-type]
            module=partial(DualAttention, symbols=self._retriever(device, dtype), activation=self.activation),
        )
