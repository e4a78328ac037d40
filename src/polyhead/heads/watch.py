"""Watching the heads of a model: its attention calls go through `observe`, and gauges look on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyhead.attend import observe
from polyhead.attend.masks import Mask
from polyhead.attend.tile import Tile
from polyhead.errors import ShapeError
from polyhead.heads.measurement import Gauge, Measurement, chosen
from polyhead.heads.rows import Rows, View
from polyhead.heads.visible import Visible
from polyhead.hf import Call, LayerInfo, attach

__all__ = ["Watcher", "gaze", "measure", "output_projection", "watch"]

# what attention modules, or the module that holds them, call the projection of the joined heads
_OWN = ("o_proj", "out_proj", "c_proj", "o", "wo", "proj", "dense", "to_out", "out_lin", "linear_out", "Wo")
_OUTSIDE = ("output.dense", "output", "dense", "out_proj", "o_proj", "proj")


class Watcher:
    """Hands the weights of a model's attention layers to gauges; made by `watch`.

    Attributes:
        model: the model.
        layers: the attention layers, in forward order.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerInfo]) -> None:
        self.layers = tuple(layers)
        self.model = model
        self._gauges: Sequence[Sequence[Gauge]] = ()
        self._after: Callable[[LayerInfo], None] | None = None
        self._ids: Tensor | None = None
        self._marks: Mapping[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._padding: dict[str, Tensor | None] = {}
        self._visible: list[tuple[Mask | None, tuple[Any, ...], Visible]] = []
        self._projections: dict[int, Tensor | None] = {}

    @contextmanager
    def on(
        self,
        gauges: Sequence[Sequence[Gauge]],
        *,
        ids: Tensor | None = None,
        padding: Tensor | None = None,
        query_padding: Tensor | None = None,
        marks: Mapping[str, Tensor] | None = None,
        after: Callable[[LayerInfo], None] | None = None,
    ) -> Iterator[None]:
        """Within the block every attention call is seen by the gauges of its layer.

        Args:
            gauges: for each layer its gauges; a layer without any runs as ever.
            ids: token ids `(B, S)` that the model reads.
            padding: `(B, S)`, true at real tokens, of encoder layers and of a decoder by itself.
            query_padding: the same for the decoder of a model that has an encoder too.
            marks: what measurements need to know of the sequence, such as where a needle lies.
            after: called with each layer that is done.
        """
        if query_padding is None:
            query_padding = padding
        self._gauges, self._after, self._ids, self._marks = gauges, after, ids, marks or {}
        self._padding = {"encoder": padding, "decoder": query_padding, "cross": query_padding}
        self._visible = []
        try:
            yield
        finally:
            self._gauges, self._after, self._ids, self._marks = (), None, None, {}
            self._padding, self._visible = {}, []
            self._buffers.clear()

    def handle(self, call: Call) -> Tensor:
        """The attention handler: what reaches the end of all other handlers is what is observed."""
        layer = call.layer
        gauges = self._gauges[layer.index] if layer.index < len(self._gauges) else ()
        if not gauges:
            return call.proceed()

        def last(final: Call) -> Tensor:
            return self._observe(final, gauges)

        output = call.replace(below=((last, layer), *call.below)).proceed()
        if self._after is not None:
            self._after(layer)
        return output

    def _observe(self, call: Call, gauges: Sequence[Gauge]) -> Tensor:
        if not (isinstance(call.k, Tensor) and isinstance(call.v, Tensor)):
            return call.proceed()  # a cache that holds no tensors: not seen, the gauges have no number
        return gaze(self._view(call), gauges, call.q, call.k, call.v, **_attention(call))

    def _view(self, call: Call) -> View:
        batch, heads, queries, _ = call.q.shape
        keys = call.k.shape[2]
        kind = call.layer.kind
        held = slice(call.start, call.start + keys)  # the tokens that the keys are
        ids, padding = self._ids, self._padding.get(kind)
        ids = None if ids is None or kind == "cross" else ids[:, held]
        if padding is not None and kind != "cross":
            padding = padding[:, held]
        if call.layer.index not in self._projections:
            width = call.v.shape[-1]
            module = self.model.get_submodule(call.layer.name)
            self._projections[call.layer.index] = output_projection(
                self.model, call.layer.name, module, heads, width
            )
        visible = self._count(
            call.mask, kind, batch, heads, queries, keys, padding, call.start, call.q.device
        )
        projection = self._projections[call.layer.index]
        return View(
            kind,
            batch,
            heads,
            queries,
            keys,
            visible,
            ids,
            projection,
            call.start,
            self._marks,
            self._buffers,
        )

    def _count(
        self,
        mask: Mask | None,
        kind: str,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        padding: Tensor | None,
        start: int,
        device: torch.device,
    ) -> Visible:
        """What is visible under a mask; layers commonly share one."""
        key = (kind, batch, heads, queries, keys, start)
        for known, sizes, visible in self._visible:
            if sizes == key and (known is mask or known == mask):
                return visible
        visible = _visible(mask, batch, heads, queries, keys, kind, padding, device)
        self._visible.append((mask, key, visible))
        return visible


class _Consumer:
    """Takes part in `observe` for several gauges, which share what they compute from the same rows."""

    def __init__(self, view: View, gauges: Sequence[Gauge]) -> None:
        self.view = view
        self.gauges = gauges
        self.needs_logits = any(gauge.needs_logits for gauge in gauges)

    def visit(self, tile: Tile, logits: Tensor | None, weights: Tensor) -> None:
        rows = Rows(self.view, tile, logits, weights)
        for gauge in self.gauges:
            gauge.take(rows)


def _attention(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in ("mask", "score", "normalizer", "scale")}


def gaze(view: View, gauges: Sequence[Gauge], q: Tensor, k: Tensor, v: Tensor, **attention: Any) -> Tensor:
    """The output of `attend(q, k, v, **attention)`, while the gauges look on."""
    for gauge in gauges:
        gauge.begin(view)
    output = observe(q, k, v, [_Consumer(view, gauges)], **attention)
    for gauge in gauges:
        gauge.end(output)
    return output


def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    measurements: str | Measurement | Iterable[str | Measurement],
    *,
    kind: Literal["decoder", "encoder", "cross"] = "decoder",
    padding: Tensor | None = None,
    ids: Tensor | None = None,
    projection: Tensor | None = None,
    marks: Mapping[str, Tensor] | None = None,
    mask: Mask | None = None,
    **attention: Any,
) -> dict[str, Tensor]:
    """Measure the heads of one call of `attend(q, k, v, mask=mask, **attention)`.

    For attention outside transformers models; `profile` does the same for every layer of a model.

    Args:
        q, k, v: `(B, H, L, D)`, `(B, G, S, D)`, `(B, G, S, Dv)`.
        measurements: names or `Measurement` objects.
        kind: what sort of attention it is; measurements that make no sense for it give NaN.
        padding: bool `(B, S)`, True at real tokens: the queries among them count. It is no mask.
        ids: token ids `(B, S)`, for measurements that compare tokens.
        projection: the output projection by heads, `(H, Dv, d)`, for "output_share".
        marks: spans `(B, 2)` of positions: for "retrieval" the "needle" and the "answer" rows.
        mask, attention: as for `attend`: mask, score, normalizer, scale.

    Returns:
        For each measurement its values, float64 `(H,)`.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    wanted = chosen(measurements)
    gauges = {m.name: m.gauge(heads) for m in wanted if kind in m.kinds}
    visible = _visible(mask, batch, heads, queries, keys, kind, padding, q.device)
    view = View(kind, batch, heads, queries, keys, visible, ids, projection, marks=marks or {})
    gaze(view, list(gauges.values()), q, k, v, mask=mask, **attention)
    nothing = torch.full((heads,), torch.nan, dtype=torch.float64)
    return {m.name: gauges[m.name].result() if m.name in gauges else nothing for m in wanted}


def _visible(
    mask: Mask | None,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    kind: str,
    padding: Tensor | None,
    device: torch.device,
) -> Visible:
    real = first = None
    if padding is not None:
        if padding.shape != (batch, queries if kind == "cross" else keys):
            raise ShapeError(
                f"padding is {tuple(padding.shape)}, True at real tokens; this attention expects "
                f"({batch}, {queries if kind == 'cross' else keys})"
            )
        real = padding[:, padding.shape[1] - queries :].bool()
        first = None if kind == "cross" else padding.int().argmax(-1)
    sizes = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
    return Visible.of(mask, **sizes, real=real, first=first, device=device)


@contextmanager
def watch(model: nn.Module) -> Iterator[Watcher]:
    """A `Watcher` of the model's attention layers; the model is given back as it was, whatever happens.

    Args:
        model: any model that `polyhead.attach` accepts.

    Raises:
        UnsupportedModel: the model's attention cannot be looked into.
    """
    with attach(model) as attachment:
        watcher = Watcher(model, attachment.layers)
        with attachment.handling(watcher.handle):
            yield watcher


def output_projection(
    model: nn.Module, name: str, module: nn.Module, heads: int, width: int
) -> Tensor | None:
    """The layer's projection of the joined heads, by heads `(H, Dv, d)`; None where none is found.

    Looked for by the names that transformers uses, in the attention module and in the one that holds it;
    it has to be linear and to take H·Dv features.
    """
    outer = model.get_submodule(name.rpartition(".")[0]) if "." in name else None
    for owner, names in ((module, _OWN), (outer, _OUTSIDE)):
        for path in names if owner is not None else ():
            found: Any = owner
            for step in path.split("."):
                found = getattr(found, step, None)
            if isinstance(found, nn.Sequential | nn.ModuleList) and len(found):
                found = found[0]
            weight = _weight(found, heads * width)
            if weight is not None:
                return weight.unflatten(0, (heads, width))
    return None


def _weight(module: Any, features: int) -> Tensor | None:
    """The matrix `(features, d)` of a linear module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        weight = weight.T
    elif type(module).__name__ != "Conv1D":  # GPT-2's linear module, which holds the transpose
        return None
    return weight.detach() if weight.shape[0] == features else None
