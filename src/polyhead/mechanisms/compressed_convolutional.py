"""Compressed convolutional attention: attention within a latent, after two short convolutions.

    q0 = x W_Q,  k0 = x W_K,   z = conv_t1(conv_t0(q0 | k0)),   m_h = (q0_h + k0_g) / 2,  g = h // (H/G)
    q_h = unit(z_h + m_h),  k_g = unit(z_g + mean over h of g of m_h) exp(β_g),  unit(x) = √D x / max(‖x‖, ε)
    v_t = (x_t W_V | x_{t-1} W_P),   head_h = softmax(q_h k_gᵀ / √D) v_g,   y = concat_h(head_h) W_O

conv_t0 mixes t0 tokens of a channel, conv_t1 t1 tokens of the channels of a head, both causal and with a
bias, nothing between them. Before the first token stand inputs of zeros. The position encoding turns the unit
vectors. With one key/value head for every query head it is CCA, with fewer (the default) CCGQA.

q: (B, H, L, D), k, v: (B, G, L, D) with H·D = d / 2 by default: the attention itself takes half the FLOPs.
Cost: d·D·(2·H + 2·G) + (H + G)·D·(t0 + D·t1 + 2) + G parameters; a cache of 2·G·D numbers a token, d / 4 by
default, and the latest max(t0 + t1 - 2, 1) + 16 inputs. Of the tokens that it holds, the latest 16 can be
taken back. A step projects those inputs anew.

Paper 139: Compressed Convolutional Attention, Efficient Attention in a Compressed Latent Space, arXiv
2510.04476. Our reading: the temperature is exp(β), β = 0 at the start; ε = 1e-6; where the latent of values
has an odd width, the current token has the larger half; a bias of the linear maps, which the paper does not
have, acts on the zeros before the first token too. RoPE on half of D, as its models have, is left to the
caller, `position=rope(fraction=0.5)`. By default G is the largest divisor of H up to H/4.
"""

from __future__ import annotations

from typing import Any

from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import AttentionConfig, largest_divisor
from polyhead.mechanisms.registry import register
from polyhead.nn.compressed_attention import CompressedAttention
from polyhead.nn.compressed_projection import CompressedProjection
from polyhead.nn.projections import at_least_one

__all__ = ["CompressedConvolutional"]


@register(
    "compressed_convolutional",
    aliases=("cca", "ccgqa"),
    paper="139",
    title="Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
    family="latent",
    summary="all of attention in a small latent, whose queries and keys two short convolutions mix",
    equation=(
        "z = conv_t1(conv_t0(x W_Q | x W_K));  q = unit(z_q + m),  k = unit(z_k + m̄) exp(β);  "
        "v_t = (x_t W_V | x_{t-1} W_P)"
    ),
    supports=frozenset({"self", "causal_self"}),
)
class CompressedConvolutional(AttentionConfig):
    """Compressed convolutional attention, with grouped heads.

    Attributes:
        head_dim: D; default dim / (2·heads), at least 2.
        qk_norm: give queries and keys the length √D, keys times exp(β).
        kv_heads: G, a divisor of `heads`.
        kernels: t0 and t1.
        qk_mean: add the means of queries and keys behind the convolutions.
        value_shift: half of the values are those of the token before.
    """

    qk_norm: bool = True
    kv_heads: int | None = None
    kernels: tuple[int, int] = (2, 2)
    qk_mean: bool = True
    value_shift: bool = True

    def __post_init__(self) -> None:
        at_least_one("CompressedConvolutional", dim=self.dim, heads=self.heads)
        for name in ("value_dim", "context_dim"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is not an option here: values are as wide as keys, and there is no context; got "
                    f"{given(getattr(self, name))}; leave it out"
                )
        if not several(self.kernels) or len(self.kernels) != 2:
            raise ConfigError(
                f"kernels must be (t0, t1), two numbers of tokens, such as (2, 2); got {given(self.kernels)}"
            )
        kv_heads = largest_divisor(self.heads, self.heads // 4) if self.kv_heads is None else self.kv_heads
        head_dim = max(2, self.dim // (2 * self.heads)) if self.head_dim is None else self.head_dim
        object.__setattr__(self, "kernels", tuple(whole("kernels", t, 1, 1 << 12) for t in self.kernels))
        object.__setattr__(self, "kv_heads", kv_heads)
        object.__setattr__(self, "head_dim", head_dim)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> CompressedAttention:
        """The module."""

        def projection(dim: int, heads: int, **options: Any) -> CompressedProjection:
            del options["value_dim"], options["context_dim"]
            return CompressedProjection(
                dim,
                heads,
                kernels=self.kernels,
                qk_mean=self.qk_mean,
                value_shift=self.value_shift,
                **options,
            )

        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=projection,  # type: ignore[arg-type]
            module=CompressedAttention,
        )
