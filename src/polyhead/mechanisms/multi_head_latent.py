"""Multi-head latent attention: keys and values of all heads are made of one small latent a token.

    c_t = RMSNorm(x_t W_DKV),   kʳ_t = RoPE(x_t W_KR),   k_h,t = [c_t W_UK^h | kʳ_t],   v_h,t = c_t W_UV^h
    q_h,t = [c^Q_t W_UQ^h | RoPE(c^Q_t W_QR^h)],   c^Q_t = RMSNorm(x_t W_DQ)
    head_h = softmax(q_h k_hᵀ / √(Dn + dr)) v_h,   y = concat_h(head_h) W_O

x: (B, L, d); c: dc wide; kʳ: dr wide, shared by all heads; q_h, k_h: Dn + dr; v_h: Dv. A cache holds c and kʳ
alone, dc + dr numbers a token whatever the number of heads. Without a query latent c^Q is x itself.

Parameters: d·p + p·H·(Dn + dr) + d·(dc + dr) + dc·G·(Dn + Dv) + H·Dv·d + p + dc, with p the width of the
query latent (without one, the first and the lone p fall away and p = d), and G = H.

It is multiplied out in one of several orders, all exact and all with the same mask, biases and normaliser:
`scheme="expanded"` makes keys and values of the latents and is what training and prefill want; `"absorbed"`
attends to the latents themselves with wider queries, which decoding wants; `"auto"` takes the one of these
two with fewer operations, by the numbers of queries and keys of the call. See `polyhead.nn.latent_plan` for
all four, and the module's `plan` for what they cost.

Paper: DeepSeek-V2, A Strong, Economical, and Efficient Mixture-of-Experts Language Model, arXiv 2405.04434:
with d = 5120, H = 128 and Dn = Dv = 128 it has dc = 4·Dn, dr = Dn/2 and a query latent of 12·Dn. Here Dn =
d/H by default, dc = 4·Dn but at most d, dr the even number next below Dn/2 but at least 2, and no query
latent (as in its Lite model). `kv_heads` is ours: heads of the up-projections that groups of query heads
share.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer, softmax
from polyhead.attend.scores import Score
from polyhead.attend.weight_maps import WeightMap
from polyhead.mechanisms.config import MechanismConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.latent_attention import LatentAttention
from polyhead.nn.latent_projection import LatentProjection
from polyhead.nn.positions import Position, rope
from polyhead.nn.projections import OutputProjection, at_least_one, head_width
from polyhead.nn.regularizers import Regularizer

__all__ = ["MultiHeadLatent"]


@register(
    "multi_head_latent",
    aliases=("mla",),
    title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    family="sharing",
    summary="keys and values of all heads are made of one cached latent a token",
    equation=(
        "c = norm(x W_DKV), r = RoPE(x W_KR);  k_h = [c W_UK^h | r], v_h = c W_UV^h;  "
        "head_h = softmax(q_h k_hᵀ / √(Dn + dr)) v_h;  y = concat_h(head_h) W_O"
    ),
)
class MultiHeadLatent(MechanismConfig):
    """Multi-head latent attention.

    Attributes:
        dim: width of the model d.
        heads: query heads H.
        head_dim: width Dn of queries and keys without the rotary part; default dim / heads.
        value_dim: width Dv of the values of a head; default `head_dim`.
        latent_dim: width dc of the latent; default 4·Dn, at most d.
        rope_dim: width dr of the rotary part, even; default about Dn/2. 0 for none, with a position encoding
            that turns nothing.
        query_latent_dim: width of the latent of the queries; default none.
        kv_heads: heads of keys and values, a divisor of `heads`; default `heads`.
        scheme: "auto", "expanded", "absorbed", "absorbed_reuse" or "absorbed_recompute".
        context_dim: width of a context; default `dim`.
        position: the position encoding; what it turns are the rotary parts.
        score: maps of the logits.
        normalizer: how logits become weights.
        weight_map: maps of the weights.
        mask: a mask that holds in every call.
        dropout: probability with which a weight is dropped in training.
        regularizers: what else acts in training only, such as `drop_head(0.1)`.
    """

    _: KW_ONLY
    head_dim: int | None = None
    value_dim: int | None = None
    latent_dim: int | None = None
    rope_dim: int | None = None
    query_latent_dim: int | None = None
    kv_heads: int | None = None
    scheme: str = "auto"
    context_dim: int | None = None
    position: Position = rope()
    score: Score | tuple[Score, ...] | None = None
    normalizer: Normalizer = softmax()
    weight_map: WeightMap | tuple[WeightMap, ...] | None = None
    mask: Mask | None = None
    dropout: float = 0.0
    regularizers: Regularizer | tuple[Regularizer, ...] = ()

    def __post_init__(self) -> None:
        at_least_one("MultiHeadLatent", dim=self.dim, heads=self.heads)
        width = head_width(self.dim, self.heads, self.head_dim)
        at_least_one("MultiHeadLatent", head_dim=width)
        defaults = {
            "head_dim": width,
            "value_dim": width,
            "latent_dim": min(4 * width, self.dim),
            "rope_dim": max(2, 2 * (width // 4)),
            "kv_heads": self.heads,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> LatentAttention:
        """The module."""
        assert self.head_dim is not None
        assert self.value_dim is not None
        assert self.latent_dim is not None
        assert self.rope_dim is not None
        projection = LatentProjection(
            self.dim,
            self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            latent_dim=self.latent_dim,
            rope_dim=self.rope_dim,
            query_latent_dim=self.query_latent_dim,
            context_dim=self.context_dim,
            device=device,
            dtype=dtype,
        )
        return LatentAttention(
            projection,
            OutputProjection(self.dim, self.heads, self.value_dim, device=device, dtype=dtype),
            scheme=self.scheme,
            position=self.position,
            score=self.score,
            normalizer=self.normalizer,
            weight_map=self.weight_map,
            mask=self.mask,
            dropout=self.dropout,
            regularizers=self.regularizers,
        )
