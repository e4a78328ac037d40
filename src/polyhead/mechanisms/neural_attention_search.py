"""Neural attention search: every token says for how long it is read, and a cache forgets it then.

    T_j = one-hot of the role of token j, from x_j W_t:  global, local or sliding
    M_ij = 1 for j <= i if j is global; or local, with no global token between j and i; or sliding, i <= j + W
    head_i = Σ_j M_ij e^{s_ij} v_j / Σ_j M_ij e^{s_ij},   s_ij = q_i · k_j / √D,   y = concat_h(head_h) W_O

Each of the G key/value heads gives every token a role of its own; a local token is read up to and including
the next global one. The first token is global. In training roles are drawn by Gumbel-softmax, else the most
probable is taken. Roles learn through the mask: forward it is 0 or 1, backward T has the gradient of the
softmax, and M that of

    M_ij = T_j0 + T_j1 Π_{j<m<i} (1 - T_m0) + T_j2 [i - j <= W]

whose product costs a few numbers a pair. Pairs that are not read are then computed too, for what reading
them would change. Nothing flows through the roles into x. In training `auxiliary_losses` has "kept", λ times
the share of pairs of real tokens that are read; without it there is no reason to read less.

q: (B, H, L, D); k, v: (B, G, L, ·), roles (B, G, L, 3). Cost: 3·d·G parameters and 3·G numbers a token of
cache more than grouped-query attention; `cost` counts all pairs, as it does with masks. A token's end
depends on tokens up to it alone, so that `new_cache(forget=True)` gives what the whole call gives, and holds
the global tokens, the local ones since the last of them, and the sliding ones among the last W.

Paper 127: Neural Attention Search, arXiv 2502.13251. Our readings: the gradient of the mask is that of the
formula above, where the published kernel divides by the sum over all keys; forcing the last token of a
training sequence to be global, as there, changes no output and is left out; λ and the temperature, 1, are
ours. For trained roles on a pretrained model more is wanting than this: its per-head cache forgets by place
and not by token. Masks other than the causal one are refused, and so are other normalisers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import number, whole
from polyhead.mechanisms.config import GroupedConfig, causal_alone, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.typed_tokens import TypedTokens

__all__ = ["NeuralAttentionSearch"]


@register(
    "neural_attention_search",
    aliases=("nats",),
    paper="127",
    title="Neural Attention Search",
    family="sparse",
    summary="every token learns whether it is read for ever, until the next such token, or for a while",
    equation=(
        "M_ij = T_j0 + T_j1 Π_{j<m<i} (1 - T_m0) + T_j2 [i - j ≤ W], T_j one-hot of x_j W_t;  "
        "head_i = Σ_j M_ij e^{s_ij} v_j / Σ_j M_ij e^{s_ij}"
    ),
    supports=frozenset({"causal_self"}),
    facets=Facets(positions="hard"),
    promises=Promises(straight_through=True, any_mask=False),
)
class NeuralAttentionSearch(GroupedConfig):
    """Neural attention search.

    Attributes:
        window: W, tokens after itself that read a sliding one.
        price: λ, weight of the share of pairs that are read.
    """

    window: int = 256
    price: float = 0.01

    def __post_init__(self) -> None:
        without_context(self)
        causal_alone("neural_attention_search", self, "what is read is what tokens say")
        object.__setattr__(self, "window", whole("window", self.window, 0))
        object.__setattr__(self, "price", number("price", self.price, least=0))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> TypedTokens:
        """The module."""
        module = partial(TypedTokens, window=self.window, price=self.price)
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
