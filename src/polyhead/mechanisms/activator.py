"""Activator: gated linear units in the place of attention, and nothing that lets tokens meet.

    unit(x) = W₃ (LN_f(gelu(W₁ x + b₁)) ⊙ LN_f(W₂ x + b₂)) + b₃        one LN_f, of width f, for both
    block:  x ← x + unit(LN x);   x ← x + ffn(LN x),  ffn(x) = W₅ gelu(W₄ x + b₄) + b₅     one LN for both

`ffn=False` leaves out the second line, which is the variant of the paper that has gated units only.

Every token is mapped by itself, and nothing tells where it stands: a model of such blocks is a bag of its
tokens, which it can only add up at its end. It is the control that says how much attention is worth on a
task; what takes a comparison of two tokens it cannot learn. A mask changes nothing, a context is refused, a
cache keeps nothing. There are no heads: their number is taken, as of everything that can stand in the place
of attention, and changes nothing.

`activator_glu` is the unit alone, for stacks, which have norms and residuals of their own:
`build_stack(["activator_glu"] * n, dim=, heads=, norm="layer")` are n blocks without `ffn`; with `mlp=f` they
have one, with a norm of its own.

Cost: unit 3·d·f + 4·f + d parameters, ffn 2·d·f + f + d, a norm 2·d; 6·d·f and 4·d·f operations a token.

Paper 016: Activator, GLU Activations as The Core Functions of a Vision Transformer, arXiv 2405.15953, with
f = 2·d; its classifier takes the mean over the tokens. It calls the gated unit a replacement of attention,
and its code is what is built here. Ours: `shared_norm=False`.
"""

from __future__ import annotations

from typing import Any

from polyhead.checks import flag, number, place
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import MechanismConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.flow import Flow, Step
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.gated_unit import GATES, FeedForward, GatedBlock, GatedUnit
from polyhead.nn.projections import at_least_one

__all__ = ["ActivatorBlock", "ActivatorUnit"]

_TITLE = "Activator: GLU Activations as The Core Functions of a Vision Transformer"
_FACETS = Facets(positions="local", alignment="other", distribution="other")
_SELF = frozenset({"self", "causal_self"})
_UNIT = (
    Step("gate", "d → f, activation, norm"),
    Step("value", "d → f, the same norm"),
    Step("merge", "their product, f → d"),
)


class _Gated(MechanismConfig):
    """What unit and block share."""

    width: int | None = None
    activation: str = "geglu"

    def __post_init__(self) -> None:
        name = type(self).__name__
        at_least_one(name, dim=self.dim, heads=self.heads)
        width = 2 * self.dim if self.width is None else self.width
        at_least_one(name, width=width)
        if not isinstance(self.activation, str) or self.activation not in GATES:
            raise unknown_name("activation", self.activation, GATES)
        object.__setattr__(self, "width", width)
        super().__post_init__()

    def _unit(self, **kind: Any) -> GatedUnit:
        assert self.width is not None
        return GatedUnit(self.dim, self.width, activation=self.activation, **kind)


@register(
    "activator_glu",
    paper="016",
    title=_TITLE,
    family="feed-forward",
    summary="a gated linear unit on single tokens, to stand where attention stands: what attention is worth",
    equation="y = W₃ (LN(gelu(W₁ x)) ⊙ LN(W₂ x))",
    supports=_SELF,
    facets=_FACETS,
    picture=Flow((Step("x", "(L, d)"),), (), (*_UNIT, Step("y", "(L, d)"))),
    promises=Promises(tokenwise=True),
)
class ActivatorUnit(_Gated):
    """The gated unit of Activator.

    Attributes:
        heads: has no effect.
        width: f, inner width; default 2 · dim.
        activation: "geglu", "swiglu" or "reglu".
    """

    def build(self, *, device: Any = None, dtype: Any = None) -> GatedUnit:
        """The module."""
        return self._unit(device=device, dtype=dtype)


@register(
    "activator_glu_block",
    aliases=("activator",),
    paper="016",
    title=_TITLE,
    family="feed-forward",
    summary="a whole block of a gated unit and a feed-forward layer, in which no token sees another",
    equation="x ← x + W₃ (LN(gelu(W₁ z)) ⊙ LN(W₂ z)), z = LN x;  x ← x + W₅ gelu(W₄ LN x)",
    supports=_SELF,
    facets=_FACETS,
    picture=Flow(
        (Step("x", "(L, d)"), Step("norm", "one for both sub-layers")),
        (),
        (*_UNIT, Step("residual", "+ x"), Step("ffn", "d → f → d of the norm, + x"), Step("y", "(L, d)")),
    ),
    promises=Promises(tokenwise=True),
)
class ActivatorBlock(_Gated):
    """A block of Activator, with its norms and residuals.

    Attributes:
        heads: has no effect.
        width: f, inner width of both sub-layers; default 2 · dim.
        activation: of the gate, "geglu", "swiglu" or "reglu".
        ffn: whether a feed-forward layer follows the unit.
        shared_norm: whether both sub-layers have one norm.
        dropout: probability with which numbers inside and behind the feed-forward layer are dropped in
            training.
    """

    ffn: bool = True
    shared_norm: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        flag("ffn", self.ffn)
        flag("shared_norm", self.shared_norm)
        object.__setattr__(self, "dropout", number("dropout", self.dropout, least=0, below=1))
        if self.dropout and not self.ffn:
            raise ConfigError(
                f"dropout must be 0 with ffn=False, where nothing would be dropped; got {self.dropout}"
            )
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> GatedBlock:
        """The module."""
        assert self.width is not None
        device, dtype = place("activator_glu_block", device, dtype)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        unit = self._unit(**kind)
        ffn = FeedForward(self.dim, self.width, dropout=self.dropout, **kind) if self.ffn else None
        return GatedBlock(unit, ffn, shared_norm=self.shared_norm, **kind)
