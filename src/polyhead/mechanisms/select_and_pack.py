"""Select and pack: a gate picks tokens, which attend among themselves; the others are left as they are.

    s_i = max(w · x_i + b, s'_i),   z_i = 1 if s_i > θ else 0,   r_i = σ(s_i) x_i
    P   = the r_i with z_i = 1, sequence after sequence
    y_i = attention of r_i over the tokens of P of its own sequence if z_i = 1, else 0

s': scores of an earlier layer, `earlier=` of a call, for which `scores` and the `scores` of a layer before
serve, brought to this layer's places. Under a residual connection tokens that are not selected stay what they
are. The gate learns by σ(s); in training also by the choice, z of s with logistic noise (a Gumbel sigmoid),
whose gradient is that of its sigmoid; and by an auxiliary loss: for `labels=` of a call, bool (B, L), the
cross-entropy of s, or with `keep` the squared distance of the mean of σ(s - θ) from that share, both times
`weight`. The gate starts with w near 0 and b = 4: everything is selected, and the layer is nearly `mha`.

All tokens that are selected in a batch are packed in one row and kept apart by `documents`, so that no
padding is computed. With `container=C` they are packed in rows of C, as in the paper: whoever is in the same
row and of the same sequence is seen. A sequence may then begin in one row and end in another, and where it
is parted depends on the sequences before it in the batch; `shift` rolls the order of packing, as every second
layer does there. The parts are `polyhead.nn.pack` and `unpack`.

Positions are those before packing. Masks, biases of scores and selectors are refused, as tokens of a row may
have stood anywhere; there is no causal form in the paper and no cache here. `torch.compile` leaves the whole
call to Python. Cost: the parameters of grouped-query attention and d + 1; L·d for the gate, and attention of
those that are selected. `cost` counts all tokens as selected.

Paper 113: Context-Aware Token Selection and Packing for Enhanced Vision Transformer, arXiv 2410.23608. No
code is known. Our readings: θ = 0 in training and after it; the loss is a mean over tokens where the paper
has a sum; no bias by relative position; the loss for a share of tokens, for tasks without labels of places.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import given, number, several, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import GroupedConfig, without_context
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.select_and_pack import SelectAndPackAttention

__all__ = ["SelectAndPack"]


@register(
    "select_and_pack",
    aliases=("select_and_pack_attention",),
    paper="113",
    title="Context-Aware Token Selection and Packing for Enhanced Vision Transformer",
    family="sparse",
    summary="a gate picks tokens, which are packed and attend among themselves; the others stay as they are",
    equation=(
        "s_i = w·x_i + b;  head_h,i = Σ_j softmax_j(q_i·k_j / √D) v_j over j with s_j > θ if s_i > θ, "
        "else 0;  q, k, v of σ(s_j) x_j"
    ),
    supports=frozenset({"self"}),
    facets=Facets(positions="hard"),
    graph_breaks=1,
    promises=Promises(routed=True, any_mask=False),
)
class SelectAndPack(GroupedConfig):
    """Attention among selected tokens.

    Attributes:
        threshold: θ; tokens with larger scores are selected.
        container: C, tokens of a row; None: one row for all, where sequences never are parted.
        grid: height and width of a grid of tokens, row by row, for `shift`; None: a sequence.
        shift: places by which the order of packing is rolled, on every axis; takes a container.
        keep: share of tokens that the auxiliary loss aims at in calls without labels; None: no such loss.
        weight: of the auxiliary losses. The paper takes 0.01.
    """

    threshold: float = 0.0
    container: int | None = None
    grid: tuple[int, int] | None = None
    shift: int = 0
    keep: float | None = None
    weight: float = 0.01

    def __post_init__(self) -> None:
        without_context(self)
        object.__setattr__(self, "threshold", number("threshold", self.threshold))
        if self.container is not None:
            whole("container", self.container, 1)
        if self.grid is not None:
            if not several(self.grid) or len(self.grid) != 2:
                raise ConfigError(f"grid must be (height, width) in tokens; got {given(self.grid)}")
            object.__setattr__(self, "grid", tuple(whole("grid", n, 1, 1 << 12) for n in self.grid))
        if whole("shift", self.shift, 0) and self.container is None:
            raise ConfigError(f"shift must be 0 without a container: nothing is parted; got {self.shift}")
        if self.keep is not None:
            object.__setattr__(self, "keep", number("keep", self.keep, least=0, most=1))
        object.__setattr__(self, "weight", number("weight", self.weight, least=0))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> SelectAndPackAttention:
        """The module."""
        module = partial(
            SelectAndPackAttention,
            threshold=self.threshold,
            container=self.container,
            grid=self.grid,
            shift=self.shift,
            keep=self.keep,
            weight=self.weight,
        )
        return self.assemble(
            heads=self.heads, kv_heads=self.kv_heads, device=device, dtype=dtype, module=module
        )
