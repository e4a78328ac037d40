"""Attaching Polyhead to a pretrained model, through the seams that transformers offers for it.

    with attach(model) as attachment:           # or: attachment = attach(model); ...; attachment.detach()
        attachment.layers                       # [LayerInfo(index, name, kind, heads, kv_heads, ...), ...]
        with attachment.handling(handler):      # handler(call: Call) -> output (B, H, L, Dv)
            model(**inputs)

While a model is attached, every one of its attention layers runs as one `Call` (q, k, v, mask, score,
normalizer, scale: see `polyhead.hf.call`), which goes to the handler on top. A handler answers it by
itself, or hands it on: `call.proceed()` asks the handlers below, at the bottom `polyhead.attend`, and
`call.replace(mask=..., q=...)` changes it first. Without handlers the model computes what it computed
before.

    def without_sink(call):
        mask = ~sink(1) if call.mask is None else call.mask & ~sink(1)
        return call.replace(mask=mask).proceed()

    def measure(call):                          # consumers see all weights, strip by strip
        return call.observe([consumer])

Attachments nest: each adds its handlers on top of those that are there, and takes only its own away.
Handlers belong to the model, for all threads that run it. What `update` of a transformers `Cache` returns
reaches them untouched, also when it is a `KVHandle`. As under transformers' `sdpa`, `output_attentions=True`
yields no weights: observe instead. With gradient checkpointing, call `backward()` while attached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polyhead.checks import given
from polyhead.errors import ConfigError, MissingExtra, UnsupportedModel
from polyhead.hf.call import Call, Handler, LayerInfo
from polyhead.hf.handles import KVHandle
from polyhead.hf.layers import find_layers, own_attention, pretrained_parts
from polyhead.hf.switch import NAME, restore, switch
from polyhead.hf.translate import attention_call
from polyhead.hf.written import WrittenMasks

__all__ = ["NAME", "Attachment", "Call", "Handler", "KVHandle", "LayerInfo", "attach"]

Watcher = Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], None]

# what stands on each attention module: one entry for each attachment and handler, the top one last
_entries: WeakKeyDictionary[nn.Module, tuple[_Entry, ...]] = WeakKeyDictionary()
_lock = threading.RLock()


class _Entry:
    """One attachment's (handler, layer) on a module; compared by identity."""

    __slots__ = ("handler", "layer", "memory")

    def __init__(self, handler: Handler | None, layer: LayerInfo, memory: WrittenMasks) -> None:
        self.handler = handler
        self.layer = layer
        self.memory = memory


def attach(model: nn.Module, *, handler: Handler | None = None) -> Attachment:
    """Let Polyhead compute the attention of a transformers model.

    Args:
        model: any transformers model that uses the attention interface, or a module that holds some.
        handler: answers every attention call with its output `(B, H, L, Dv)`; default: `polyhead.attend`,
            which changes nothing.

    Returns:
        The `Attachment`, already in force. Leave it as a context manager, or call `.detach()`.

    Raises:
        ConfigError: the handler is no function; or, in a forward pass, it returned no such output.
        UnsupportedModel: the architecture does not use the interface; the message says what to do.
        MissingExtra: transformers is not installed.
    """
    return Attachment(model, handler)


class Attachment:
    """A model whose attention goes through Polyhead, until it is detached. Made by `attach`.

    Args:
        model, handler: as of `attach`.

    Attributes:
        model: the model.
        layers: its attention layers, in forward order.
        unseen: names of modules with an attention of their own, which Polyhead cannot see.
    """

    def __init__(self, model: nn.Module, handler: Handler | None = None) -> None:
        if handler is not None:
            _check_handler(handler)
        _register()
        self.model = model
        self._handler = handler
        self._parts = pretrained_parts(model)
        self._found = find_layers(model)
        self.layers: list[LayerInfo] = [layer for _, layer in self._found]
        self.unseen = own_attention(model)
        self._depth = 0
        self._own: list[dict[nn.Module, _Entry]] = []
        self._configs: list[Any] = []
        self._attach()

    @property
    def attached(self) -> bool:
        """Whether the attachment is in force."""
        return bool(self._own)

    def _attach(self) -> None:
        with _lock:
            self._configs = switch(self._parts, [module for module, _ in self._found])
            self._push(self._handler)

    def detach(self) -> None:
        """Take the attachment's handlers away and give the model back its own attention."""
        with _lock:
            while self._own:
                self._pop(self._own[-1])
            restore(self._configs)
            self._configs = []

    @contextmanager
    def handling(self, handler: Handler) -> Iterator[Attachment]:
        """Within the block, `handler` is on top: it gets every call first."""
        if not self.attached:
            raise UnsupportedModel(
                "this attachment is detached; attach(model) again before handling its calls"
            )
        _check_handler(handler)
        with _lock:
            own = self._push(handler)
        try:
            yield self
        finally:
            with _lock:
                self._pop(own)

    @contextmanager
    def watching(self, before: Watcher) -> Iterator[None]:
        """Within the block, `before` gets index, module, args and kwargs of every attention layer called."""

        def hook(index: int) -> Callable[..., None]:
            def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                before(index, module, args, kwargs)

            return torch.compiler.disable(run)

        handles = [
            module.register_forward_pre_hook(hook(layer.index), with_kwargs=True)
            for module, layer in self._found
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _push(self, handler: Handler | None) -> dict[nn.Module, _Entry]:
        memory = WrittenMasks()
        own = {module: _Entry(handler, layer, memory) for module, layer in self._found}
        for module, entry in own.items():
            _entries[module] = (*_entries.get(module, ()), entry)
        self._own.append(own)
        return own

    def _pop(self, own: dict[nn.Module, _Entry]) -> None:
        if own not in self._own:
            return
        self._own.remove(own)
        for module, entry in own.items():
            left = tuple(e for e in _entries.get(module, ()) if e is not entry)
            if left:
                _entries[module] = left
            else:
                _entries.pop(module, None)

    def __enter__(self) -> Attachment:
        if not self.attached:
            self._attach()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"Attachment({type(self.model).__name__}, {len(self.layers)} attention layers, {state})"


def _check_handler(handler: Handler) -> None:
    if not callable(handler):
        raise ConfigError(
            "handler must be a function of a Call that returns the output (B, H, L, Dv), such as "
            f"lambda call: call.proceed(); got {given(handler)}"
        )


@cache
def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "attaching to a pretrained model") from error
    from polyhead.hf.masks import mask_function

    # in a compiled model both run uncompiled, between compiled parts
    AttentionInterface.register(NAME, torch.compiler.disable(attention_function))
    AttentionMaskInterface.register(NAME, torch.compiler.disable(mask_function))


def attention_function(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """What transformers' models call: q, k, v in, `(B, L, H, Dv)` out, and no weights."""
    entries = _entries.get(module)
    if entries:
        layer, memory = entries[-1].layer, entries[-1].memory
        below = tuple([(entry.handler, entry.layer) for entry in entries if entry.handler is not None])
    else:
        layer, memory, below = _stranger(module, query, key), WrittenMasks(), ()
    call = attention_call(layer, below, memory, module, query, key, value, attention_mask, **arguments)
    return call.proceed().transpose(1, 2).contiguous(), None


def _stranger(module: nn.Module, query: Tensor, key: Any) -> LayerInfo:
    """A module that was not there when its model was attached, such as one in a copy of the model."""
    return LayerInfo(-1, type(module).__name__, "decoder", query.shape[1], key.shape[1], query.shape[-1])
