"""One layer of a per-head cache: its groups of heads, and the attention over what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from polyhead.cache.decode import decode
from polyhead.cache.group import Group
from polyhead.cache.policy import keeps
from polyhead.cache.prefill import Before, before, prefill
from polyhead.cache.reading import attend_to
from polyhead.cache.step import Step, Steps
from polyhead.errors import ConfigError, ShapeError, UnsupportedModel
from polyhead.hf import Call, KVHandle, LayerInfo

__all__ = ["HeldKeys", "PerHeadLayer"]


class HeldKeys(KVHandle):
    """What `update` returns: keys or values that the layer's heads hold in different lengths.

    `k` and `v` are the rows of the new tokens, which the layer takes in when it first attends.
    """

    def __init__(self, layer: PerHeadLayer, shape: tuple[int, int, int, int], k: Tensor, v: Tensor) -> None:
        super().__init__(shape, k.dtype, k.device)
        self.layer = layer
        self.k, self.v = k, v
        self.count = k.shape[2]
        self.before: list[Before | None] = []

    def attend(self, call: Call) -> Tensor:
        return self.layer.attend(call, self)


class PerHeadLayer(CacheLayerMixin):
    """A layer of a transformers `Cache` whose heads keep different numbers of tokens.

    Args:
        info: the attention layer.
        full: for each key/value head, whether it keeps the whole context.
        sink: first tokens that the others keep.
        windows: recent tokens that each of the others keeps.
        dense: whether a chunk sees all that is stored and itself, and rows are dropped after it.
        compensate: whether one token stands for all that a head dropped.
        steps: what is known of the sequence, shared by the layers of a cache.
    """

    supports_early_init = False
    is_sliding = False

    def __init__(
        self,
        info: LayerInfo,
        full: tuple[bool, ...],
        *,
        sink: int,
        windows: tuple[int, ...],
        dense: bool,
        compensate: bool,
        steps: Steps,
    ) -> None:
        super().__init__()
        self.info = info
        self.dense = dense
        self.compensate = compensate
        self._steps = steps
        self.groups = [
            Group(keep, heads, info, compensate and keep.window is not None and keep.horizon is None)
            for keep, heads in keeps(full, sink, windows, info.window)
        ]
        # whether the groups' heads, one group after the other, are the layer's heads in their order
        self.groups.sort(key=lambda group: group.kv_heads)
        self._in_order = sum((group.kv_heads for group in self.groups), ()) == tuple(range(info.kv_heads))
        self.seen = 0
        self._pending: HeldKeys | None = None

    # -- what transformers asks ------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is set aside before the first tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the keys and values of L new tokens; what comes back is opened by the attention function."""
        if self._pending is not None:
            self._take(self._pending, None)
        self._check(key_states, value_states)
        batch, heads, count, width = key_states.shape
        self.seen += count
        self.is_initialized = True
        shape = (batch, heads, self.seen)
        keys = HeldKeys(self, (*shape, width), key_states, value_states)
        values = HeldKeys(self, (*shape, value_states.shape[3]), key_states, value_states)
        self._pending = keys
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, also those that no head holds any more."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks speak of all tokens seen: what is held is chosen from them later."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back at any time."""
        return all(group.keep.window is None for group in self.groups)

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first tokens."""
        if self._pending is not None:
            return self._pending.k.shape[0]
        keys = self.groups[0].rows.keys
        return -1 if keys is None else keys.shape[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: -n removes n. Refused where dropped tokens would be seen again."""
        self.check_crop(tokens_to_remove)
        self.settle()
        self.seen += tokens_to_remove
        for group in self.groups:
            group.rows.crop(self.seen)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise a `ConfigError` if so many tokens cannot be taken back."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise ConfigError(
                f"crop takes minus the number of tokens to remove, at most the {self.seen} seen; got "
                f"{tokens_to_remove}"
            )
        self.settle()
        for group in self.groups:
            group.rows.check_crop(self.seen + tokens_to_remove)

    def reset(self) -> None:
        """Forget every token and free the memory."""
        for group in self.groups:
            group.rows.reset()
        self.seen = 0
        self._pending = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make item n go on from what was item `beam_idx[n]`."""
        self.change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every item of the batch."""
        self.change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some items of the batch."""
        self.change(lambda t: t[indices.to(t.device)])

    def change(self, select: Callable[[Tensor], Tensor]) -> None:
        """Put `select(tensor)` in the place of every tensor, all of which start with the batch."""
        self.settle()
        for group in self.groups:
            group.rows.change(select)

    def held(self) -> list[int]:
        """How many tokens each key/value head holds; with padding, the most that it holds of any item."""
        held = dict.fromkeys(range(self.info.kv_heads), 0)
        for group in self.groups:
            held |= dict.fromkeys(group.kv_heads, group.rows.used())
        return [held[head] for head in sorted(held)]

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(group.rows.nbytes() for group in self.groups)

    def nbytes_used(self) -> int:
        """Bytes of the rows that hold something."""
        return sum(group.rows.nbytes_used() for group in self.groups)

    # -- taking rows in --------------------------------------------------------------------------------

    def _check(self, k: Tensor, v: Tensor) -> None:
        name = self.info.name
        if k.ndim != 4 or v.shape[:3] != k.shape[:3] or k.shape[1] != self.info.kv_heads:
            got = f"{tuple(k.shape)} and {tuple(v.shape)}"
            raise UnsupportedModel(
                f"{name!r} puts something else than the keys and values of its {self.info.kv_heads} KV "
                f"heads into the cache, shapes {got}; use DynamicCache with this model"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ConfigError(
                f"a per-head cache holds no gradients, and the keys of {name!r} require them; run the model "
                "under torch.no_grad() (as generate does), or without a cache"
            )
        held = self.groups[0].rows.keys
        if held is not None and (len(held), held.dtype, held.device) != (len(k), k.dtype, k.device):
            raise ShapeError(
                f"the cache holds {len(held)} sequences in {held.dtype} on {held.device}, but {name!r} "
                f"brings {len(k)} in {k.dtype} on {k.device}; make a new cache, or reset() this one"
            )

    def settle(self) -> None:
        """Take in rows that nobody attended to: a handler answered the call by itself."""
        if self._pending is not None:
            self._take(self._pending, None)

    def _take(self, handle: HeldKeys, step: Step | None) -> None:
        self._pending = None
        count = handle.k.shape[2]
        real = self._steps.padding(handle.shape[2], count) if step is None else step.new
        real = None if real is None else real.to(handle.device)
        if step is not None and count > 1:
            handle.before = [before(group.rows) for group in self.groups]
        for group in self.groups:
            group.rows.append(group.of_kv(handle.k), group.of_kv(handle.v), real)
        if count == 1:
            del handle.k, handle.v  # it has been copied: let go of the model's own tensors

    # -- attention -------------------------------------------------------------------------------------

    def attend(self, call: Call, handle: HeldKeys) -> Tensor:
        """Attention `(B, H, L, Dv)` of the call's queries, each head over what it holds."""
        batch, heads, queries, _ = call.q.shape
        if queries != handle.count or handle.shape[2] != self.seen:
            raise ShapeError(
                f"{self.info.name!r}: {queries} queries ask for keys that came as {handle.count} of "
                f"{handle.shape[2]} tokens, and the cache has seen {self.seen}; attend once for each "
                "update, before the next"
            )
        step = self._steps.of(call.mask, batch, self.seen, queries)
        if self._pending is handle:
            self._take(handle, step)
        if queries == 1:
            answers = [decode(call, group, step) for group in self.groups]
        elif queries == self.seen and all(group.sees_all(self.dense, queries) for group in self.groups):
            return attend_to(call, handle.k, handle.v, call.mask)
        else:
            answers = [
                prefill(call, group, step, group.of_kv(handle.k), group.of_kv(handle.v), earlier, self.dense)
                for group, earlier in zip(self.groups, handle.before, strict=True)
            ]
        if len(answers) == 1:
            return answers[0]
        if self._in_order and queries == 1:
            return torch.cat(answers, dim=1)
        # in the layout that the model goes on with, (B, L, H, Dv)
        out = answers[0].new_empty(batch, queries, heads, answers[0].shape[3]).transpose(1, 2)
        for group, answer in zip(self.groups, answers, strict=True):
            group.put(out, answer)
        return out
