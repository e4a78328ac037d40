"""The transformers `Cache`s around per-head layers. Importing this imports transformers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
)

from polyhead.cache.layer import PerHeadLayer
from polyhead.cache.step import Steps
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.hf import Attachment, LayerInfo, attach

__all__ = ["PerHeadCache", "PerHeadEncoderDecoderCache", "make"]


class PerHeadCache(Cache):
    """A transformers `Cache` whose key/value heads keep different numbers of tokens: see `per_head`.

    Attributes:
        full: for each attention layer, whether each of its key/value heads keeps the whole context.
        attachment: what lets the model read the cache; undone by `detach()`, or with the cache.
    """

    def __init__(
        self, layers: list[Any], attachment: Attachment, full: list[tuple[bool, ...]], steps: Steps
    ) -> None:
        super().__init__(layers=layers)
        self.full = full
        self.attachment = attachment
        self._steps = steps
        self._detached = weakref.finalize(self, attachment.detach)

    @property
    def _own(self) -> list[PerHeadLayer]:
        return [layer for layer in self.layers if isinstance(layer, PerHeadLayer)]

    @property
    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, PerHeadLayer)]

    def detach(self) -> None:
        """Give the model its own attention back; it cannot read this cache any more."""
        self._detached()

    def nbytes(self) -> int:
        """Bytes of memory that the cache holds, rows set aside for tokens to come included."""
        return sum(own.nbytes() for own in self._own) + _nbytes(self._others)

    def nbytes_used(self) -> int:
        """Bytes of the keys and values that are held."""
        return sum(own.nbytes_used() for own in self._own) + _nbytes(self._others)

    def take_over(self, past: Cache, real: Tensor | None = None) -> None:
        """Go on from the tokens that another cache of the model holds; of them each head keeps its own.

        Args:
            past: with all tokens of all layers, such as a `DynamicCache`; it is left as it is.
            real: bool `(B, S)`, which of them are no padding; None: all.

        Raises:
            ConfigError: this cache has begun, or the other one does not hold all tokens.
        """
        tokens = past.get_seq_length()
        if self.get_seq_length():
            raise ConfigError(f"this cache has seen {self.get_seq_length()} tokens; reset() it first")
        for place, own in enumerate(self.layers):
            keys = getattr(past.layers[place], "keys", None) if place < len(past.layers) else None
            count = keys.shape[2] if isinstance(keys, Tensor) else 0
            if not isinstance(own, PerHeadLayer) or count != tokens or not tokens:
                name = own.info.name if isinstance(own, PerHeadLayer) else type(own).__name__
                raise ConfigError(
                    f"a cache can be taken over that holds every token of every layer; of {name!r} it holds "
                    f"{count} of {tokens}"
                )
        self._steps.begin(tokens, None if real is None or bool(real.all()) else real)
        for own, other in zip(self._own, past.layers, strict=True):
            own.update(other.keys, other.values)
            own.settle()

    def held(self) -> list[list[int]]:
        """How many tokens each key/value head of each attention layer holds."""
        return [own.held() for own in self._own]

    @property
    def is_compileable(self) -> bool:
        """It changes shape at every step."""
        return False

    def activate_past_recording(self) -> None:
        """Asked for by decoding methods that take tokens back, such as assisted generation.

        Raises:
            ConfigError: some head forgets.
        """
        if not self.is_croppable:
            raise ConfigError(
                "this way of decoding (assisted generation) takes tokens back, and a cache whose heads "
                "forget cannot give back what it dropped; use full='all', or decode without an assistant"
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: `crop(-n)` removes n; nothing is changed where that is refused.

        Raises:
            ConfigError: a head has dropped tokens that would be seen again.
        """
        for own in self._own:
            own.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self._steps.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget every token and free the memory."""
        super().reset()
        self._steps.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make item n of the batch go on from what was item `beam_idx[n]`."""
        super().reorder_cache(beam_idx)
        self._steps.change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every item of the batch."""
        super().batch_repeat_interleave(repeats)
        self._steps.change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some items of the batch."""
        super().batch_select_indices(indices)
        self._steps.change(lambda t: t[indices.to(t.device)])

    def __deepcopy__(self, memo: dict[int, Any]) -> PerHeadCache:
        """A copy that goes its own way, for several continuations of one prompt; the model is not copied."""
        from copy import deepcopy

        steps = deepcopy(self._steps, memo)
        layers = deepcopy(self.layers, memo)
        return PerHeadCache(layers, attach(self.attachment.model), self.full, steps)

    def __repr__(self) -> str:
        whole = sum(map(sum, self.full))
        heads = sum(map(len, self.full))
        keeps = [group.keep for own in self._own for group in own.groups]
        short = [keep for keep in keeps if keep.window != keep.horizon]
        sizes = sorted({keep.window for keep in short if keep.window is not None})
        windows = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}" if sizes else ""
        rest = f", the rest {short[0].sink} + {windows} tokens" if sizes else ""
        return (
            f"PerHeadCache({whole} of {heads} KV heads in full{rest}; {self.get_seq_length()} tokens seen, "
            f"{self.nbytes() / 2**20:.1f} MiB)"
        )


class PerHeadEncoderDecoderCache(EncoderDecoderCache):
    """A `PerHeadCache` for a decoder's self-attention, with its cross-attention kept whole."""

    self_attention_cache: PerHeadCache

    def detach(self) -> None:
        """Give the model its own attention back."""
        self.self_attention_cache.detach()

    def nbytes(self) -> int:
        """Bytes of memory that both caches hold."""
        return self.self_attention_cache.nbytes() + _nbytes(self.cross_attention_cache.layers)

    def nbytes_used(self) -> int:
        """Bytes of the keys and values that are held."""
        return self.self_attention_cache.nbytes_used() + _nbytes(self.cross_attention_cache.layers)

    def held(self) -> list[list[int]]:
        """How many tokens each key/value head of each layer of self-attention holds."""
        return self.self_attention_cache.held()

    def check_dynamic_cache(self, method: str) -> None:
        """Both caches have what transformers asks for here."""


def make(
    attachment: Attachment,
    infos: list[LayerInfo],
    full: list[tuple[bool, ...]],
    *,
    sink: int,
    windows: list[tuple[int, ...]],
    dense: bool,
    compensate: bool,
) -> PerHeadCache | PerHeadEncoderDecoderCache:
    """The cache of an attached model, for whose layers `infos` the heads in `full` and `windows` are known.

    Raises:
        UnsupportedModel: some layer of the model keeps a state of a kind that is not known here.
    """
    model: Any = attachment.model
    config = model.config
    steps = Steps()
    # transformers' own cache says what the layers without such attention need (recurrent states, nothing)
    layers: list[Any] = list(DynamicCache(config=config).layers)
    replaced = set()
    for info, row, own in zip(infos, full, windows, strict=True):
        place = info.cache_index
        assert place is not None
        if place >= len(layers) or place in replaced:
            raise UnsupportedModel(
                f"{type(model).__name__} has attention layers that its config does not tell of: "
                f"{info.name!r} is number {place} of {len(layers)}; use DynamicCache with this model"
            )
        kind = type(layers[place])
        if kind is DummyLayer:  # reads the keys of an earlier layer
            continue
        if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModel(
                f"{info.name!r} keeps a {kind.__name__}, of which a per-head cache knows nothing; use "
                f"DynamicCache with {type(model).__name__}"
            )
        replaced.add(place)
        layers[place] = PerHeadLayer(
            info, row, sink=sink, windows=own, dense=dense, compensate=compensate, steps=steps
        )
    for place, layer in enumerate(layers):
        if place not in replaced and type(layer) not in (DummyLayer, LinearAttentionLayer):
            raise UnsupportedModel(
                f"layer {place} of {type(model).__name__} keeps a {type(layer).__name__} and was not found "
                "among its attention layers; use DynamicCache with this model"
            )
    cache = PerHeadCache(layers, attachment, full, steps)
    if getattr(config, "is_encoder_decoder", False):
        return PerHeadEncoderDecoderCache(cache, DynamicCache(config=config))
    return cache


def _nbytes(layers: list[Any]) -> int:
    """Bytes of the tensors of transformers' own cache layers."""
    found: dict[int, int] = {}
    for layer in layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor):
                    found[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(found.values())
