"""Head mixing from independent to dense, and a transformer of two streams made of such attention.

    q, k, v = maps of x and of the context, y = map of the heads; each map is one of
    independent   diag(W_1, ..., W_H): head h reads the h-th share of the inputs alone
    kronecker     M ⊗ I: head h is Σ_m M[h, m] times the m-th channel, coordinate by coordinate
    dense         any matrix

Cost: a square map of width d with H heads has d²/H, H² or d² parameters, and so often as many operations
(kronecker H·d a token). Scores, values and cache are those of multi-head attention.

`dual_streams` stacks layers over a token stream t that only attention writes, and a context stream c that
only MLPs write, both of width d; with values="token", values are made of the token stream alone:

    t ← t + attention(q, k of norm(t + c), v of norm(t));   c ← c + mlp(norm(t + c));   y = norm(t + c)

The norms are layer normalisations of every channel by itself. With values="sum", one channel in the norms and
dense maps it is the ordinary pre-norm transformer, x = t + c. `polyhead.heads.amplified` multiplies logits of
any model, as the paper does to see whether attention selects; `DualStreams.sharing` ablates a stream.

Paper 026: The Dual-Stream Transformer: Channelized Architecture for Interpretable Language Modeling, arXiv
2603.07461. Our readings: queries and keys are dense, values and outputs kronecker; c starts as zeros; what a
layer reads is the sum of the streams; values have a norm of their own; MLPs are dense; M starts as the
identity with noise; where fewer heads are made than there are channels, head h starts as channel ⌊h·n/G⌋.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, place
from polyhead.errors import unknown_name
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.registry import register
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.channel_maps import MIXING, ChanneledOutput, ChanneledProjection
from polyhead.nn.dual_stream import DualStreams, StreamBlock
from polyhead.nn.projections import at_least_one

__all__ = ["DualStream", "dual_streams"]


@register(
    "dual_stream",
    aliases=("channelized",),
    paper="026",
    title="The Dual-Stream Transformer: Channelized Architecture for Interpretable Language Modeling",
    family="interaction",
    summary="maps between heads that mix them not at all, as whole channels, or at will",
    equation="head_h = attend(q_h, k_g, v_g);  v = (M_V ⊗ I) c,  y = (M_O ⊗ I) concat_h(head_h)",
)
class DualStream(GroupedConfig):
    """Attention with channelised maps.

    Attributes:
        query_map, key_map, value_map, output_map: "independent", "kronecker" or "dense".
    """

    query_map: str = "dense"
    key_map: str = "dense"
    value_map: str = "kronecker"
    output_map: str = "kronecker"

    def __post_init__(self) -> None:
        for name in ("query_map", "key_map", "value_map", "output_map"):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in MIXING:
                raise unknown_name(name, getattr(self, name), MIXING)
        super().__post_init__()

    def made(self, *, pair: bool, device: Any, dtype: Any) -> MultiHeadAttention:
        """The module, reading one stream, or a pair of them side by side."""
        mixing = (self.query_map, self.key_map, self.value_map)
        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=partial(ChanneledProjection, mixing=mixing, pair=pair),
            output=partial(ChanneledOutput, mixing=self.output_map),  # type: ignore[arg-type]
        )

    def build(self, *, device: Any = None, dtype: Any = None) -> MultiHeadAttention:
        """The module."""
        return self.made(pair=False, device=device, dtype=dtype)


def dual_streams(
    layers: int,
    *,
    dim: int,
    heads: int,
    mlp: int | None = None,
    values: str = "token",
    channels: int | None = None,
    frozen: bool = False,
    device: Any = None,
    dtype: Any = None,
    **options: Any,
) -> DualStreams:
    """A dual-stream transformer without embeddings and without a head.

    Args:
        layers: number of layers.
        dim, heads: width of each stream, heads.
        mlp: width of the MLPs. Default 4·dim.
        values: "token", of the token stream alone, or "sum", of both.
        channels: of the norms. Default `heads`; 1 is ordinary layer normalisation.
        frozen: the token stream stays the input, attention writes to the context stream.
        device, dtype: of the parameters.
        options: options of the mechanism `dual_stream`.
    """
    at_least_one("dual_streams", layers=layers)
    flag("frozen", frozen)
    if not isinstance(values, str) or values not in ("token", "sum"):
        raise unknown_name("source of values", values, ("token", "sum"))
    device, dtype = place("dual_streams", device, dtype)
    config = DualStream(dim=dim, heads=heads, **options)
    channels = heads if channels is None else channels
    kind = {"device": device, "dtype": dtype}
    blocks = [
        StreamBlock(
            config.made(pair=values == "token", **kind),
            dim,
            mlp=4 * dim if mlp is None else mlp,
            channels=channels,
            frozen=frozen,
            **kind,
        )
        for _ in range(layers)
    ]
    return DualStreams(blocks, dim, channels=channels, **kind)
