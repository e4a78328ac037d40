"""Configurations of mechanisms: frozen, comparable, through JSON and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, TypeVar

from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer, softmax
from polyhead.attend.scores import Score
from polyhead.attend.selectors import Selector
from polyhead.attend.weight_maps import WeightMap
from polyhead.checks import given
from polyhead.description import Part
from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.contract import AttentionModule
from polyhead.nn.positions import NoPosition, Position
from polyhead.nn.projections import OutputProjection, Projection, at_least_one, divisors
from polyhead.nn.regularizers import Regularizer

__all__ = [
    "AttentionConfig",
    "GroupedConfig",
    "MechanismConfig",
    "causal_alone",
    "key_value_heads",
    "largest_divisor",
    "without_context",
]

M = TypeVar("M", bound=MultiHeadAttention)


class MechanismConfig(Part):
    """What every mechanism's configuration has: a width, a number of heads, and `build`.

    Every other field has a default that fits any `dim` and `heads`. A value that is not allowed fails when
    the configuration is made: what it would build is tried without memory.
    """

    dim: int
    heads: int

    def __post_init__(self) -> None:
        at_least_one(type(self).__name__, dim=self.dim, heads=self.heads)
        self.build(device="meta")

    def build(self, *, device: Any = None, dtype: Any = None) -> AttentionModule:
        """The module, with freshly drawn parameters."""
        raise NotImplementedError


class AttentionConfig(MechanismConfig):
    """The options that mechanisms made of the parts of `MultiHeadAttention` share.

    Attributes:
        dim: width of the model d.
        heads: query heads H.
        head_dim: width D of queries and keys; default dim / heads.
        value_dim: width of the values of a head; default `head_dim`.
        context_dim: width of a context; default `dim`.
        bias: whether projections have a bias.
        qk_norm: RMS-normalise queries and keys.
        position: the position encoding.
        score: maps of the logits.
        normalizer: how logits become weights.
        weight_map: maps of the weights behind the normaliser.
        mask: a mask that holds in every call.
        select: of what masks let be seen, the blocks of keys that are read, decided from the content.
        dropout: probability with which a weight is dropped in training.
        regularizers: what else acts in training only, such as `drop_head(0.1)`.
    """

    _: KW_ONLY
    head_dim: int | None = None
    value_dim: int | None = None
    context_dim: int | None = None
    bias: bool = False
    qk_norm: bool = False
    position: Position = NoPosition()
    score: Score | tuple[Score, ...] | None = None
    normalizer: Normalizer = softmax()
    weight_map: WeightMap | tuple[WeightMap, ...] | None = None
    mask: Mask | None = None
    select: Selector | None = None
    dropout: float = 0.0
    regularizers: Regularizer | tuple[Regularizer, ...] = ()

    def assemble(
        self,
        *,
        heads: int,
        kv_heads: int | None,
        device: Any,
        dtype: Any,
        projection: Callable[..., Projection] = Projection,
        output: Callable[..., OutputProjection] = OutputProjection,
        module: Callable[..., M] = MultiHeadAttention,  # type: ignore[assignment]
    ) -> M:
        """The module with so many projected query heads and key/value heads.

        Args:
            kv_heads: default `heads`.
            projection, output, module: what makes the parts and the module, called as the defaults are.
        """
        project = projection(
            self.dim,
            heads,
            kv_heads=kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            context_dim=self.context_dim,
            bias=self.bias,
            qk_norm=self.qk_norm,
            device=device,
            dtype=dtype,
        )
        join = output(self.dim, project.heads, project.value_dim, bias=self.bias, device=device, dtype=dtype)
        return module(
            project,
            join,
            position=self.position,
            score=self.score,
            normalizer=self.normalizer,
            weight_map=self.weight_map,
            mask=self.mask,
            select=self.select,
            dropout=self.dropout,
            regularizers=self.regularizers,
        )


class GroupedConfig(AttentionConfig):
    """The options of `AttentionConfig`, where query heads may share key/value heads.

    Attributes:
        kv_heads: key/value heads G, a divisor of `heads`; default `heads`.
    """

    kv_heads: int | None = None

    def __post_init__(self) -> None:
        kv_heads = key_value_heads(type(self).__name__, self.heads, self.kv_heads)
        object.__setattr__(self, "kv_heads", kv_heads)
        super().__post_init__()


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, at least 1."""
    return max(n for n in range(1, max(most, 1) + 1) if number % n == 0)


def key_value_heads(owner: str, heads: int, kv_heads: int | None) -> int:
    """`kv_heads`, or `heads` where it is None; a `ConfigError` unless it divides `heads`."""
    at_least_one(owner, heads=heads)
    if kv_heads is None:
        return heads
    at_least_one(owner, kv_heads=kv_heads)
    if heads % kv_heads:
        raise ConfigError(
            f"kv_heads must divide heads={heads}; got kv_heads={kv_heads}; allowed are {divisors(heads)}"
        )
    return kv_heads


def without_context(config: AttentionConfig) -> None:
    """A `ConfigError` where a mechanism that attends within one sequence is given the width of a context."""
    width = config.context_dim
    if width is not None and (type(width) is not int or width != config.dim):
        raise ConfigError(f"context_dim must be left out: there is no context; got {given(width)}")


def causal_alone(name: str, config: AttentionConfig, reads: str) -> None:
    """A `ConfigError` where a mechanism that is causal, and chooses what it reads, is told so otherwise."""
    if config.select is not None:
        raise ConfigError(
            f"select must be None in {name}: {reads}; got select={given(config.select)}; "
            "take grouped_query with a selector of your own"
        )
    if config.mask is not None:
        raise ConfigError(f"{name}: mask must be None: calls are causal; got {given(config.mask)}")
