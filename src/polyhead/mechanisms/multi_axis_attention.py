"""Multi-axis attention: within blocks of a grid, and on lattices that stretch over all of it.

    block   i sees j  if both lie in the same block of P × P places
    grid    i sees j  if they are a multiple of (⌈height/G⌉, ⌈width/G⌉) apart: at most G × G places
    head_h = softmax over these of (q_i · k_j / √D + B_h[offset of j from i]) v_j,   y = concat_h(head_h) W_O

Both are linear in the number of places. One after the other they reach everything where P divides height and
width, and ⌈height/G⌉ and ⌈width/G⌉ are at most P: MaxViT has a layer of `axis="block"` and then one of
`axis="grid"`, each with an MLP of its own, which a stack makes of two entries. With `axis="both"` half of the
heads take blocks, and half lattices, in one layer.

B_h: a learned number for every offset within the block, or every step on the lattice, (2P-1)² or (2G-1)² a
head, truncated normal with deviation 0.02; leave it out of weight decay. Where P or G does not divide the
grid, the last blocks are smaller and some lattices thinner.

Without a grid, blocks of P along a sequence, and every P-th token: its offsets are clipped at G - 1. Causal
calls attend to what is past within both.

Cost: the parameters of grouped-query attention and of B; P² or G² keys are read a query. `cost` counts all
pairs, as it does with masks.

Paper 034: MaxViT, Multi-Axis Vision Transformer, arXiv 2204.01697; its convolutions are not part of this. A
form in which both axes share a layer is known from published code; that they share it by heads, and
sequences, are ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from polyhead.attend.masks import Mask, halo, lattice, per_head
from polyhead.attend.scores import WindowBias, chain, window_bias
from polyhead.attend.scores.window import window_offsets
from polyhead.checks import given, several, whole
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.patterned import PatternedAttention
from polyhead.nn.projections import at_least_one

__all__ = ["MultiAxis"]


@register(
    "multi_axis_attention",
    aliases=("maxvit_attention",),
    paper="034",
    title="MaxViT: Multi-Axis Vision Transformer",
    family="sparse",
    summary="heads attend within blocks of a grid, or on lattices that stretch over all of it",
    equation=(
        "head_h = Σ_j softmax_j(q_i·k_j / √D + B_h[offset]) v_j over j in the same block of P × P, or on the "
        "same lattice of G × G"
    ),
    supports=frozenset({"self", "causal_self"}),
    promises=Promises(least_heads=2),
)
class MultiAxis(GroupedConfig):
    """Attention within blocks and on lattices.

    Attributes:
        grid: height and width of a grid of tokens, row by row; None: a sequence.
        window: P, the length of a block on each axis. MaxViT has 7 to 12.
        spread: G, places of a lattice on each axis; default P.
        axis: "block", "grid", or "both": half of the heads each, which takes two heads.
    """

    grid: tuple[int, int] | None = None
    window: int = 12
    spread: int | None = None
    axis: str = "both"

    def __post_init__(self) -> None:
        at_least_one("MultiAxis", heads=self.heads)
        without_context(self)
        if self.grid is not None:
            if not several(self.grid) or len(self.grid) != 2:
                raise ConfigError(f"grid must be (height, width) in tokens; got {given(self.grid)}")
            object.__setattr__(self, "grid", tuple(whole("grid", n, 1, 1 << 12) for n in self.grid))
        whole("window", self.window, 1, 1 << 12)
        spread = self.window if self.spread is None else whole("spread", self.spread, 1, 1 << 12)
        object.__setattr__(self, "spread", spread)
        if not isinstance(self.axis, str) or self.axis not in ("block", "both", "grid"):
            raise unknown_name("axis of multi_axis_attention", self.axis, ("block", "both", "grid"))
        if self.axis == "both" and self.heads < 2:
            raise ConfigError(
                f"heads must be at least 2, so that some take blocks and some lattices; got {self.heads}; "
                'one head takes axis="block" or axis="grid"'
            )
        super().__post_init__()

    @property
    def _blocks(self) -> int:
        """Heads that take blocks; the others take lattices."""
        return {"block": self.heads, "grid": 0, "both": self.heads // 2}[self.axis]

    @property
    def _steps(self) -> tuple[int, ...]:
        assert self.spread is not None
        return (self.window,) if self.grid is None else tuple(-(-n // self.spread) for n in self.grid)

    def pattern(self) -> Mask:
        """Who looks at whom, head by head."""
        near, far = halo(self.grid, self.window), lattice(self.grid, self._steps)
        if self._blocks in (0, self.heads):
            return near if self._blocks else far
        return per_head([near] * self._blocks + [far] * (self.heads - self._blocks))

    def build(self, *, device: Any = None, dtype: Any = None) -> PatternedAttention:
        """The module."""
        module = partial(PatternedAttention, pattern=self.pattern(), name="multi_axis_attention")
        bias = self._bias(device)

        def assembled(*parts: Any, **options: Any) -> PatternedAttention:
            own = options.pop("score")
            score = chain(bias if own is None else (bias, chain(own)))  # type: ignore[arg-type]
            return module(*parts, score=score, **options)

        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=assembled
        )

    def _bias(self, device: Any) -> WindowBias:
        """The learned bias, freshly drawn."""
        assert self.spread is not None
        axes, near, far = len(self._steps), self._blocks, self.heads - self._blocks
        windows = [(self.window,) * axes] * near + [(self.spread,) * axes] * far
        steps = [(1,) * axes] * near + [self._steps] * far
        table = torch.empty(sum(map(window_offsets, windows)), device=device)
        nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)
        return window_bias(table.requires_grad_(), windows, steps, self.grid)
