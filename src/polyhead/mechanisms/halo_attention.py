"""HaloNet's attention: the queries of a block see the block and a halo around it.

    i sees j  if on every axis  s_i - h ≤ j < s_i + b + h,   s_i the first place of i's block of b
    head_h = softmax over these of ((q_i · k_j + q_i · r_y[Δy] + q_i · r_x[Δx]) / √D) v_j
    y = concat_h(head_h) W_O

r_y, r_x: (2(b + h) - 1, D), shared by the heads, normal with deviation 1/√D. What lies beyond the border is
not there. With h = 0 it is attention within blocks, with b = 1 a window of (2h + 1)² around every place, and
with b the whole grid and h = 0 full attention. It moves with the picture by multiples of b only.

q: (B, H, L, D), k, v: (B, G, S, D), which `attend` gets (b + 2h) wider for each axis: the offsets are then
part of q · k. Cost: that of grouped-query attention and 2 (2(b + h) - 1) D parameters; a query reads
(b + 2h)² keys. `cost` counts all pairs, as it does with masks.

Without a grid, blocks along a sequence, with one table. Causal calls see what is past within their region.

Paper 132: Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731. Our
readings: q · r has the factor of q · k; blocks at the border may be smaller. Its form that asks for every
s-th place only is the full output at these places, and is not here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.attend.masks import Halo
from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.halo_attention import HaloAttention

__all__ = ["BlocksWithHalo"]


@register(
    "halo_attention",
    aliases=("halonet_attention",),
    paper="132",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    family="sparse",
    summary="the queries of a block of a grid see the block and a halo around it, and how far away a key is",
    equation=(
        "head_h = Σ_j softmax_j((q_i·k_j + q_i·r_y[Δy] + q_i·r_x[Δx]) / √D) v_j over j in i's block and at "
        "most h places around it"
    ),
    supports=frozenset({"self", "causal_self"}),
    facets=Facets(positions="local"),
)
class BlocksWithHalo(GroupedConfig):
    """Attention within blocks and a halo around them.

    Attributes:
        grid: height and width of a grid of tokens, row by row; None: a sequence.
        block: b, the length of a block on each axis.
        halo: h, places around it on each side.
    """

    grid: tuple[int, int] | None = None
    block: int = 8
    halo: int = 3

    def __post_init__(self) -> None:
        without_context(self)
        if self.grid is not None:
            if not several(self.grid) or len(self.grid) != 2:
                raise ConfigError(f"grid must be (height, width) in tokens; got {given(self.grid)}")
            object.__setattr__(self, "grid", tuple(whole("grid", n, 1, 1 << 12) for n in self.grid))
        whole("block", self.block, 1, 1 << 12)
        whole("halo", self.halo, 0, 1 << 12)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> HaloAttention:
        """The module."""
        axes = 1 if self.grid is None else 2
        pattern = Halo(self.grid, (self.block,) * axes, (self.halo,) * axes)
        module = partial(HaloAttention, pattern=pattern, name="halo_attention")
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
