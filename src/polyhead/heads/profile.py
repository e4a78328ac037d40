"""`profile`: measure every head of a pretrained model on a text, in O(length) memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from polyhead.errors import ConfigError, MissingExtra, PolyheadError, unknown_name
from polyhead.head_scores import HeadScores
from polyhead.heads.inputs import Given, Reader, Source, Text
from polyhead.heads.measurement import Gauge, Measurement, Progress, chosen
from polyhead.heads.measurements.places import WindowMass
from polyhead.heads.measurements.received import ReceivedGauge, SinkGauge
from polyhead.heads.pictures import LookupGauge, Lookups, PictureGauge, Pictures
from polyhead.heads.roles import RoleRules, Roles
from polyhead.heads.watch import Watcher, watch
from polyhead.hf import LayerInfo
from polyhead.hf.layers import pretrained_parts
from polyhead.tasks.reading import evaluating, texts

__all__ = ["Profile", "profile"]

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Profile(Mapping[str, HeadScores]):
    """What was measured, by name: `profile["induction"]`.

    Attributes:
        scores: the measurements, in order.
        layers: the model's attention layers, in forward order.
        ids: token ids of the (first) text; empty where the model read no tokens.
        received: per layer float32 `(H, S)`: mean attention that each position of the first text receives
            from the tokens that may look at it (NaN: nobody may); empty if not measured.
        future_influence: per layer float32 `(H, S)`: FAI of each position, NaN where not defined; see the
            measurement "future_influence"; empty if not measured.
        sinks: per layer the positions found to be sinks; empty if not measured.
    """

    scores: Mapping[str, HeadScores]
    layers: tuple[LayerInfo, ...]
    ids: tuple[int, ...] = ()
    received: tuple[Array, ...] = ()
    future_influence: tuple[Array, ...] = ()
    sinks: tuple[tuple[int, ...], ...] = ()
    _again: Callable[..., Any] | None = field(default=None, repr=False)
    _pictures: Pictures | None = field(default=None, repr=False)
    _model: Any = field(default=None, repr=False)
    _tokenizer: Any = field(default=None, repr=False)

    def __getitem__(self, name: str) -> HeadScores:
        if name not in self.scores:
            raise unknown_name("measurement of this profile", name, self.scores)
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        heads = sum(layer.heads for layer in self.layers)
        what = f"{len(self.layers)} layers, {heads} heads, {len(self.ids)} tokens"
        return f"Profile({what}; {', '.join(self.scores)})"

    @property
    def roles(self) -> Roles:
        """One word for what each head does, by the default `RoleRules` (`RoleRules(...).assign(profile)`)."""
        return RoleRules().assign(self)

    @property
    def is_encoder(self) -> bool:
        """Whether every token may look at every other, in all layers."""
        return all(layer.kind == "encoder" for layer in self.layers)

    def anchors(self, share: float = 0.3) -> Array:
        """FAI of each position, averaged over the global heads: the `share` that look furthest away.

        With the default share, the signal FAI_s of arXiv 2510.13554; `(S,)`, NaN where not defined.
        """
        if not self.future_influence or "distance" not in self:
            raise ConfigError(
                "anchors need the measurements 'future_influence' and 'distance'; profile with both"
            )
        chosen_heads = self["distance"].top(share)
        if not chosen_heads:
            raise ConfigError(f"share={share} leaves no head; give a larger share")
        return np.mean([self.future_influence[layer][head] for layer, head in chosen_heads], axis=0)

    def pictures(self, side: int = 48) -> Pictures:
        """Every head's attention map of the first text, made small; reads the text again if need be."""
        if self._pictures is not None and self._pictures.side == min(side, max(len(self.ids), 1)):
            return self._pictures
        gauges = self._look(lambda layer: PictureGauge(side))
        return _pictures(gauges)

    def lookups(self, queries: Iterable[int] | None = None, *, k: int = 8) -> Lookups:
        """Where each head looks from the tokens at `queries` (default: all); reads the text again."""
        positions = tuple(range(len(self.ids))) if queries is None else tuple(int(q) for q in queries)
        if self.ids and any(not 0 <= q < len(self.ids) for q in positions):
            raise ConfigError(
                f"queries must lie in 0..{len(self.ids) - 1}, got {min(positions)}..{max(positions)}"
            )
        gauges = self._look(lambda layer: LookupGauge(positions, k))
        found = [(_numpy(g.positions), _numpy(g.weights)) for g in gauges]
        return Lookups(positions, tuple(p for p, _ in found), tuple(w for _, w in found))

    def _look(self, make: Callable[[LayerInfo], Any]) -> list[Any]:
        if self._again is None:
            raise PolyheadError(
                "this profile was loaded and knows no model to look at; call polyhead.profile again"
            )
        return self._again(make)

    def to_frame(self) -> Any:
        """A pandas DataFrame: one line a head, one column a measurement."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("pandas", "report", "Profile.to_frame()") from error
        pairs = [(layer, head) for layer, info in enumerate(self.layers) for head in range(info.heads)]
        index = pandas.MultiIndex.from_tuples(pairs, names=["layer", "head"])
        return pandas.DataFrame({name: scores.flat for name, scores in self.items()}, index=index)

    def to_json(self) -> dict[str, Any]:
        """The scores and what they are about as plain JSON data; not the signals of single tokens."""
        return {
            "scores": {name: scores.to_json() for name, scores in self.items()},
            "layers": [
                {
                    "index": layer.index,
                    "name": layer.name,
                    "kind": layer.kind,
                    "heads": layer.heads,
                    "kv_heads": layer.kv_heads,
                    "head_dim": layer.head_dim,
                    "window": layer.window,
                    "cache_index": layer.cache_index,
                }
                for layer in self.layers
            ],
            "ids": list(self.ids),
            "sinks": [list(s) for s in self.sinks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of `to_json`."""
        try:
            return cls(
                {name: HeadScores.from_json(s) for name, s in data["scores"].items()},
                tuple(LayerInfo(**layer) for layer in data["layers"]),
                tuple(data["ids"]),
                sinks=tuple(tuple(s) for s in data["sinks"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a profile: {error}; expected what Profile.to_json gave") from error

    def to_html(self, path: Any) -> None:
        """Write the profile as one HTML page that opens offline: the report without the savings curve.

        Raises:
            ConfigError: the profile is not one of a text, or `path` cannot be written.
            MissingExtra: jinja2 is not installed.
        """
        if self._again is None:
            raise PolyheadError("this profile was loaded and knows no model; call polyhead.profile again")
        # the one import that points up: a profile hands itself to the page (see docs/design.md, section 4)
        from polyhead.report.profile_page import write_profile

        write_profile(self, self._model, self._tokenizer, path)


def profile(
    model: nn.Module,
    tokenizer: Any = None,
    text: str | Sequence[str] | Tensor | Mapping[str, Any] | None = None,
    *,
    length: int | None = None,
    measurements: str | Measurement | Iterable[str | Measurement] | None = None,
    seed: int = 0,
    pictures: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure every head of a transformers model; no L×L tensor is ever held.

    Args:
        model: any model that `polyhead.attach` accepts, attached or not; it is given back as it was.
        tokenizer: its tokenizer. Not needed for token ids or a mapping.
        text: what the model reads: a text or several (measured over all), token ids `(S,)` or `(N, S)`, or a
            mapping of the model's own inputs (`pixel_values`, a padded batch, ...). Default: the English
            sample that comes with Polyhead.
        length: use the first `length` tokens of each text. Default: all.
        measurements: names out of `polyhead.heads.MEASUREMENTS`, or `Measurement` objects. Default: all that
            make sense for the model, with "window" an eighth of the shortest text if that is below 64.
        seed: of the random tokens and needles that some measurements have the model read.
        pictures: also make `Profile.pictures` of this side in the same pass.
        progress: called as progress(what, done, total) after each attention layer.

    Raises:
        UnsupportedModel: the model's attention cannot be looked into.
        ConfigError: the text is too short, longer than the model can read, or a measurement that was asked
            for by name does not suit the model.
    """
    pretrained_parts(model)  # before anything is said of the text
    if isinstance(tokenizer, str | Tensor):
        raise ConfigError(
            f"tokenizer comes before the text, and a {type(tokenizer).__name__} is none: "
            "profile(model, tokenizer, text), or profile(model, text=ids) for token ids"
        )
    if text is None:
        from polyhead.tasks import sample_text

        text = sample_text()
    if isinstance(text, Mapping):
        if length is not None:
            raise ConfigError("length cuts texts; a mapping of the model's inputs is read as it is")
        main: Source = Given(tuple(text), tuple(text.values()))
    else:
        main = Text(texts(model, tokenizer, text, length))
    with evaluating(model), watch(model) as watcher:
        kinds = frozenset(layer.kind for layer in watcher.layers)
        wanted = _suitable(chosen(measurements), measurements is None, model, tokenizer, kinds)
        if measurements is None and isinstance(main, Text):
            eighth = max(1, min(map(len, main.ids)) // 8)
            wanted = [WindowMass(min(m.width, eighth)) if isinstance(m, WindowMass) else m for m in wanted]
        sources: dict[Source | None, list[Measurement]] = {}
        for measurement in wanted:
            sources.setdefault(measurement.source, []).append(measurement)
        if None in sources or pictures is not None:
            sources = {
                None: sources.pop(None, []),
                **sources,
            }  # the text first: what is wrong with it shows soon
        gauges: dict[str, list[Gauge | None]] = {}
        small: list[PictureGauge] = []
        for source, group in sources.items():
            by_layer: list[list[Gauge]] = []
            for layer in watcher.layers:
                made = {m.name: m.gauge(layer.heads) for m in group if layer.kind in m.kinds}
                for m in group:
                    gauges.setdefault(m.name, []).append(made.get(m.name))
                by_layer.append(list(made.values()))
                if source is None and pictures is not None:
                    small.append(PictureGauge(pictures))
                    by_layer[-1].append(small[-1])
            _read(source or main, watcher, by_layer, model, tokenizer, seed, progress)
    scores = {m.name: _scores(m, gauges[m.name], watcher.layers) for m in wanted}
    signals = _signals(gauges)
    again = partial(_again, model, main)
    return Profile(
        scores,
        watcher.layers,
        _ids(main),
        **signals,
        _again=again,
        _pictures=_pictures(small) if small else None,
        _model=model,
        _tokenizer=tokenizer,
    )


def _read(
    source: Source,
    watcher: Watcher,
    gauges: Sequence[Sequence[Gauge]],
    model: nn.Module,
    tokenizer: Any,
    seed: int,
    progress: Progress | None,
) -> None:
    """Have the model read a source while the gauges look on."""
    total = source.passes * sum(bool(g) for g in gauges)
    done = 0

    def after(layer: LayerInfo) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(source.title, min(done, total), total)

    source.read(Reader(model, tokenizer, seed, partial(watcher.on, gauges, after=after)))


def _again(model: nn.Module, source: Source, make: Callable[[LayerInfo], Any]) -> list[Any]:
    """Read a source once more with one gauge a layer."""
    with evaluating(model), watch(model) as watcher:
        gauges = [make(layer) for layer in watcher.layers]
        _read(source, watcher, [[g] for g in gauges], model, None, 0, None)
    return gauges


def _suitable(
    measurements: list[Measurement], default: bool, model: nn.Module, tokenizer: Any, kinds: frozenset[str]
) -> list[Measurement]:
    """The measurements that make sense for the model; asked for by name, one that does not is an error."""
    found = []
    for measurement in measurements:
        why = ""
        if not kinds & measurement.kinds:
            of, has = (" and ".join(sorted(k)) for k in (measurement.kinds, kinds))
            why = f"it is about {of} layers, the model has {has} layers"
        elif measurement.source is not None:
            why = measurement.source.suits(model, tokenizer, kinds)
        if not why:
            found.append(measurement)
        elif not default:
            raise ConfigError(f"measurement {measurement.name!r} does not suit {type(model).__name__}: {why}")
    return found


def _scores(m: Measurement, gauges: Sequence[Gauge | None], layers: Sequence[LayerInfo]) -> HeadScores:
    values = tuple(
        np.full(layer.heads, np.nan) if gauge is None else _numpy(gauge.result())
        for gauge, layer in zip(gauges, layers, strict=True)
    )
    return HeadScores(
        values,
        name=m.name,
        meaning=m.describe([g for g in gauges if g is not None]),
        unit=m.unit,
        direction=m.direction,
        kv_groups=tuple(layer.heads // layer.kv_heads for layer in layers),
    )


def _signals(gauges: Mapping[str, Sequence[Gauge | None]]) -> dict[str, Any]:
    """What some gauges know of single tokens."""
    signals: dict[str, Any] = {}
    for name in ("future_influence", "concentration", "found_sinks"):
        found = [g.received for g in gauges.get(name, ()) if isinstance(g, ReceivedGauge)]
        rows = tuple(_numpy(r[0].float()) for r in found if r is not None)
        if rows and len(rows) == len(gauges[name]):
            signals["future_influence" if name == "future_influence" else "received"] = rows
    sinks = [g.sinks for g in gauges.get("found_sinks", ()) if isinstance(g, SinkGauge)]
    if any(sinks):
        signals["sinks"] = tuple(tuple(items[0]) if items else () for items in sinks)
    return signals


def _numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()


def _pictures(gauges: Sequence[PictureGauge]) -> Pictures:
    side = max((g.side for g in gauges), default=0)
    mass = tuple(_numpy(g.mass.float()) for g in gauges if g.mass is not None)
    peak = tuple(_numpy(g.peak) for g in gauges if g.peak is not None)
    return Pictures(side, mass, peak)


def _ids(source: Source) -> tuple[int, ...]:
    if isinstance(source, Text):
        return tuple(source.ids[0].tolist())
    assert isinstance(source, Given)
    ids = dict(zip(source.names, source.values, strict=True)).get("input_ids")
    return tuple(ids[0].tolist()) if isinstance(ids, Tensor) else ()
