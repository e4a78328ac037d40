"""How attention knows where tokens stand: encodings as descriptions, and the module that applies them."""

from polyhead.nn.positions.base import (
    AlibiPosition,
    NoPosition,
    Position,
    Sinusoidal,
    alibi_position,
    no_position,
    sinusoidal,
)
from polyhead.nn.positions.module import PositionModule
from polyhead.nn.positions.rotary import Rope, rope, rope_from_parameters
from polyhead.nn.positions.scaling import (
    DynamicNtk,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    ProportionalScaling,
    RopeScaling,
    Yarn,
)

__all__ = [
    "AlibiPosition",
    "DynamicNtk",
    "LinearScaling",
    "Llama3Scaling",
    "LongRope",
    "NoPosition",
    "Position",
    "PositionModule",
    "ProportionalScaling",
    "Rope",
    "RopeScaling",
    "Sinusoidal",
    "Yarn",
    "alibi_position",
    "no_position",
    "rope",
    "rope_from_parameters",
    "sinusoidal",
]
