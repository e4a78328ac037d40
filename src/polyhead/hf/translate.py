"""What a model passes to its attention function, as one `Call`."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from polyhead.attend import attend
from polyhead.attend.masks import Mask, causal
from polyhead.attend.normalizers import Normalizer, softmax
from polyhead.attend.scores import Score, chain, soft_cap
from polyhead.attend.tile import Tile
from polyhead.errors import ShapeError, UnsupportedModel
from polyhead.hf.call import Call, Entry, LayerInfo
from polyhead.hf.handles import KVHandle
from polyhead.hf.mask_tensor import MaskTensor

__all__ = ["Allowed", "Bias", "WrittenMasks", "attention_call"]

# arguments that change the result and cannot be carried: passing over them would give wrong numbers
_REFUSED = ("indices", "block_indices", "sinks", "cache")
# the very object that attend() takes by default: its shortest path looks for it
_plain: Normalizer = (attend.__kwdefaults__ or {}).get("normalizer") or softmax()


class Bias(Score):
    """score + bias[b, h, r, j]: a bias that a model has written out pair by pair, `(1|B, 1|H, 1|L, S)`."""

    table: Tensor

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return scores + _cut(self.table, tile).to(scores.dtype)


class Allowed(Mask):
    """A mask that a model has written out pair by pair, bool `(1|B, 1|H, 1|L, S)`; query 0 is at `offset`."""

    table: Tensor
    offset: int

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        batch, heads, rows, _ = self.table.shape
        zero = torch.zeros_like(j[..., :1])
        return self.table[
            b if batch > 1 else zero, h if heads > 1 else zero, i - self.offset if rows > 1 else zero, j
        ]

    def bounds(
        self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exact: how many pairs of a tile are allowed is read off sums taken once over the table."""
        batch, heads, rows, keys = self.table.shape
        sums = self._sums
        zero = torch.zeros_like(i0)
        top, bottom = (i0 - self.offset, i1 - self.offset + 1) if rows > 1 else (zero, zero + 1)
        b, h = b if batch > 1 else zero, h if heads > 1 else zero
        top, bottom = top.clamp(0, rows), bottom.clamp(0, rows)
        left, right = j0.clamp(0, keys), (j1 + 1).clamp(0, keys)
        count = (
            sums[b, h, bottom, right]
            - sums[b, h, top, right]
            - sums[b, h, bottom, left]
            + sums[b, h, top, left]
        )
        return count > 0, count == (bottom - top) * (right - left)

    @property
    def _sums(self) -> Tensor:
        found = self.__dict__.get("_kept")
        if found is None:
            found = torch.nn.functional.pad(self.table.long().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
            object.__setattr__(self, "_kept", found)
        return found


def _cut(table: Tensor, tile: Tile) -> Tensor:
    """The part of a written-out table that belongs to a tile."""
    if table.shape[0] > 1:
        table = table[tile.batch_slice]
    if table.shape[1] > 1:
        table = table[:, tile.head_slice]
    if table.shape[2] > 1:
        table = table[:, :, tile.row_slice]
    if tile.consecutive and tile.cols.numel() == table.shape[3]:
        return table
    return table.index_select(3, tile.cols)


def attention_call(
    layer: LayerInfo,
    below: tuple[Entry, ...],
    memory: WrittenMasks,
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> Call:
    """One attention call of a transformers model.

    Without a mask, a layer that says it is causal is causal, as under transformers' own `sdpa`. The
    sliding window that some models pass as well is in their masks already.

    Raises:
        UnsupportedModel: the model passes something that an attention function must not pass over.
    """
    for name in _REFUSED:
        if more.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} passes {name!r} to the attention function, which only "
                "transformers' own "
                "kernels know to read; detach the model to run it so"
            )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    score: Score | None = None
    if softcap is not None:
        score = soft_cap(softcap)
    if position_bias is not None:
        score = chain((Bias(position_bias),) if score is None else (score, Bias(position_bias)))
    queries, keys, start = query.shape[2], key.shape[2], 0
    mask: Mask | None = None
    if type(attention_mask) is MaskTensor and attention_mask.touched is None:
        mask, start, visible = attention_mask.mask, attention_mask.start, attention_mask.visible
        if visible < keys and not isinstance(key, KVHandle):
            key, value = key[:, :, :visible], value[:, :, :visible]
    elif attention_mask is not None:
        start = getattr(attention_mask, "start", 0)
        attention_mask = attention_mask.dense() if type(attention_mask) is MaskTensor else attention_mask
        mask, written = memory.read(attention_mask, queries, keys)
        if written is not None:
            score = chain((written,) if score is None else (score, written))
    elif queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = causal()
        if keys > queries and not isinstance(key, KVHandle):  # the unfilled end of a static cache
            key, value = key[:, :, :queries], value[:, :, :queries]
    return Call(
        layer=layer,
        q=query,
        k=key,
        v=value,
        mask=mask,
        score=score,
        normalizer=_plain if s_aux is None else softmax(sink=s_aux),
        scale=float(scaling),
        dropout=dropout,
        start=start,
        below=below,
    )


class WrittenMasks:
    """Remembers the last written-out mask and what it came to: the layers of a forward pass share one."""

    def __init__(self) -> None:
        self._last: tuple[ref[Tensor], tuple[int, int, int], tuple[Mask | None, Score | None]] | None = None

    def read(self, tensor: Tensor, queries: int, keys: int) -> tuple[Mask | None, Score | None]:
        """A mask tensor, bool (True: allowed) or added to the logits, as a mask and what must be added."""
        last, state = self._last, (tensor._version, queries, keys)
        if last is not None and last[0]() is tensor and last[1] == state:
            return last[2]
        made = _read(tensor, queries, keys)
        self._last = (ref(tensor), state, made)
        return made


def _read(tensor: Tensor, queries: int, keys: int) -> tuple[Mask | None, Score | None]:
    if tensor.ndim != 4 or tensor.shape[2] not in (1, queries) or tensor.shape[3] < keys:
        raise ShapeError(
            f"the model passes an attention mask of shape {tuple(tensor.shape)} for {queries} queries and "
            f"{keys} keys; expected (B, 1 or H, L, S)"
        )
    tensor = tensor[..., :keys]
    if tensor.dtype == torch.bool:
        return Allowed(tensor, keys - queries), None
    # transformers writes "forbidden" as the lowest number of the dtype, or as -inf
    allowed = tensor > torch.finfo(tensor.dtype).min / 2
    mask = None if bool(allowed.all()) else Allowed(allowed, keys - queries)
    bias = torch.where(allowed, tensor, 0)
    return mask, Bias(bias) if bias.requires_grad or bool(bias.any()) else None
