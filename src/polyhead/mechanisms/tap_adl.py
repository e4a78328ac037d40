"""Token-aware average pooling: every token is blended with its neighbourhood before it attends.

    x'_t = Σ_{i < K} m_i(t) · avg_i(x)_t,   m = softmax_K(conv(norm(conv(x))) / T),   avg_0(x) = x
    head_h = softmax(q_h k_gᵀ / √D) v_g,  q, k, v all made of x',   g = h // (H/G)

avg_i: the mean of three tokens i apart, or of 3 × 3 in a grid, with zeros beyond the border. So a weight that
overfocuses on one token falls on what stands around it too. The residual of a block keeps x itself.

`layout` says which tokens are neighbours: `(height, width)`, the paper's images; "around", one before and one
after; "past", two before, which alone can decode. With `scales=1` it is plain attention.

The second half of the paper is a loss that keeps tokens from looking all at the same few:
`regularizers=ph.nn.attention_diversification()`, here or in any mechanism whose weights can be held.

Cost: 3·d·K + K + 3·K² parameters more than grouped-query attention (on a grid 9 for 3, and 2·K),
6·L·K·(d + K) more FLOPs and O(L·K·d) elementwise; the same keys and values in the cache, besides the latest
max(2(K - 1), 4) + 16 inputs of a sequence. Of the tokens that a cache holds, the latest 16 can be taken back.

Paper 126: Robustifying Token Attention for Vision Transformers, arXiv 2303.11126. There layers normalise x'
once it is blended; here a block's norm comes before the module. Sequences in one dimension are ours: there
"past" divides the K numbers of a token by their root mean square instead of normalising a batch, whose
statistics would carry the future back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import number, whole
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.registry import register
from polyhead.nn.pooled_tokens import PooledTokensAttention
from polyhead.nn.token_pooling import TokenPooling, check_class_token, check_layout

__all__ = ["TapAdl"]


@register(
    "tap_adl",
    aliases=("tap",),
    paper="126",
    title="Robustifying Token Attention for Vision Transformers",
    family="inputs",
    summary="tokens are blended with their neighbours, at scales of their own choice, before they attend",
    equation="x'_t = Σ_i m_i(t) avg_i(x)_t, m = softmax_K(conv(norm(conv(x))));  head_h = attend(x' W_h)",
    supports=frozenset({"self", "causal_self"}),
)
class TapAdl(GroupedConfig):
    """Attention over tokens that are blended with their neighbours.

    Attributes:
        scales: K.
        layout: "past", "around" or (height, width).
        temperature: T of the weights of the scales.
        class_token: whether a token stands before those of the grid; it is not blended.
    """

    scales: int = 4
    layout: str | tuple[int, int] = "past"
    temperature: float = 1.0
    class_token: bool = False

    def __post_init__(self) -> None:
        without_context(self)
        for name, value in (
            ("scales", whole("scales", self.scales, 1)),
            ("layout", check_layout(self.layout)),
            ("temperature", number("temperature", self.temperature, above=0)),
        ):
            object.__setattr__(self, name, value)
        check_class_token(self.class_token, self.layout)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> PooledTokensAttention:
        """The module."""
        pooling = TokenPooling(
            self.dim,
            self.scales,
            layout=self.layout,
            temperature=self.temperature,
            class_token=self.class_token,
            device=device,
            dtype=dtype,
        )
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            module=partial(PooledTokensAttention, pooling=pooling),
        )
