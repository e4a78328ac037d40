"""How a model reads under a method: everything, what selectors choose, or chunks at other positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.selectors import Follow, Lead, Selector
from polyhead.hf import Call, LayerInfo, attach
from polyhead.hf.handles import keys_of
from polyhead.hf.long_heads import LongHeads
from polyhead.hf.selecting import LayerSelectors, Selecting, by_layer
from polyhead.nn.long_heads import keys_of_chunks
from polyhead.sparsify.counting import keys_read

__all__ = ["Case", "Chunks", "Counting", "Dense", "Read", "Reader", "Selected", "reading"]


@dataclass(frozen=True)
class Case:
    """What a method is set up for.

    Attributes:
        model: it has been loaded and is in evaluation mode.
        layers: its attention layers.
        tokens: of the text that it reads.
    """

    model: Any
    layers: tuple[LayerInfo, ...]
    tokens: int

    @classmethod
    def of(cls, model: Any, tokens: int) -> Case:
        """A model, its layers looked up, and a number of tokens."""
        with attach(model) as attachment:
            return cls(model, tuple(attachment.layers), tokens)


@dataclass(frozen=True)
class Read:
    """One call of attention as it is read.

    Attributes:
        keys: how many keys its queries read, over sequences, heads and queries.
        out: its output, `(B, H, L, Dv)`.
    """

    keys: Callable[[], float]
    out: Callable[[], Tensor]


class Reader(ABC):
    """A handler of a model's calls that reads less, and can say how many keys that is.

    Attributes:
        selectors: what it chooses by, for those who measure what is missed; None: they cannot.
        whole: layers of which it is known that they read everything.
        followed: layers without which others cannot be asked what they read.
    """

    selectors: LayerSelectors | None = None
    whole: frozenset[int] = frozenset()
    followed: frozenset[int] = frozenset()

    @abstractmethod
    def read(self, call: Call) -> Read:
        """A call, as it is read. Layers call in order."""

    def copy(self) -> Reader:
        """The same in the middle of a text, which can go on in several ways; itself if it keeps nothing."""
        return self

    def before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention layer `index` is about to be called: for readers that keep something of its cache."""
        return None

    def __call__(self, call: Call) -> Tensor:
        return self.read(call).out()


class Dense(Reader):
    """Everything that the model's own mask lets be seen."""

    def read(self, call: Call) -> Read:
        return Read(lambda: keys_read(call), call.proceed)


class Selected(Reader):
    """What selectors choose, as under `ph.sparse`."""

    def __init__(self, selectors: LayerSelectors, layers: tuple[LayerInfo, ...]) -> None:
        found: list[Selector | None] = by_layer(selectors, layers)
        self.selectors = found
        self.whole = frozenset(n for n, one in enumerate(found) if one is None or isinstance(one, Lead))
        self.followed = frozenset(one.layer for one in found if isinstance(one, Follow))
        self._selecting = Selecting(found, prefill=True, decode=True)
        self._remembers = any(one is not None and one.remembers for one in found)

    def copy(self) -> Reader:
        if not self._remembers:
            return self
        other = copy(self)
        other._selecting = self._selecting.copy()
        return other

    def before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._selecting.kept.before(index, module, args, kwargs)

    def read(self, call: Call) -> Read:
        made = self._selecting.chosen(call)
        return Read(lambda: keys_read(made), made.proceed)


class Chunks(Reader):
    """The chunks that `ph.long_heads` reads, at other positions than their own."""

    def __init__(self, handler: LongHeads) -> None:
        self._handler = handler

    def read(self, call: Call) -> Read:
        def keys() -> float:
            batch, heads, queries, _ = call.q.shape
            tokens = keys_of(call).shape[2]
            places = torch.arange(tokens - queries, tokens)
            own = keys_of_chunks(places, window=self._handler.window, length=self._handler.length)
            return float(batch * heads * int(own.sum()))

        return Read(keys, lambda: self._handler(call))

    def copy(self) -> Reader:
        return Chunks(self._handler.copy())


class Counting:
    """A handler that reads as another, and counts by layer the keys that calls of several queries read.

    Attributes:
        read: keys that were read, over all such calls, `(layers,)`.
    """

    def __init__(self, reader: Reader, layers: int) -> None:
        self.reader = reader
        self.read = torch.zeros(layers, dtype=torch.float64)
        self.before = reader.before

    def __call__(self, call: Call) -> Tensor:
        own = self.reader.read(call)
        if call.q.shape[2] > 1:
            self.read[call.layer.index] += own.keys()
        return own.out()


@contextmanager
def reading(model: Any, handler: Reader | Counting) -> Iterator[None]:
    """Within the block the model reads as the handler does."""
    with attach(model) as attachment, attachment.handling(handler), attachment.watching(handler.before):
        yield
