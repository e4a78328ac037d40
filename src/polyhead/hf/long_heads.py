"""`long_heads`: a pretrained model on texts longer than it was trained on; heads read chunks of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.masks import is_causal
from polyhead.attend.normalizers import Softmax
from polyhead.checks import given
from polyhead.errors import ConfigError
from polyhead.hf.attachment import Attachment, attach
from polyhead.hf.call import Call
from polyhead.hf.handles import KVHandle
from polyhead.nn.long_heads import attend_to_chunks, chunk_keys, chunks_of
from polyhead.nn.positions import Rope, rope_from_parameters

__all__ = ["LongHeads", "long_heads"]


@dataclass(frozen=True)
class _Past:
    """What a layer has read of a text: the keys of its chunks, and the queries of the chunk that is open."""

    chunks: Tensor
    queries: Tensor
    tokens: int


class LongHeads:
    """The handler of `long_heads`."""

    def __init__(self, position: Rope, window: int, length: int) -> None:
        chunks_of(window, length)
        self.position = position
        self.window = window
        self.length = length
        self._past: dict[int, _Past] = {}

    @classmethod
    def of(
        cls, model: nn.Module, *, window: int = 256, length: int = 4096, position: Rope | None = None
    ) -> LongHeads:
        """For a model and its rotary positions; arguments and errors as of `long_heads`."""
        own = _position(model) if position is None else position
        if not isinstance(own, Rope):
            raise ConfigError(f"long_heads: position must be a rotary one such as rope(); got {given(own)}")
        if own.stretching:
            raise ConfigError(
                "long_heads: positions that stretch with the text leave keys of a cache turned by other "
                "angles; use a position without such scaling"
            )
        return cls(own, window, length)

    def copy(self) -> LongHeads:
        """The same in the middle of a text, which with copies of its cache can go on in several ways."""
        made = LongHeads(self.position, self.window, self.length)
        made._past = dict(self._past)
        return made

    @torch.no_grad()
    def __call__(self, call: Call) -> Tensor:
        k, v = _plain(call)
        tokens, width = k.shape[2], k.shape[3]
        first = tokens - call.q.shape[2]
        places = torch.arange(tokens, device=k.device)
        back = self.position.turned(-places, width, tokens)
        # a scaling may make them longer besides: once when the model turned them, once more here
        grown = self.position.turned(places[:1], width, tokens)[0, 0, 0]
        back = back / grown**2
        q, k = self.position.turn(call.q, back[first:]), self.position.turn(k, back)
        past = self._past.get(call.layer.index) if first else None
        if first and (past is None or past.tokens != first or len(past.queries) != len(q)):
            known = "nothing" if past is None else f"{past.tokens} tokens of {len(past.queries)} sequences"
            raise ConfigError(
                f"layer {call.layer.name!r} goes on behind {first} tokens of {len(q)} sequences, of which "
                f"{known} went through long_heads: begin the text, with an empty cache, within the block"
            )
        own = {"position": self.position, "window": self.window, "scale": call.scale}
        queries = q if past is None else torch.cat([past.queries, q], 2)
        start = tokens - queries.shape[2]
        chunks = chunk_keys(queries, k[:, :, start:], v[:, :, start:], **own)  # type: ignore[arg-type]
        chunks = chunks if past is None else torch.cat([past.chunks, chunks], 2)
        left = queries[:, :, tokens // self.window * self.window - start :].clone()
        self._past[call.layer.index] = _Past(chunks, left, tokens)
        return attend_to_chunks(q, k, v, chunks, length=self.length, **own)  # type: ignore[arg-type]


def _plain(call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values of a call on a text from its start, with softmax over the past."""
    name = f"layer {call.layer.name!r}"
    if isinstance(call.k, KVHandle) or isinstance(call.v, KVHandle):
        raise ConfigError(
            f"{name} attends to keys in a {type(call.k).__name__}; use a cache that holds tensors, such as "
            "DynamicCache"
        )
    past = is_causal(call.mask) or (call.mask is None and call.q.shape[2] == 1)
    if not past or call.start or call.layer.kind != "decoder":
        raise ConfigError(
            f"{name}: long_heads is for decoders and reads the whole past, without padding, sliding windows "
            "or other masks. Give one text, or texts of one length, at a time"
        )
    if call.score is not None or type(call.normalizer) is not Softmax or call.normalizer.sink is not None:
        raise ConfigError(f"{name}: long_heads has no scores, sinks or normalisers but plain softmax")
    if call.dropout:
        raise ConfigError(f"{name}: long_heads has no dropout; call model.eval()")
    return call.k, call.v


def _position(model: nn.Module) -> Rope:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict) or "rope_type" not in found:
        raise ConfigError(
            "long_heads: the model's config names no rope_parameters for all layers; give position=, such as "
            f"polyhead.nn.rope(), if it has rotary positions; got {given(found)}"
        )
    return rope_from_parameters(
        found, max_position_embeddings=getattr(config, "max_position_embeddings", None)
    )


@contextmanager
def long_heads(
    model: nn.Module, *, window: int = 256, length: int = 4096, position: Rope | None = None
) -> Iterator[Attachment]:
    """Within the block each head reads chunks of its own choice, at positions that the model was trained on.

        with ph.long_heads(model, window=256, length=4096):
            model.generate(**inputs)             # inputs of any length

    The past is cut into chunks of `window` tokens. Every query of every head reads length/window of them: the
    first, the one before its own, its own, and those whose keys score best; these stand next to each other,
    in order, so that no position is `length` or more. A text of at most `length` tokens is read as ever.
    `polyhead.nn.long_heads` has the equations.

    LongHeads, "LongHeads: Multi-Head Attention is Secretly a Long Context Processor" (paper 062, arXiv
    2402.10685). No training. Queries and keys come turned from the model, and are turned back: in half
    precision that rounds twice more. Every step of decoding turns all keys, O(S·D), and scores S/window
    chunks. The cache keeps everything, and one key a chunk is held besides.

    Our readings: every query head chooses for itself, also where heads share keys; the official code's
    prefill leaves a query's own key out, and its decoding does not: here it is always read, and a step is
    what the whole call would be.

    Args:
        model: a decoder that `attach` accepts, with rotary positions, one `rope` for all layers.
        window: tokens of a chunk.
        length: tokens that a query reads, a multiple of the window and at least three of it; at most what
            the model was trained on.
        position: the rotary positions of the model. None: those of its config, with halves as pairs.

    A text begins with a call on an empty cache within the block; where a cache is reordered on the way, as in
    beam search, it does not fit. No gradients.

    Raises:
        ConfigError: the numbers or positions do not fit; or, in a forward pass, padding, sliding windows or
            other masks, scores or sinks, a cache that holds no tensors, or one that was filled elsewhere.
        UnsupportedModel: the model's attention cannot be replaced.
    """
    handler = LongHeads.of(model, window=window, length=length, position=position)
    with attach(model) as attachment, attachment.handling(handler):
        yield attachment
