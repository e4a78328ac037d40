"""Projections whose heads all pass through one small map."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.checks import given, several
from polyhead.errors import ConfigError, unknown_name
from polyhead.nn.projections import Projection

__all__ = ["GatedMap", "KnockingProjection", "SquareMap"]

_NAMES = {"q": "query", "k": "key", "v": "value"}


class SquareMap(nn.Module):
    """z T, with T `(D, D)` the identity at the start."""

    def __init__(self, width: int, **kind: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width, **kind))

    def forward(self, z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return z @ self.weight

    def flops(self, rows: int) -> int:
        """Operations for so many vectors."""
        return 2 * rows * self.weight.numel()


class GatedMap(nn.Module):
    """2 · ((z U) ⊙ sigmoid(z G)) W, with U and W the identity and G zero at the start: z itself."""

    def __init__(self, width: int, **kind: Any) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.eye(width, **kind)) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(width, width, **kind))

    def forward(self, z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return 2 * (((z @ self.up) * torch.sigmoid(z @ self.gate)) @ self.down)

    def flops(self, rows: int) -> int:
        """Operations for so many vectors."""
        return 6 * rows * self.up.numel()


class KnockingProjection(Projection):
    """Queries, keys or values of all heads, mapped by a `SquareMap` or a `GatedMap` that the heads share.

    The map stands right behind the projection, before `qk_norm` and the position encoding.

    Args:
        dim, heads, options: those of `Projection`.
        knock: "linear" or "mlp", which maps values only.
        on: which of "q", "k", "v" are mapped.
    """

    query_map: SquareMap | None
    key_map: SquareMap | None
    value_map: SquareMap | GatedMap | None

    def __init__(
        self, dim: int, heads: int, *, knock: str = "mlp", on: tuple[str, ...] = ("v",), **options: Any
    ) -> None:
        super().__init__(dim, heads, **options)
        if knock not in ("linear", "mlp"):
            raise unknown_name("knock", knock, ("linear", "mlp"))
        chosen = tuple(on) if several(on) else ()
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= _NAMES.keys():
            raise ConfigError(f"on must be a tuple of some of 'q', 'k', 'v', each once; got {given(on)}")
        if knock == "mlp" and chosen != ("v",):
            raise ConfigError(f"knock='mlp' maps values only: on=('v',); got on={chosen!r}")
        made = SquareMap if knock == "linear" else GatedMap
        kind: dict[str, Any] = {"device": self.query.weight.device, "dtype": self.query.weight.dtype}
        for letter, name in _NAMES.items():
            width = self.value_dim if letter == "v" else self.head_dim
            setattr(self, f"{name}_map", made(width, **kind) if letter in chosen else None)

    def queries(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B H L D"]:
        q = self.query(x).unflatten(-1, (self.query_heads, self.head_dim))  # B L H D
        q = q if self.query_map is None else self.query_map(q)
        return (q if self.query_norm is None else self.query_norm(q)).transpose(1, 2)

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        k = self.key(context).unflatten(-1, (self.kv_heads, self.head_dim))  # B S G D
        v = self.value(context).unflatten(-1, (self.kv_heads, self.value_dim))  # B S G Dv
        k = k if self.key_map is None else self.key_map(k)
        v = v if self.value_map is None else self.value_map(v)
        return (k if self.key_norm is None else self.key_norm(k)).transpose(1, 2), v.transpose(1, 2)

    def flops(self, queries: int, keys: int) -> int:
        rows = {
            "query": queries * self.query_heads,
            "key": keys * self.kv_heads,
            "value": keys * self.kv_heads,
        }
        maps = ((getattr(self, f"{name}_map"), many) for name, many in rows.items())
        return super().flops(queries, keys) + sum(one.flops(n) for one, n in maps if one is not None)

    def folded(self) -> Projection:
        """A plain projection that gives the same: W_h T written out for every head.

        Raises:
            ConfigError: a `GatedMap` is no matrix.
        """
        if isinstance(self.value_map, GatedMap):
            raise ConfigError("knock='mlp' cannot be folded, only linear maps can: build with knock='linear'")
        found = self._plain()
        with torch.no_grad():
            state = {name: t for name, t in self.state_dict().items() if "_map" not in name}
            for name in _NAMES.values():
                one = getattr(self, f"{name}_map")
                for part in ("weight", "bias"):
                    tensor = state.get(f"{name}.{part}")
                    if one is not None and tensor is not None:
                        of_heads = tensor.unflatten(0, (-1, one.weight.shape[0])).movedim(1, -1)
                        state[f"{name}.{part}"] = (of_heads @ one.weight).movedim(-1, 1).flatten(0, 1)
            found.load_state_dict(state)
        return found.train(self.training)
