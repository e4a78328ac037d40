"""One call of attention inside a pretrained model, and what may handle it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from polyhead.attend import Consumer, attend, observe
from polyhead.attend.masks import Mask
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.scores import Score
from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.hf.handles import KVHandle

__all__ = ["Call", "Entry", "Handler", "LayerInfo"]

Kind = Literal["decoder", "encoder", "cross"]


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer of a model, as its module and config tell it before anything runs.

    Attributes:
        index: place among all attention layers of the model, in forward order, from 0.
        name: path of the attention module in the model, such as `"model.layers.3.self_attn"`.
        kind: "decoder" (causal self-attention), "encoder" (self-attention in both directions) or "cross".
        heads: number of query heads H.
        kv_heads: number of key/value heads G.
        head_dim: width D of queries and keys.
        window: the keys that a query may see, itself included, where the layer has a sliding window.
        cache_index: what the layer calls itself towards a transformers `Cache` (`layer_idx`), if it does.
    """

    index: int
    name: str
    kind: Kind
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    cache_index: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What one attention layer asks for in one forward pass.

    Query row r stands at position r + (S - L) among the keys, as everywhere in Polyhead; position 0 is
    the first key held, which is token `start` of the sequence.

    Attributes:
        layer: which layer calls.
        q: `(B, H, L, D)`.
        k, v: `(B, G, S, D)` and `(B, G, S, Dv)`, or what a cache's `update` returned in their place.
        mask: who may look at whom; None: all may look at all.
        score: maps of the logits (soft cap, position bias), or None.
        normalizer: softmax, with the layer's sink logits where it has them.
        scale: factor on q·k.
        dropout: probability with which a weight is dropped; 0 outside training.
        start: how many earlier tokens the cache has dropped.
        below: the handlers that have not had the call yet, the next one last.
    """

    layer: LayerInfo
    q: Tensor
    k: Tensor | KVHandle
    v: Tensor | KVHandle
    mask: Mask | None
    score: Score | None
    normalizer: Normalizer
    scale: float
    dropout: float = 0.0
    start: int = 0
    below: tuple[Entry, ...] = ()

    def replace(self, **changes: Any) -> Call:
        """This call with some fields changed."""
        return dataclasses.replace(self, **changes)

    def observe(self, consumers: Iterable[Consumer]) -> Tensor:
        """The output, while `consumers` see all weights strip by strip (`polyhead.attend.observe`).

        Raises:
            ConfigError: the keys are in a cache that only knows how to attend.
        """
        if isinstance(self.k, KVHandle):
            raise ConfigError(
                f"layer {self.layer.name!r} attends to keys in a {type(self.k).__name__}, which cannot be "
                "observed; "
                "observe a forward pass without a cache, or with a DynamicCache"
            )
        return observe(
            self.q,
            self.k,
            self.v,  # type: ignore[arg-type]
            consumers,
            mask=self.mask,
            score=self.score,
            normalizer=self.normalizer,
            scale=self.scale,
        )

    def proceed(self) -> Tensor:
        """The output `(B, H, L, Dv)` of the handlers below this one; the last of them is `attend`."""
        if self.below:
            handler, layer = self.below[-1]
            out = handler(dataclasses.replace(self, layer=layer, below=self.below[:-1]))
            if not isinstance(out, Tensor) or out.shape[:3] != self.q.shape[:3] or out.ndim != 4:
                batch, heads, queries, _ = self.q.shape
                raise ConfigError(
                    f"layer {layer.name!r}: handler {_name(handler)} must return the output of the call, "
                    f"({batch}, {heads}, {queries}, Dv), such as call.proceed(); got {given(out)}"
                )
            return out
        if isinstance(self.k, KVHandle):
            return self.k.attend(self)
        return attend(
            self.q,
            self.k,
            self.v,  # type: ignore[arg-type]
            mask=self.mask,
            score=self.score,
            normalizer=self.normalizer,
            scale=self.scale,
            dropout=self.dropout,
        )


def _name(handler: Handler) -> str:
    return getattr(handler, "__qualname__", type(handler).__qualname__)


Handler = Callable[[Call], Tensor]
Entry = tuple[Handler, LayerInfo]
