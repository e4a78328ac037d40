"""`routed_layers`: in a pretrained model, each layer reads everything or little, as its router says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.masks import Mask, prefix, sink, window
from polyhead.attend.selectors.visible import real_keys
from polyhead.checks import given, number, whole
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.hf.attachment import attach
from polyhead.hf.call import Call, LayerInfo
from polyhead.hf.layers import QUERIES
from polyhead.nn.layer_router import LayerRouter, mean_of_ends, open_layers

__all__ = ["LayerRouters", "LayerRouting", "layer_routers", "routed_layers"]

_NORMS = ("q_norm", "q_layernorm")


class LayerRouters(nn.Module):
    """Routers by layer, counted as in `attach(model).layers`. Made by `layer_routers`.

    Args:
        head_dims: for every layer that is routed the width D of its queries.
        device, dtype: of the parameters; default torch's own.

    Attributes:
        layers: the `LayerRouter` of each of them, by the layer's number as text.

    Raises:
        ConfigError: a width is no whole number of at least 1.
    """

    def __init__(self, head_dims: dict[int, int], *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(index): LayerRouter(dim, device=device, dtype=dtype) for index, dim in head_dims.items()}
        )

    def of(self, layer: int) -> LayerRouter | None:
        """The router of a layer; None: the layer is not routed."""
        if str(layer) not in self.layers:
            return None
        found = self.layers[str(layer)]
        assert isinstance(found, LayerRouter)
        return found


def layer_routers(model: nn.Module, layers: Sequence[int] | None = None) -> LayerRouters:
    """An untrained router for each layer of a decoder: all say full attention.

    They are float32, on the device of the model, and no part of it: save them by `state_dict()`.

    Args:
        model: any decoder that `attach` accepts, whose queries come from a projection of their own.
        layers: those that are routed; None: all of causal self-attention.
    """
    with attach(model) as attachment:
        known = {info.index: info for info in attachment.layers if info.kind == "decoder"}
        chosen = list(known) if layers is None else list(layers)
        for index in chosen:
            if index not in known:
                raise ConfigError(
                    f"layer_routers: the layers of causal self-attention are {sorted(known)}; got {index!r}"
                )
            _projection(model, known[index])
    if not chosen:
        raise ConfigError("layer_routers: at least one layer of causal self-attention must be routed")
    device = next(model.parameters()).device
    return LayerRouters({index: known[index].head_dim for index in chosen}, device=device)


class LayerRouting:
    """The handler of `routed_layers`, and what was decided.

    Attributes:
        layers: all attention layers of the model.
        decisions: by layer `(B,)`, 1 where the layer reads everything for a sequence, 0 where it does not.
        logits: by layer `(B, 2)`, what its router said, for sparse and for full.
        pooled: by layer `(B, D)`, what it was asked.
        temperature: None, or the temperature at which decisions are drawn in training.
        real: of the text at hand, which tokens of the prompt are no padding, `(B, L)`; None: all.
        model, routers, sink, window, size: see `routed_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        routers: LayerRouters,
        layers: Sequence[LayerInfo],
        sink: int,
        window: int,
        size: int,
        temperature: float | None,
    ) -> None:
        self.model = model
        self.routers = routers
        self.layers = tuple(layers)
        self.sink = whole("routed_layers: sink", sink, 0)
        self.window = whole("routed_layers: window", window, 1)
        self.size = whole("routed_layers: size", size, 1)
        self.temperature = (
            None if temperature is None else number("routed_layers: temperature", temperature, above=0)
        )
        self.decisions: dict[int, Tensor] = {}
        self.logits: dict[int, Tensor] = {}
        self.pooled: dict[int, Tensor] = {}
        self.real: Tensor | None = None
        self._raw: dict[int, Tensor] = {}

    def hear(self, index: int, module: nn.Module, inputs: Any, out: Tensor) -> None:
        """Hook of a layer's query projection: what it made is kept until the layer attends."""
        self._raw[index] = out

    def sparsity(self) -> Tensor:
        """Which share of the heads of routed layers reads sparsely, by sequence `(B,)`; gradients flow.

        S = 1 - Σ_layers H z / Σ_layers H
        """
        if not self.decisions:
            raise ConfigError("routed_layers: nothing has been decided yet; run the model within the block")
        heads = {info.index: info.heads for info in self.layers}
        full = torch.stack([z * heads[index] for index, z in self.decisions.items()]).sum(0)
        return 1 - full / sum(heads[index] for index in self.decisions)

    def __call__(self, call: Call) -> Tensor:
        index = call.layer.index
        router = self.routers.of(index)
        if router is None:
            return call.proceed()
        raw = self._raw.pop(index, None)
        batch, _, queries, _ = call.q.shape
        if call.start + call.k.shape[2] == queries:
            self._decide(call, router, raw)
        z = self.decisions.get(index)
        if z is None or len(z) != batch:
            known = "no sequence was" if z is None else f"{len(z)} sequences were"
            raise ConfigError(
                f"layer {call.layer.name!r} goes on with {batch} sequences, of which {known} routed: begin "
                "the text, with an empty cache, within routed_layers"
            )
        if self.temperature is not None:
            short = call.replace(mask=_and(call.mask, self._short(call, torch.zeros_like(z)))).proceed()
            mix = z.view(-1, 1, 1, 1).to(short.dtype)
            return mix * call.proceed() + (1 - mix) * short
        if bool((z == 1).all()):
            return call.proceed()
        return call.replace(mask=_and(call.mask, self._short(call, z))).proceed()

    def _decide(self, call: Call, router: LayerRouter, raw: Tensor | None) -> None:
        index = call.layer.index
        if raw is None:
            raise ConfigError(
                f"layer {call.layer.name!r} was called without its query projection; run the whole model"
            )
        q = _queries(self.model, call.layer, raw)
        real = real_keys(call.mask, q.device)
        self.real = None if real is None else real.expand(len(q), -1)
        self.pooled[index] = mean_of_ends(q, self.size, real)
        self.logits[index] = router(self.pooled[index])
        self.decisions[index] = open_layers(self.logits[index], self.temperature)

    def _short(self, call: Call, z: Tensor) -> Mask:
        """What sparse attention reads of a call; everything for the sequences with z = 1."""
        near = window(self.window - 1)
        held = max(0, self.sink - call.start)
        real = real_keys(call.mask, call.q.device)
        if real is None and not bool((z == 1).any()):
            return near | sink(held) if held else near
        first = 0 if real is None else real.int().argmax(1)
        ends = torch.where(z == 1, call.k.shape[2], first + held)
        return near | prefix(ends.expand(len(z)))


def _and(mask: Mask | None, other: Mask) -> Mask:
    return other if mask is None else mask & other


def _projection(model: nn.Module, layer: LayerInfo) -> nn.Module:
    """The module that makes a layer's queries.

    Raises:
        UnsupportedModel: there is none, or it makes more.
    """
    module = model.get_submodule(layer.name)
    for name in QUERIES:
        found = getattr(module, name, None)
        weight = getattr(found, "weight", None)
        if isinstance(found, nn.Module) and weight is not None:
            out = getattr(found, "out_features", weight.shape[0])
            if out == layer.heads * layer.head_dim:
                return found
    raise UnsupportedModel(
        f"layer {layer.name!r} ({type(module).__name__}) has no projection that makes its "
        f"{layer.heads} × {layer.head_dim} queries and nothing else; routers read such, not yet turned"
    )


def _queries(model: nn.Module, layer: LayerInfo, out: Tensor) -> Tensor:
    """The queries `(B, L, H, D)` of a projection's output, normed where the layer norms them."""
    module = model.get_submodule(layer.name)
    shape = (*out.shape[:2], layer.heads, layer.head_dim)
    norm = next((n for n in (getattr(module, name, None) for name in _NORMS) if n is not None), None)
    weight = getattr(norm, "weight", None)
    if isinstance(norm, nn.Module) and weight is not None and weight.numel() == out.shape[-1]:
        return norm(out).view(shape) if weight.ndim == 1 else norm(out.view(shape))
    return norm(out.view(shape)) if isinstance(norm, nn.Module) else out.view(shape)


@contextmanager
def routed_layers(
    model: nn.Module,
    routers: LayerRouters,
    *,
    sink: int = 128,
    window: int = 2048,
    size: int = 100,
    temperature: float | None = None,
) -> Iterator[LayerRouting]:
    """Within the block each layer reads everything or little of a text, as its router says once at its start.

        routers = ph.hf.layer_routers(model)            # trained: ph.cache.flux.train(model, routers, ...)
        with ph.hf.routed_layers(model, routers) as routing:
            model.generate(**inputs)
        routing.sparsity()

    The call on a text from its start, the prompt, is what a router sees: the mean query of its first and last
    `size` tokens (`polyhead.nn.LayerRouter`). Where it says full, the layer is as it was; where it says
    sparse, token i sees j <= i iff j < sink or i - j < window, with all its heads. The decision stays for all
    tokens that follow, until the next text begins. Sequences of a batch are decided for one by one.

    Flux Attention, "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference" (paper 166,
    arXiv 2604.07394), with its streaming pattern.

    Our readings: all real tokens of the prompt are the segment that is pooled, where the published code
    leaves a chat's frame out; shorter prompts are pooled whole. A sink is counted from the first real token.
    Where a prompt is read in pieces, the first piece decides. The published demo counts its window in blocks,
    here in tokens. Nothing leaves the cache; `polyhead.cache.flux.pruned` makes one that keeps what is read.

    Args:
        model: the decoder that `routers` were made for. It is as it was after the block.
        routers: of `layer_routers`.
        sink, window: what a sparse layer reads, in tokens.
        size: P, tokens at either end of the prompt.
        temperature: for training. Every decision is drawn at this temperature, both kinds of attention are
            worked out, and their outputs mixed by it: gradients reach the routers. Also
            `routing.temperature = ...`.

    Without a cache, every forward pass is a text from its start.

    Raises:
        ConfigError: a value is not allowed, the routers do not fit; or, in a forward pass, a text goes on
            that was begun elsewhere or with another batch.
        UnsupportedModel: the model's attention cannot be replaced, or a layer's queries have no projection
            of their own.
    """
    if not isinstance(routers, LayerRouters):
        raise ConfigError(f"routed_layers: routers must be layer_routers(model); got {given(routers)}")
    hooks = []
    with attach(model) as attachment:
        routing = LayerRouting(model, routers, attachment.layers, sink, window, size, temperature)
        known = {info.index: info for info in attachment.layers if info.kind == "decoder"}
        try:
            for name, router in routers.layers.items():
                info = known.get(int(name))
                if info is None or info.head_dim != router.head_dim:
                    has = "has no such layer" if info is None else f"has heads of {info.head_dim} there"
                    raise ConfigError(
                        f"routed_layers: the router of layer {name} reads queries of {router.head_dim}, and "
                        f"the model {has}; make routers by layer_routers(model)"
                    )
                hear = partial(routing.hear, info.index)
                hooks.append(_projection(model, info).register_forward_hook(hear))
            with attachment.handling(routing):
                yield routing
        finally:
            for hook in hooks:
                hook.remove()
