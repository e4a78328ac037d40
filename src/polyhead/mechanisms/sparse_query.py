"""Sparse-query attention: fewer query heads, each as wide as before, so that there are fewer maps to make.

    head_i = softmax(q_i k_gᵀ / √D) v_g  with g = i // (H_q/H_kv), i < H_q < H,   y = concat_i(head_i) W_O

D = d/H with H = `heads`, the heads of the layer that this one replaces; W_Q: (d, H_q·D), W_K, W_V:
(d, H_kv·D), W_O: (H_q·D, d).

Cost: 2·d·D·(H_q + H_kv) parameters; 4·L·S·H_q·D FLOPs for scores and values, H/H_q times fewer than
multi-head attention; 2·H_kv·D numbers of cache per token.

Forms, by H_q and H_kv: `sparse` H/2 and H/4; `symmetric` H/2 and H/2; `extreme` H/4 and H/4;
`extreme_multi_query` H/4 and 1; `light` 3H/4 and its largest divisor at most H/4; `reverse` H/4 and H/2.

Paper 008: Sparse Query Attention, arXiv 2510.01817. The light and reverse forms are future work there.
The numbers of their key/value heads, and that the reverse form repeats query heads until there is one for
every key/value head (so it has H_kv maps), are our reading.
"""

from __future__ import annotations

from typing import Any

from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import AttentionConfig, largest_divisor
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.projections import at_least_one, head_width

__all__ = ["SparseQuery"]


def _form(form: str, heads: int) -> tuple[int, int]:
    """Query heads and key/value heads of a form of the paper."""
    half, quarter = max(heads // 2, 1), max(heads // 4, 1)
    light = max(3 * heads // 4, 1)
    forms = {
        "sparse": (half, largest_divisor(half, half // 2)),
        "symmetric": (half, half),
        "extreme": (quarter, quarter),
        "extreme_multi_query": (quarter, 1),
        "light": (light, largest_divisor(light, quarter)),
        "reverse": (quarter, 2 * quarter),
    }
    if not isinstance(form, str) or form not in forms:
        raise unknown_name("form of sparse-query attention", form, forms)
    return forms[form]


@register(
    "sparse_query",
    aliases=("sqa",),
    paper="008",
    title=(
        "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism "
        "with Query Heads Reduction"
    ),
    family="sharing",
    summary="fewer query heads of unchanged width: H/H_q times fewer score operations",
    equation=(
        "head_i = softmax(q_i k_gᵀ / √D) v_g,  g = i // (H_q/H_kv), i < H_q < H, D = d/H;  "
        "y = concat_i(head_i) W_O"
    ),
)
class SparseQuery(AttentionConfig):
    """Sparse-query attention.

    Attributes:
        form: "sparse", "symmetric", "extreme", "extreme_multi_query", "light" or "reverse".
        query_heads: H_q; default that of the form.
        kv_heads: H_kv, a divisor of H_q or, reversed, a multiple; default that of the form.
    """

    form: str = "sparse"
    query_heads: int | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        at_least_one("SparseQuery", dim=self.dim, heads=self.heads)
        query_heads, kv_heads = _form(self.form, self.heads)
        if self.query_heads is not None:
            at_least_one("SparseQuery", query_heads=self.query_heads)
            if self.query_heads > self.heads:
                raise ConfigError(
                    f"query_heads must be at most heads={self.heads}, the heads of the layer that this one "
                    f"replaces; got {self.query_heads}"
                )
            if self.query_heads != query_heads:  # no longer a form of the paper: as close as divides
                query_heads, kv_heads = self.query_heads, largest_divisor(self.query_heads, kv_heads)
        object.__setattr__(self, "query_heads", query_heads)
        object.__setattr__(self, "kv_heads", kv_heads if self.kv_heads is None else self.kv_heads)
        object.__setattr__(self, "head_dim", head_width(self.dim, self.heads, self.head_dim))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        assert self.query_heads is not None
        return self.assemble(heads=self.query_heads, kv_heads=self.kv_heads, device=device, dtype=dtype)
