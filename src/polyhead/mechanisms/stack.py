"""Stacks of mechanisms, by name: `build_stack(["mha", "grouped_query"], dim=64, heads=4)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY
from typing import Any

from polyhead.checks import flag, given, place, several
from polyhead.description import Part
from polyhead.errors import ConfigError
from polyhead.mechanisms.config import MechanismConfig
from polyhead.mechanisms.registry import configure
from polyhead.nn.projections import at_least_one
from polyhead.nn.stack import NORMS, AttentionStack

__all__ = ["StackConfig", "build_stack"]


class StackConfig(Part):
    """A stack: the configuration of every layer, all of one width.

    Attributes:
        layers: first to last.
        mlp: width of an MLP behind every attention layer; None: no MLP.
        norm: "rms" or "layer".
        final_norm: whether the output goes through a norm of its own.
    """

    layers: tuple[MechanismConfig, ...]
    _: KW_ONLY
    mlp: int | None = None
    norm: str = "rms"
    final_norm: bool = False

    def __post_init__(self) -> None:
        layers = tuple(self.layers) if several(self.layers) else ()
        if not layers or not all(isinstance(layer, MechanismConfig) for layer in layers):
            raise ConfigError(
                "layers must be configurations of mechanisms, at least one, such as "
                f"build('mha', dim=64, heads=4).config; got {given(self.layers)}"
            )
        widths = sorted({layer.dim for layer in layers})
        if len(widths) > 1:
            raise ConfigError(f"all layers must have the same dim; got {', '.join(map(str, widths))}")
        if self.mlp is not None:
            at_least_one("StackConfig", mlp=self.mlp)
        if self.norm not in NORMS:
            raise ConfigError(f"norm must be one of {', '.join(NORMS)}; got {given(self.norm)}")
        flag("final_norm", self.final_norm)
        object.__setattr__(self, "layers", layers)

    def build(self, *, device: Any = None, dtype: Any = None) -> AttentionStack:
        """The stack, with freshly drawn parameters."""
        device, dtype = place("build_stack", device, dtype)
        layers = []
        for config in self.layers:
            layer = config.build(device=device, dtype=dtype)
            layer.config = config
            layers.append(layer)
        stack = AttentionStack(
            layers,
            self.layers[0].dim,
            mlp=self.mlp,
            norm=self.norm,
            final_norm=self.final_norm,
            device=device,
            dtype=dtype,
        )
        stack.config = self
        return stack


def build_stack(
    layers: Sequence[str | tuple[str, Mapping[str, Any]] | MechanismConfig],
    *,
    dim: int,
    heads: int,
    mlp: int | None = None,
    norm: str = "rms",
    final_norm: bool = False,
    device: Any = None,
    dtype: Any = None,
    **options: Any,
) -> AttentionStack:
    """A stack of attention layers of different mechanisms: x ← x + attention(norm(x)), layer by layer.

        build_stack(["mha", ("grouped_query", {"kv_heads": 1}), "mha"], dim=64, heads=4, mlp=256)

    Args:
        layers: for each layer the name of a mechanism, or a name and options of its own, or a configuration.
        dim, heads: of every layer that is given by name.
        mlp: width of an MLP behind every attention layer. Default none.
        norm: "rms" or "layer".
        final_norm: whether the output goes through a norm of its own.
        device, dtype: of the parameters.
        options: options of every layer that is given by name, such as `position=rope()`.

    Returns:
        A module that is called as an attention module is, with `new_cache`, `new_context_cache` and `cost`.
        What it was built from is `stack.config`, and goes through JSON.

    Raises:
        UnknownName: no such mechanism; the message names the nearest.
        ConfigError: an option that a layer does not have, or a value that is not allowed.
    """
    if not several(layers):
        raise ConfigError(f"layers must be names of mechanisms, such as ['mha', 'gqa']; got {given(layers)}")
    found = []
    for layer in layers:
        if isinstance(layer, MechanismConfig):
            found.append(layer)
            continue
        name, own = (layer, {}) if isinstance(layer, str) else _named(layer)
        found.append(configure(name, **{"dim": dim, "heads": heads, **options, **own}))
    return StackConfig(tuple(found), mlp=mlp, norm=norm, final_norm=final_norm).build(
        device=device, dtype=dtype
    )


def _named(layer: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(layer, tuple | list) and len(layer) == 2:
        name, own = layer
        if isinstance(name, str) and isinstance(own, Mapping):
            return name, own
    raise ConfigError(
        "a layer must be a name, a name with options such as ('grouped_query', {'kv_heads': 1}), or a "
        f"configuration; got {given(layer)}"
    )
