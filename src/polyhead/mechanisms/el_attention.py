"""EL-attention: multi-head attention whose cache is its input, which all heads read as keys and as values.

    q'_h = q_h W_Khᵀ,   a_h = softmax(q'_h Xᵀ / √D),   head_h = (a_h X) W_Vh,   y = concat_h(head_h) W_O

X: (B, S, d), the inputs or a context; q_h = x W_Qh: (B, L, D); q'_h: (B, L, d). It is multi-head attention
with the product (x W_Qh)(X W_Kh)ᵀ taken in another order, without loss, so it has the same parameters under
the same
names: the state of an `mha` of the same sizes can be loaded, and `el_attention` takes over a module as it is.

A cache holds X alone, d numbers a token instead of 2·H·D. The context of a cross-attention is not even
copied: every layer and, with the queries of all beams as rows of one call, every beam reads the one tensor.
In return a decoding step multiplies more, 4·S·H·d for scores and values instead of 4·S·H·D: it pays where
reading memory is what takes time. `scheme="expanded"` makes keys and values of X instead; `"auto"` takes the
cheaper in operations.

With biases every row gets a one at its end, as a bias is a map of it: q_h·b_K falls out in softmax, but not
with every normaliser, and b_V passes through weights that sum to one, which those of a row that sees nothing,
or of a sigmoid, do not. So all of these stay exact, and the cache holds d + 1 numbers a token.

Encodings that turn keys (rotary ones) stand between the two maps and are refused; learned or sinusoidal
positions in the inputs, ALiBi and other biases are welcome. `qk_norm` stands between them too: there only
"expanded" is left.

Paper 111: EL-Attention: Memory Efficient Lossless Attention for Generation, arXiv 2105.04779. Groups of query
heads that share a key/value head (`kv_heads`) are our addition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polyhead.checks import given
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import AttentionConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.latent_attention import LatentAttention
from polyhead.nn.latent_plan import LatentSizes
from polyhead.nn.latent_projection import Absorbing
from polyhead.nn.positions import Position
from polyhead.nn.projections import Projection, divisors

__all__ = ["ElAttention", "InputProjection", "el_attention"]

_SCHEMES = ("auto", "expanded", "absorbed")


class InputProjection(Absorbing, Projection):
    """A `Projection` whose cached rows are its inputs, with a one at their end where there are biases."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.query_heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads must divide heads={self.query_heads}; got kv_heads={self.kv_heads}; "
                f"allowed are {divisors(self.query_heads)}"
            )
        self.plain_dim, self.turned_dim = self.head_dim, 0
        self.biased = self.key.bias is not None
        self.latent_dim = self.context_dim + self.biased
        self.sizes = LatentSizes(
            self.dim, self.context_dim, self.heads, self.kv_heads, self.dim, self.latent_dim, 0,
            self.head_dim, self.value_dim, compressed=False, projected=False,
        )  # fmt: skip

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        """One row a token."""
        return ((1, self.latent_dim),)

    def latents(self, context: Float[Tensor, "B S dc"]) -> tuple[Tensor, Tensor]:
        """The inputs `(B, 1, S, dc)` themselves, and no rotary keys."""
        rows = context[:, None]
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        return F.pad(rows, (0, 1), value=1.0) if self.biased else rows, rows[..., :0]

    def maps(self, name: str) -> Float[Tensor, "G D dc"]:
        """The map of every head; its bias is the last column."""
        weight, bias = getattr(self, name).weight, getattr(self, name).bias
        both = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        return both.unflatten(0, (self.kv_heads, -1))

    def expand(self, rows: Float[Tensor, "B 1 S dc"]) -> tuple[Tensor, Tensor]:
        """Keys `(B, G, S, D)` and values `(B, G, S, Dv)` of what a cache holds."""
        k, v = (
            F.linear(rows[:, 0], self.maps(name).flatten(0, 1)).unflatten(-1, (self.kv_heads, -1))
            for name in ("key", "value")
        )
        return (k if self.key_norm is None else self.key_norm(k)).transpose(1, 2), v.transpose(1, 2)


@register(
    "el_attention",
    paper="111",
    title="EL-Attention: Memory Efficient Lossless Attention for Generation",
    family="sharing",
    summary="multi-head attention that caches its inputs, not keys and values",
    equation="head_h = softmax((x W_Qh W_Khᵀ) Xᵀ / √D) X W_Vh;  y = concat_h(head_h) W_O",
)
class ElAttention(AttentionConfig):
    """EL-attention.

    Attributes:
        kv_heads: heads of keys and values, a divisor of `heads`; default `heads`.
        scheme: "auto", "expanded" or "absorbed".
    """

    kv_heads: int | None = None
    scheme: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str) or self.scheme not in _SCHEMES:
            raise unknown_name("scheme of EL-attention", self.scheme, _SCHEMES)
        if self.qk_norm is True and self.scheme == "absorbed":
            raise ConfigError(
                "el_attention: keys that are normalised (qk_norm=True) cannot be absorbed; take "
                "scheme='expanded' or 'auto'"
            )
        _refuse_turns(self.position)
        super().__post_init__()
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)

    def build(self, *, device: Any = None, dtype: Any = None) -> LatentAttention:
        """The module."""
        module = self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=InputProjection,
            module=LatentAttention,
        )
        module.scheme = "expanded" if self.qk_norm else self.scheme
        return module


def _refuse_turns(position: object) -> None:
    if isinstance(position, Position) and type(position).turned is not Position.turned:
        raise ConfigError(
            f"el_attention: a position encoding that turns keys cannot be moved past their map; got "
            f"{position}; sinusoidal(), alibi_position() or none can"
        )


def el_attention(module: MultiHeadAttention, *, scheme: str = "auto") -> LatentAttention:
    """The same attention with its inputs as its cache; the parameters are shared, not copied.

    Args:
        module: multi-head, grouped-query or multi-query attention.
        scheme: "auto", "expanded" or "absorbed".

    Raises:
        ConfigError: the module turns or normalises its keys, or is something else.
    """
    if type(module) is not MultiHeadAttention or type(module.projection) is not Projection:
        raise ConfigError(
            f"module must be multi-head, grouped-query or multi-query attention; got {type(module).__name__}"
        )
    old = module.projection
    if old.key_norm is not None or old.heads != old.query_heads:
        what = "normalises its keys" if old.key_norm is not None else "has fewer query than key heads"
        raise ConfigError(f"module {what}, which el_attention cannot take over")
    _refuse_turns(module.position.position)
    if scheme not in _SCHEMES:
        raise unknown_name("scheme of EL-attention", given(scheme), _SCHEMES)
    maps = InputProjection(
        old.dim,
        old.heads,
        kv_heads=old.kv_heads,
        head_dim=old.head_dim,
        value_dim=old.value_dim,
        context_dim=old.context_dim,
        bias=old.key.bias is not None,
        device="meta",
    )
    maps.query, maps.key, maps.value = old.query, old.key, old.value
    new = LatentAttention(
        maps, module.output, scheme=scheme, position=module.position.position, dropout=module.dropout
    )
    if module.select is not None:
        new._check_select(module.select.spec)
    for part in ("score", "normalizer", "weight_map", "mask"):
        setattr(new, part, getattr(module, part))
    new.regularizers = module.regularizers
    if module.scale is not None:
        new.scale = module.scale
    return new.train(module.training)
