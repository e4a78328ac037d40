"""Binary attention: only the signs of queries and keys, and a magnitude, enter the scores.

    q_b = μ_q sign(q),  k_b = μ_k sign(k),  μ = mean of |·|,  sign(x) = +1 for x ≥ 0 and -1 elsewhere
    S = q_b k_bᵀ / √D + bias,   P = softmax(S),   head = P v,   y = concat_h(head_h) W_O

Training goes straight through: sign has the gradient 1[|x| ≤ 1], μ its own. With `pv_bits=8`, P is rounded
to multiples of 1/255 and v to round(v s)/s, s = 127/(max |v| + 1e-6), straight through as well, for v where
|v| ≤ 2. `qk_bits=32` leaves queries and keys as they are: with no bias, grouped-query attention.

The bias is learned: a table over the distances of tokens, clipped at `reach`; or, with `grid=(h, w)`, over
the offsets of patches, with three rows more for a class token before them. It starts truncated normal with
deviation 0.02; leave it out of weight decay.

q: (B, H, L, D), k, v: (B, G, S, D). Cost: that of grouped-query attention and H·(2·reach + 1), or
H·((2h-1)(2w-1) + 3), parameters; the FLOPs named here are those of the dense form, of which the scores need
L·S·D products of bits. A token's keys take ⌈D / 8⌉ bytes and one number in the cache instead of D numbers.
Without gradients on a CPU, signs are multiplied as int8 with exact int32 sums (`polyhead.attend.signs`).

Paper 178: BinaryAttention, One-Bit QK-Attention for Vision and Diffusion Transformers, arXiv 2603.09582. It
has bidirectional attention over images, with μ the mean over all tokens and channels of a head
(`scope="sequence"`), and the largest |v| over the tokens. Such means know later tokens, so the default here
is ours: `scope="token"`, means and maxima over the channels of one token, which decodes exactly. A table
over distances of a sequence is ours too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.rounding import rounded_weights
from polyhead.attend.scores import Score, chain, grid_bias, relative_bias
from polyhead.attend.weight_maps import weight_chain
from polyhead.checks import flag, given, several, whole
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.binary_attention import BinaryAttention

__all__ = ["BinaryQueryKey"]


@register(
    "binary_attention",
    aliases=("binary_qk",),
    paper="178",
    title="BinaryAttention: One-Bit QK-Attention for Vision and Diffusion Transformers",
    family="quantized",
    summary="scores are products of the signs of queries and keys, times a magnitude, plus a learned bias",
    equation="S = μ_q μ_k sign(q) sign(k)ᵀ / √D + bias;  μ = mean |·|;  y = concat_h(softmax(S) v) W_O",
    promises=Promises(straight_through=True),
)
class BinaryQueryKey(GroupedConfig):
    """Binary attention.

    Attributes:
        scope: "token" or "sequence": over what magnitudes are taken. "sequence" takes no cache and no mask
            that hides what follows.
        qk_bits: 1, or 32 for queries and keys as they are.
        pv_bits: None for weights and values as they are, or 8.
        reach: the distance at which the table of the bias is clipped; None: no such table.
        grid: height and width of a grid of patches, whose offsets have a bias in place of distances.
        class_token: whether a class token stands before the patches of the grid.
    """

    scope: str = "token"
    qk_bits: int = 1
    pv_bits: int | None = None
    reach: int | None = 64
    grid: tuple[int, int] | None = None
    class_token: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.scope, str) or self.scope not in ("token", "sequence"):
            raise unknown_name("scope of magnitudes", self.scope, ("token", "sequence"))
        for name, allowed in (("qk_bits", (1, 32)), ("pv_bits", (None, 8))):
            value = getattr(self, name)
            if type(value) not in (int, type(None)) or value not in allowed:
                raise ConfigError(f"{name} must be {allowed[0]} or {allowed[1]}; got {given(value)}")
        if self.reach is not None:
            whole("reach", self.reach, 0, 1 << 20)
        if self.grid is not None:
            if not several(self.grid) or len(self.grid) != 2:
                raise ConfigError(f"grid must be (height, width) in patches; got {given(self.grid)}")
            object.__setattr__(self, "grid", tuple(whole("grid", n, 1, 1 << 12) for n in self.grid))
        flag("class_token", self.class_token)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        bias = self._bias(device)
        options: dict[str, Any] = {}
        if bias is not None:
            options["score"] = chain(bias if self.score is None else (bias, chain(self.score)))  # type: ignore[arg-type]
        if self.pv_bits is not None:
            own = weight_chain(self.weight_map)
            options["weight_map"] = rounded_weights(8) if own is None else (own, rounded_weights(8))
        binary = self.qk_bits == 1
        if not binary and self.pv_bits is None:
            module: Any = MultiHeadAttention
        else:
            module = partial(
                BinaryAttention, scope=self.scope, binary=binary, value_codes=self.pv_bits is not None
            )

        def assembled(*parts: Any, **given: Any) -> MultiHeadAttention:
            return module(*parts, **given | options)

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=assembled
        )

    def _bias(self, device: Any) -> Score | None:
        """The learned bias, freshly drawn."""

        def table(columns: int) -> Tensor:
            drawn = torch.empty(self.heads, columns, device=device)
            return nn.init.trunc_normal_(drawn, std=0.02, a=-0.04, b=0.04).requires_grad_()

        if self.grid is not None:
            h, w = self.grid
            offsets = (2 * h - 1) * (2 * w - 1) + 3 * self.class_token
            return grid_bias(table(offsets), h, w, class_token=self.class_token)
        return None if self.reach is None else relative_bias(table(2 * self.reach + 1))
