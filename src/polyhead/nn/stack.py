"""A stack of attention layers, each of whatever mechanism, with residuals.

    x ← x + attention_n(norm(x));   x ← x + W₂ gelu(W₁ norm(x))   where there is an MLP

for n = 1..N: the pre-norm transformer, without embeddings and without a head.

A layer may read embeddings besides (`takes_embeddings`): the inputs x of the stack, or a fixed sequence that
goes through the same layers beside x, once for the whole batch:

    e ← layer_n(e),  of which layer n reads norm_n(e)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polyhead.attend.masks import Mask
from polyhead.checks import given, place, several
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.contract import AttentionModule
from polyhead.nn.cost import Cost
from polyhead.nn.inputs import check_inputs
from polyhead.nn.kv_cache import KeyValueCache
from polyhead.nn.layer_norm import LayerNorm
from polyhead.nn.projections import FanInLinear, HeadNorm, at_least_one

__all__ = ["NORMS", "AttentionStack", "StackCache", "rows_of"]

NORMS = ("rms", "layer")


class StackCache:
    """One cache for every layer of a stack, and one for every layer that a fixed sequence goes through.

    Args:
        layers: the caches of the layers, in their order; at least one.
        beside: those of the fixed sequence, for a batch of one, in the first layers. Default: none.
    """

    def __init__(self, layers: Sequence[KeyValueCache], beside: Sequence[KeyValueCache] = ()) -> None:
        self.layers = tuple(layers)
        self.beside = tuple(beside)

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length

    @property
    def holds_context(self) -> bool:
        """Whether these are the keys and values of a context."""
        return self.layers[0].holds_context

    def nbytes(self) -> int:
        """Bytes of memory of all layers."""
        return sum(layer.nbytes() for layer in (*self.layers, *self.beside))

    def reorder(self, beam_index: Tensor) -> None:
        """Make batch item n go on from what was item `beam_index[n]`."""
        for layer in self.layers:
            layer.reorder(beam_index)

    def crop(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        for layer in (*self.layers, *self.beside):
            layer.crop(length)

    def reset(self) -> None:
        """Forget every token."""
        for layer in (*self.layers, *self.beside):
            layer.reset()


def rows_of(sequence: Float[Tensor, "n d"], first: int, count: int) -> Float[Tensor, "1 count d"]:
    """So many tokens of a fixed sequence.

    Raises:
        ShapeError: it is not that long.
    """
    if first + count > len(sequence):
        raise ShapeError(
            f"the fixed sequence has {len(sequence)} tokens, and the call reaches {first + count}; build "
            f"with length={first + count} or more, or give a longer one"
        )
    return sequence[None, first : first + count]


class Mlp(nn.Module):
    """W₂ gelu(W₁ x + b₁) + b₂."""

    def __init__(self, dim: int, width: int, **kind: Any) -> None:
        super().__init__()
        self.up = FanInLinear(dim, width, bias=True, **kind)
        self.down = FanInLinear(width, dim, bias=True, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _Layer(nn.Module):
    """One layer: attention and, where there is one, an MLP, each behind a norm and beside a residual."""

    def __init__(self, attention: AttentionModule, dim: int, mlp: int | None, norm: str, **kind: Any) -> None:
        super().__init__()

        def make() -> nn.Module:
            return HeadNorm(dim, eps=1e-6, **kind) if norm == "rms" else LayerNorm(dim, eps=1e-6, **kind)

        self.norm = make()
        self.attention = attention
        self.mlp_norm = None if mlp is None else make()
        self.mlp = None if mlp is None else Mlp(dim, mlp, **kind)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        *,
        inputs: Tensor | None = None,
        sequence: Tensor | None = None,
        **call: Any,
    ) -> Tensor:
        if (wanted := self.attention.takes_embeddings) is not None:
            found = inputs if wanted == "inputs" else None if sequence is None else self.norm(sequence)
            call["embeddings"] = found
        x = x + self.attention(self.norm(x), context, **call)
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x))


class AttentionStack(nn.Module):
    """Attention layers in a row, called as one attention module is.

    Args:
        layers: the attention modules, first to last, all of width `dim`.
        dim: width d of inputs and outputs.
        mlp: width of an MLP behind every attention layer. Default none.
        norm: "rms" or "layer".
        final_norm: whether the output goes through a norm of its own.
        device, dtype: of the norms and MLPs.

    Attributes:
        config: the description that `build_stack` built it from; None if it was put together by hand.
    """

    config: Part | None = None

    def __init__(
        self,
        layers: Sequence[AttentionModule],
        dim: int,
        *,
        mlp: int | None = None,
        norm: str = "rms",
        final_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        found = list(layers) if several(layers) else []
        if not found or not all(isinstance(layer, AttentionModule) for layer in found):
            raise ConfigError(f"layers must be attention modules, at least one; got {given(layers)}")
        at_least_one("AttentionStack", dim=dim, **({} if mlp is None else {"mlp": mlp}))
        if norm not in NORMS:
            raise ConfigError(f"norm must be one of {', '.join(NORMS)}; got {given(norm)}")
        device, dtype = place("AttentionStack", device, dtype)
        kind = {"device": device, "dtype": dtype}
        self.dim = dim
        self.layers = nn.ModuleList(_Layer(layer, dim, mlp, norm, **kind) for layer in found)
        self.norm: nn.Module | None = None
        if final_norm:
            self.norm = HeadNorm(dim, eps=1e-6, **kind) if norm == "rms" else LayerNorm(dim, 1e-6, **kind)

    @property
    def attention(self) -> tuple[AttentionModule, ...]:
        """The attention modules, first to last."""
        return tuple(layer.attention for layer in self._layers)

    @property
    def _layers(self) -> tuple[_Layer, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, _Layer))

    @property
    def _beside(self) -> int:
        """How many layers a fixed sequence goes through: those before the last that reads it."""
        reading = [n for n, layer in enumerate(self.attention) if layer.takes_embeddings == "sequence"]
        return max(reading, default=0)

    def _sequence(self, given: Tensor | None, first: int, count: int) -> Tensor | None:
        """Those tokens of the fixed sequence, None where no layer reads one."""
        own = [layer.sequence for layer in self.attention if layer.takes_embeddings == "sequence"]
        if given is None:
            return rows_of(own[0], first, count) if own else None  # type: ignore[arg-type]
        if not own:
            raise ConfigError("sequence was given, and no layer reads one; leave it out")
        if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != self.dim:
            shape = tuple(given.shape) if isinstance(given, Tensor) else given
            raise ShapeError(f"sequence must have shape (n, {self.dim}); got {shape}")
        return rows_of(given, first, count)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        context: Float[Tensor, "B S dc"] | None = None,
        *,
        mask: Mask | Sequence[Mask | None] | None = None,
        padding: Bool[Tensor, "B n"] | None = None,
        positions: Int[Tensor, "*B L"] | None = None,
        cache: StackCache | None = None,
        sequence: Float[Tensor, "n d"] | None = None,
    ) -> Float[Tensor, "B L d"]:
        """Run the layers one after the other.

        Args:
            x: inputs `(B, L, d)`.
            context: what every layer attends to; None: its own inputs.
            mask: who may look at whom, for all layers or a sequence with one for each.
            padding, positions: see `MultiHeadAttention.forward`; every layer has them.
            cache: from `new_cache` or `new_context_cache`.
            sequence: what goes through the layers beside x, where one reads a fixed sequence; at least as
                long as what has been seen with this call. It has no padding, stands at 0, 1, 2, ..., and
                is looked at under the masks of the call, which must be the same for every batch item then.
                Default the sequence of the first layer that has one.
        """
        check_inputs("x", x, self.dim)
        masks = list(mask) if isinstance(mask, list | tuple) else [mask] * len(self.layers)
        if len(masks) != len(self.layers):
            raise ConfigError(
                f"mask must be one mask, or one for each of {len(self.layers)} layers; got {len(masks)}"
            )
        if cache is not None and (not isinstance(cache, StackCache) or len(cache.layers) != len(self.layers)):
            raise ConfigError(
                f"cache must be what new_cache or new_context_cache of this stack gives; got {given(cache)}"
            )
        call = {"padding": padding, "positions": positions, "inputs": x}
        past, last = (() if cache is None else cache.beside), self._beside
        e = beginning = self._sequence(sequence, 0 if cache is None else cache.length, x.shape[1])
        for n, layer in enumerate(self.layers):
            own = None if cache is None else cache.layers[n]
            x = layer(x, context, mask=masks[n], cache=own, sequence=e, **call)
            if e is not None and n < last:
                own = past[n] if past else None
                e = layer(e, None, mask=masks[n], cache=own, sequence=e, inputs=beginning)
        return x if self.norm is None else self.norm(x)

    def new_cache(self, batch: int = 1, **options: Any) -> StackCache:
        """An empty cache for every layer; the options are those of `AttentionModule.new_cache`."""
        return StackCache(
            [layer.new_cache(batch, **options) for layer in self.attention],
            [layer.new_cache(1, **options) for layer in self.attention[: self._beside]],
        )

    def new_context_cache(self, context: Float[Tensor, "B S dc"], **options: Any) -> StackCache:
        """A context projected once for every layer; see `AttentionModule.new_context_cache`."""
        return StackCache([layer.new_context_cache(context, **options) for layer in self.attention])

    def cost(
        self,
        length: int,
        batch: int = 1,
        context_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Cost:
        """What one forward pass of all layers costs; the products of MLPs count as projections.

        A fixed sequence that goes through layers beside the inputs is one more batch item there, also of
        what a cache holds.
        """
        return self._sum(
            lambda layer, count, of: layer.cost(length, count, of, dtype=dtype), length, batch, context_length
        )

    def step_cost(
        self, cached: int, queries: int = 1, batch: int = 1, *, dtype: torch.dtype | None = None
    ) -> Cost:
        """What a causal call costs: `queries` new tokens after `cached` ones, 0 for none.

        A fixed sequence counts as in `cost`.
        """
        return self._sum(
            lambda layer, count, _: layer.step_cost(cached, queries, count, dtype=dtype), queries, batch
        )

    def _sum(
        self,
        cost: Callable[[AttentionModule, int, int | None], Cost],
        length: int,
        batch: int,
        context_length: int | None = None,
    ) -> Cost:
        """Over the layers, their MLPs, and what goes through some of them beside the inputs."""
        fields = dict.fromkeys((f.name for f in dataclasses.fields(Cost)), 0)
        last = self._beside
        for n, layer in enumerate(self._layers):
            costs = [cost(layer.attention, batch, context_length)]
            if n < last:
                beside = cost(layer.attention, 1, None)
                costs.append(dataclasses.replace(beside, kv_bytes_per_token=0, state_bytes=0))
            if (mlp := layer.mlp) is not None:
                weights = mlp.up.weight.numel() + mlp.down.weight.numel()
                fields["projections"] += 2 * (batch + (n < last)) * length * weights
            for name in fields:
                fields[name] += sum(getattr(cost, name) for cost in costs)
        fields["parameters"] = sum(p.numel() for p in self.parameters())
        return Cost(**fields)
