"""Weight maps: what happens to the weight of a pair after the normaliser.

A `WeightMap` maps the weights of one tile, whole rows `(B, H, r, c)`, to new weights of the same shape. The
weights of pairs that the mask forbids are 0 when they come in, and are put to 0 again when they have been
mapped: a map across heads gives nothing away that the mask of a head hides. What comes out need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from polyhead.attend.tile import Tile
from polyhead.checks import given, several
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = ["WeightChain", "WeightMap", "same_shape", "weight_chain"]


class WeightMap(Part):
    """A map of the weights of a tile.

    Attributes:
        whole_heads: True when the map needs all heads of the call in one tile, not some of them.
        rows_back: queries before a query whose pairs the map reads.
        keeps_zeros: True when a pair that has weight 0 in all heads still has it afterwards.
    """

    whole_heads: ClassVar[bool] = False
    rows_back: ClassVar[int] = 0
    keeps_zeros: ClassVar[bool] = False

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        """The new weights of `tile`, `(B, H, r, c)`, differentiable; `weights` itself is left as it was."""
        raise NotImplementedError(f"{type(self).__name__} does not define apply()")


class WeightChain(WeightMap):
    """Several weight maps, applied from left to right."""

    maps: tuple[WeightMap, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.maps, tuple | list):
            raise ConfigError(f"weight_map must be a WeightMap or a sequence of them, got {given(self.maps)}")
        for one in self.maps:
            if not isinstance(one, WeightMap):
                raise ConfigError(
                    f"weight_map must be a WeightMap or a sequence of them, got {given(one)} inside"
                )
        object.__setattr__(self, "maps", tuple(self.maps))

    @property
    def whole_heads(self) -> bool:  # type: ignore[override]
        return any(one.whole_heads for one in self.maps)

    @property
    def rows_back(self) -> int:  # type: ignore[override]
        return sum(one.rows_back for one in self.maps)

    @property
    def keeps_zeros(self) -> bool:  # type: ignore[override]
        return all(one.keeps_zeros for one in self.maps)

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        for one in self.maps:
            weights = one.apply(weights, tile)
        return weights


def weight_chain(weight_map: WeightMap | Iterable[WeightMap] | None) -> WeightMap | None:
    """What a caller passed as `weight_map=`, as one `WeightMap` (or None): nested chains become flat."""
    if weight_map is None or (isinstance(weight_map, WeightMap) and not isinstance(weight_map, WeightChain)):
        return weight_map
    if not isinstance(weight_map, WeightChain):
        if not several(weight_map) or isinstance(weight_map, Tensor):
            raise ConfigError(
                f"weight_map must be a WeightMap or a sequence of them, got {given(weight_map)}"
            )
        weight_map = WeightChain(tuple(weight_map))
    flat: list[WeightMap] = []
    for part in weight_map.maps:
        inner = weight_chain(part)
        flat += inner.maps if isinstance(inner, WeightChain) else [] if inner is None else [inner]
    return flat[0] if len(flat) == 1 else WeightChain(tuple(flat)) if flat else None


def same_shape(part: Part, made: Tensor, given_to_it: Tensor) -> Tensor:
    """What a map made, or a `ShapeError` unless it has the shape of what it was given."""
    if not isinstance(made, Tensor) or made.shape != given_to_it.shape:
        raise ShapeError(
            f"{type(part).__name__}.apply() must keep the shape {tuple(given_to_it.shape)}; it returned "
            f"{given(made)}"
        )
    return made
