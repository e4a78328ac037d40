"""Transformers' masks as Polyhead's: the mask function that an attached model calls.

Transformers describes a mask by a function of (batch, head, query, key), put together from a handful of
pieces, and offsets that say which tokens the queries and keys are. The pieces are recognised by their code
and written in the mask algebra; what is not recognised stays a function that is asked pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from polyhead.attend.masks import And, Mask, Or, Window, blocks, causal, documents, padding, where, window
from polyhead.hf.mask_tensor import MaskTensor
from polyhead.hf.switch import adds_masks

__all__ = ["Shifted", "mask_function", "translate"]


class Shifted(Mask):
    """`mask` for queries that stand `rows` positions further on than they are counted."""

    mask: Mask
    rows: int

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.mask.allowed(b, h, i + self.rows, j)

    def bounds(
        self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.mask.bounds(b, h, i0 + self.rows, i1 + self.rows, j0, j1)

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        self.mask.check(batch=batch, heads=heads, queries=queries, keys=keys, offset=offset + self.rows)


class _Everything(Mask):
    """All pairs; only on the way to a translation, where it vanishes."""


class _AtToken:
    """A transformers mask function, asked with positions counted from key `start` on."""

    def __init__(self, function: Callable[..., Tensor], start: int) -> None:
        self.function = function
        self.start = start

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.function(b, h, i + self.start, j + self.start)


def mask_function(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    *,
    cache_position: Tensor | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    device: torch.device | str | None = None,
    **more: Any,
) -> Tensor:
    """What transformers calls, once for each kind of layer in a forward pass: a `MaskTensor`.

    Older versions say where the queries stand by `cache_position` instead of `q_length` and `q_offset`.
    """
    from transformers import masking_utils

    if q_length is None:
        assert cache_position is not None
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
        where_it_stands: dict[str, Any] = {"cache_position": cache_position}
    else:
        where_it_stands = {"q_length": q_length, "q_offset": q_offset, "device": device, "use_vmap": use_vmap}
    function = mask_function or masking_utils.causal_mask_function
    additive = config is not None and adds_masks(config)

    def make() -> Tensor:
        theirs = masking_utils.eager_mask if additive else masking_utils.sdpa_mask
        return theirs(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            dtype=dtype,
            **where_it_stands,
        )

    start, last = (
        int(kv_offset),
        int(q_offset) + q_length,
    )  # tokens start..last-1 are what queries can know of
    mask = translate(function, start=start, keys=kv_length, known=max(last - start, kv_length))
    if mask is None and use_vmap:  # may not take index tensors: let transformers call it pair by pair
        return make()
    if mask is None:
        mask = where(_AtToken(function, start))
    visible = kv_length
    if isinstance(mask, _Everything):
        mask = None
    elif last - start < kv_length and _looks_back(mask):
        visible = last - start
        mask = translate(function, start=start, keys=visible, known=visible)
    elif last - start != kv_length:
        mask = Shifted(mask, last - start - kv_length)
    real = _real(attention_mask, start, visible)
    if real is not None:
        alone = mask is None or (q_length == 1 and mask == causal())  # a single last query sees all keys
        mask = padding(real) if alone else mask & padding(real)
    shape = (batch_size, 1, q_length, kv_length)
    device = torch.device(device or ("cpu" if attention_mask is None else attention_mask.device))
    return MaskTensor(
        mask,
        shape,
        visible=visible,
        start=start,
        dtype=dtype if additive else torch.bool,
        device=device,
        make=make,
    )


def _real(attention_mask: Tensor | None, start: int, keys: int) -> Tensor | None:
    """The padding mask `(B, keys)` of the keys that are held, or None if all of them are real."""
    if attention_mask is None:
        return None
    real = _cut(attention_mask, start, keys)
    return None if bool(real.all()) else real


def _cut(real: Tensor, start: int, keys: int) -> Tensor:
    """The columns of `keys` tokens from `start` on; what is not told is not real."""
    real = real[:, start : start + keys].bool()
    return torch.nn.functional.pad(real, (0, keys - real.shape[1])) if real.shape[1] < keys else real


def _looks_back(mask: Mask) -> bool:
    """Whether no query sees a key after itself, so that keys after the last query do not matter."""
    if isinstance(mask, And):
        return any(map(_looks_back, mask.terms))
    if isinstance(mask, Or):
        return all(map(_looks_back, mask.terms))
    return isinstance(mask, Window) and mask.right == 0


def translate(function: Callable[..., Any], *, start: int, keys: int, known: int) -> Mask | None:
    """A transformers mask function in the mask algebra, or None if some piece of it is not known.

    Args:
        function: a function of (batch, head, query, key), all counted in tokens of the sequence.
        start: the token that position 0 of the result is.
        keys: how many keys there are.
        known: how many positions some key or query can stand at, for pieces that are told token by token.
    """
    from transformers import masking_utils as theirs

    def made_by(name: str) -> bool:
        maker = getattr(theirs, name, None)
        return maker is not None and function.__code__ in _inner(maker.__code__)

    def inside(piece: Callable[..., Any]) -> Mask | None:
        return translate(piece, start=start, keys=keys, known=known)

    if not hasattr(function, "__code__"):
        return None
    if function is getattr(theirs, "causal_mask_function", None):
        return causal()
    if function is getattr(theirs, "bidirectional_mask_function", None):
        return _Everything()
    held = dict(
        zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True)
    )
    if made_by("and_masks"):
        return _joined([inside(piece) for piece in held["mask_functions"]], both=True)
    if made_by("or_masks"):
        return _joined([inside(piece) for piece in held["mask_functions"]], both=False)
    if made_by("sliding_window_overlay"):  # key > query - W
        return window(held["sliding_window"] - 1, None)
    if made_by("sliding_window_bidirectional_overlay"):
        return window(held["sliding_window"], held["sliding_window"])
    if made_by("chunked_overlay"):
        return _chunks(held["chunk_size"], held["left_padding"], start, known)
    if made_by("packed_sequence_mask_function"):
        return documents(held["packed_sequence_mask"][:, start : start + known])
    if made_by("remap_positions_for_packed_sequence"):
        # inside one packed sequence positions go up by one, so that distances are what they were
        inner = inside(held["mask_function"])
        return inner if inner is not None and _by_distance(inner) else None
    if made_by("blockwise_overlay"):  # -1 is no block, there as in documents()
        return documents(held["block_sequence_ids"][:, start : start + known])
    if made_by("padding_mask_function"):
        return padding(_cut(held["padding_mask"], start, keys))
    return None


def _inner(code: CodeType) -> list[CodeType]:
    """The functions written inside a function."""
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _joined(masks: list[Mask | None], both: bool) -> Mask | None:
    if any(mask is None for mask in masks):
        return None
    terms = [mask for mask in masks if mask is not None and not isinstance(mask, _Everything)]
    if not terms or (not both and len(terms) < len(masks)):
        return _Everything()
    found = terms[0]
    for term in terms[1:]:
        if both and isinstance(found, Window) and isinstance(term, Window):
            found = window(_least(found.left, term.left), _least(found.right, term.right))
        else:
            found = found & term if both else found | term
    return found


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _by_distance(mask: Mask) -> bool:
    """Whether a mask looks at the distance of query and key alone."""
    if isinstance(mask, And | Or):
        return all(map(_by_distance, mask.terms))
    return isinstance(mask, _Everything | Window)


def _chunks(size: int, left_padding: Tensor, start: int, known: int) -> Mask:
    """Chunks of `size` tokens, counted from the first real token of each batch item."""
    if start % size == 0 and not bool(left_padding.any()):
        return blocks(size)
    token = torch.arange(start, start + known, device=left_padding.device)
    chunk = (token - left_padding[:, None]).div(size, rounding_mode="floor")
    return documents(chunk - chunk.amin())  # in documents() a negative number is no document
