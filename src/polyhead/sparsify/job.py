"""The job behind `polyhead sparsify`: match the shares, try, time, and write what came out.

Everything that can be wrong with the call is found before the work starts. What is finished is kept at once,
so that the same command goes on where it was cut off.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from polyhead.console import wide_console
from polyhead.description import to_json
from polyhead.errors import ConfigError, PolyheadError
from polyhead.folder import JobFolder, read, write
from polyhead.machine import processor
from polyhead.report.page import require_jinja
from polyhead.report.stages import Stages
from polyhead.sparsify.levels import listen, solve
from polyhead.sparsify.methods import METHODS, Method, find, key
from polyhead.sparsify.page import build_page
from polyhead.sparsify.plots import plots
from polyhead.sparsify.settings import LENGTHS, QUICK, ROOM, Settings
from polyhead.sparsify.table import Comparison, Row
from polyhead.sparsify.timing import Round, Taken, measure
from polyhead.sparsify.trials import Outcome, Trial
from polyhead.tasks.reading import context_length

__all__ = ["run"]

Pair = tuple[str, float]

_COMPARED = 2  # methods that are held against one measurement of the dense model: hosts change within minutes


def run(
    model: str,
    *,
    methods: Sequence[str] | None = None,
    shares: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    facts: int | None = None,
    texts: int = 1,
    rounds: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] = "sparsify",
    quick: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Compare selectors on a pretrained model, and write the table, the plots and the page into a folder.

    Args:
        model: a causal language model, as `polyhead.hf.load` takes it by name.
        methods: names of `methods.METHODS`, or Python files that define `METHOD`. Default: all but
            oracles, which take hours at thousands of tokens.
        shares: of the keys, how many are read. Default: 0.1 and 0.25.
        lengths: tokens of the texts with facts. Default: 1,024, 2,048, 4,096 and 8,192, as far as the model
            reads.
        facts, texts, rounds, seed: see `Settings`.
        out: the folder; empty, not there yet, or holding a comparison under the same settings: it goes on,
            with the same methods and shares or others. The table then has a row for everything in it, but
            for methods of files that this command does not name.
        quick: a much reduced run.
        console: where the table goes; progress goes to standard error. Default: standard output.

    Raises:
        PolyheadError: something is wrong with the call; nothing was tried.
    """
    require_jinja()
    console = wide_console() if console is None else console
    given = {"shares": _tuple(shares), "lengths": _tuple(lengths), "facts": facts, "rounds": rounds}
    own: dict[str, Any] = dict(QUICK) if quick else {}
    own |= {name: value for name, value in given.items() if value is not None}
    settings = Settings(model, _tuple(methods) or _practical(), texts=texts, seed=seed, **own)
    stages = Stages(Console(stderr=True))
    start = time.perf_counter()
    with stages:
        loaded, tokenizer, settings = _load(settings, lengths is None, stages, console)
        trial = Trial(loaded, tokenizer, settings)
        settings = trial.settings = _fitting(trial, methods is None, console)
        chosen = Chosen.of(settings)
        folder = JobFolder(out, _rules(settings), file="settings.json", what="comparison of selectors")
        with folder.held():
            levels = _levels(trial, chosen, folder.path, stages)
            outcomes = _outcomes(trial, chosen, levels, folder.path, stages)
            times = _times(settings, chosen, levels, folder.path, stages)
            outcomes |= _earlier(chosen, folder.path)
        tried = {name: own for name, own in METHODS.items() if any(name == one for one, _ in outcomes)}
        tried |= chosen.methods
        order = ["", *tried]
        rows = [
            Row(method, share, outcomes[method, share], tuple(times.get((method, share), ())))
            for method, share in sorted(outcomes, key=lambda pair: (order.index(pair[0]), pair[1]))
        ]
        machine = f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}"
        comparison = Comparison(settings, tried, tuple(rows), machine)
        page = _write(comparison, folder.path)
    console.print(comparison.table())
    console.print(comparison.verdict(), markup=False, soft_wrap=True)
    took = time.perf_counter() - start
    console.print(f"{took:.0f} s; the page is {page}", markup=False, soft_wrap=True)
    return comparison


def _practical() -> tuple[str, ...]:
    return tuple(name for name, method in METHODS.items() if not method.oracle)


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"methods, shares and lengths must be sequences of values; got {values!r}")
    return tuple(values)


def _rules(settings: Settings) -> dict[str, Any]:
    """What results depend on: methods, shares and rounds can be added to a folder."""
    return {k: v for k, v in to_json(settings).items() if k not in ("methods", "shares", "rounds")}


def _load(
    settings: Settings, all_lengths: bool, stages: Stages, console: Console
) -> tuple[Any, Any, Settings]:
    from polyhead import hf

    with stages.stage("loading the model"):
        found = hf.load(settings.model, announce=console.print)
        model, tokenizer = found.model, found.tokenizer
        with hf.attach(model) as attachment:
            kinds = {layer.kind for layer in attachment.layers}
    if kinds != {"decoder"} or not hasattr(model, "generate"):
        raise ConfigError(
            f"model: {settings.model!r} is no causal language model; facts are asked for, which takes one"
        )
    if tokenizer is None:
        raise ConfigError(f"model: {settings.model!r} came without a tokenizer, so it cannot read a text")
    limit = context_length(model)
    if limit is None or settings.longest <= limit:
        return model, tokenizer, settings
    if not all_lengths:
        raise ConfigError(f"lengths: the model reads {limit:,} tokens; got {settings.longest:,}")
    fitting = tuple(length for length in settings.lengths if length <= limit)
    if not fitting:
        raise ConfigError(
            f"lengths: the model reads {limit:,} tokens, less than the least default, {LENGTHS[0]:,}; "
            f"give lengths of your own, such as --lengths {limit}"
        )
    return model, tokenizer, replace(settings, lengths=fitting)


def _fitting(trial: Trial, all_methods: bool, console: Console) -> Settings:
    """The settings with the methods that can read with this model; of those asked for, all must.

    Some ask for what a model may not have, such as rotary positions: a few tokens tell.
    """
    settings, found = trial.settings, []
    for method in settings.methods:
        try:
            trial.glance(find(method))
        except PolyheadError as error:
            if not all_methods:
                raise
            console.print(f"left out: {method}: {error}", markup=False, soft_wrap=True)
        else:
            found.append(method)
    return replace(settings, methods=tuple(found))


@dataclass(frozen=True)
class Chosen:
    """The methods of a command, by what their results are kept under.

    Attributes:
        given: how each was named.
        methods: as they were when the command began.
        shares: of the keys.
    """

    given: dict[str, str]
    methods: dict[str, Method]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, settings: Settings) -> Chosen:
        """Those of the settings."""
        given = {key(name): name for name in settings.methods}
        return cls(given, {own: find(name) for own, name in given.items()}, settings.shares)

    @property
    def pairs(self) -> list[Pair]:
        """Every method at every share."""
        return [(name, share) for name in self.methods for share in self.shares]

    def same(self, name: str) -> str:
        """How a method was named, if that is still the same one: others look it up again.

        Raises:
            PolyheadError: its file has changed.
        """
        if key(self.given[name]) != name:
            raise PolyheadError(
                f"methods: {self.given[name]} has changed since the command began; the same command goes on "
                "with what it says now"
            )
        return self.given[name]


def _levels(trial: Trial, chosen: Chosen, path: Path, stages: Stages) -> dict[Pair, float]:
    """For every method and share the level at which it reads so much.

    Levels that an earlier version matched on a few layers, kept as lists, are matched anew.
    """
    file = path / "levels.json"
    held = read(file) if file.is_file() else []
    known = _matched(held)
    missing = [pair for pair in chosen.pairs if pair not in known]
    if missing:
        with stages.stage("matching shares", len(missing)) as advance:
            text = trial.text(trial.settings.longest - ROOM)
            readers = [trial.reader(chosen.methods[name], 1.0, len(text)) for name, _ in missing]
            heard = listen(trial.model, text, followed={n for one in readers for n in one.followed})
            for name, share in missing:
                level, _ = solve(chosen.methods[name], share, heard)
                known[name, share] = level
                held.append({"method": name, "share": share, "level": level})
                write(file, json.dumps(held, indent=1))
                advance(f"{name} {share:g}")
    return {pair: known[pair] for pair in chosen.pairs}


def _matched(held: list[Any]) -> dict[Pair, float]:
    return {(one["method"], one["share"]): one["level"] for one in held if isinstance(one, dict)}


def _earlier(chosen: Chosen, path: Path) -> dict[Pair, Outcome]:
    """What commands before this one tried in the same folder, but for files that this one does not name."""
    found: dict[Pair, Outcome] = {}
    for pair, level in _matched(read(path / "levels.json")).items():
        own = _kept(path / "trials", pair, level) if pair[0] in {*METHODS, *chosen.methods} else None
        if own is not None and pair not in chosen.pairs:
            found[pair] = own
    return found


def _outcomes(
    trial: Trial, chosen: Chosen, levels: dict[Pair, float], path: Path, stages: Stages
) -> dict[Pair, Outcome]:
    """What came out: of the model as it is, then of every method and share."""
    found: dict[Pair, Outcome] = {}
    pairs: list[Pair] = [("", 1.0), *levels]
    with stages.stage("trying", trial.steps * len(pairs)) as advance:
        for pair in pairs:
            name, share = pair
            level = levels.get(pair)
            said = f"{name} {share:g}" if name else "dense"
            own = _kept(path / "trials", pair, level)
            if own is not None:
                found[pair] = own
                for _ in range(trial.steps):
                    advance(said)
                continue
            method = chosen.methods[name] if name else None
            found[pair] = trial.run(method, level, lambda said=said: advance(said))  # type: ignore[misc]
            write(path / "trials" / _file(pair, level), json.dumps(found[pair].to_json(), indent=1))
    return found


def _file(pair: Pair, level: float | None) -> str:
    name, share = pair
    return f"{name}.{share:g}.at.{level:.12g}.json" if name else "dense.json"


def _kept(path: Path, pair: Pair, level: float | None) -> Outcome | None:
    """What came out at this level before; an earlier version named no level in its files."""
    name, share = pair
    for file in (path / _file(pair, level), path / f"{name}.{share:g}.json"):
        if file.is_file() and (found := _outcome(file)).level == level:
            return found
    return None


def _outcome(file: Path) -> Outcome:
    try:
        return Outcome.from_json(read(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise PolyheadError(
            f"{file} is not what came out of a trial ({error!r}); remove it, and it is made anew"
        ) from None


def _times(
    settings: Settings, chosen: Chosen, levels: dict[Pair, float], path: Path, stages: Stages
) -> dict[Pair, list[Round]]:
    """Prefill and decoding in rounds, with the dense model before every other method."""
    file = path / "times.json"
    held = _held_times(path)
    timed = [pair for pair in levels if not chosen.methods[pair[0]].oracle]  # its time would say nothing
    found = {pair: held.setdefault((*pair, levels[pair]), []) for pair in timed}
    now = _matched(read(path / "levels.json"))
    earlier = {
        (name, share): rounds
        for (name, share, level), rounds in held.items()
        if (name, share) not in found and now.get((name, share)) == level
    }
    with stages.stage("timing", settings.rounds * len(timed)) as advance:
        for number in range(settings.rounds):
            same: Taken | None = None  # of the dense model, for the next ones
            left = 0
            for pair in timed:
                name, share = pair
                if len(found[pair]) <= number:
                    size = {"length": settings.longest, "steps": settings.steps}
                    if same is None or not left:
                        same, left = measure(settings.model, None, None, **size), _COMPARED
                    left -= 1
                    own = measure(settings.model, chosen.same(name), levels[pair], **size)
                    found[pair].append(Round(own, same))
                    rows = [
                        {"method": m, "share": s, "level": at, "rounds": [one.to_json() for one in rounds]}
                        for (m, s, at), rounds in held.items()
                        if rounds
                    ]
                    write(file, json.dumps(rows, indent=1))
                advance(f"{name} {share:g}")
    found |= earlier
    dense = dict.fromkeys(one.dense for rounds in found.values() for one in rounds)
    return found | {("", 1.0): [Round(one, one) for one in dense]}


def _held_times(path: Path) -> dict[tuple[str, float, float | None], list[Round]]:
    """Rounds by method, share and level.

    An earlier version kept lists of method, share and rounds, at the level in its lists of levels.
    """
    levels, file = path / "levels.json", path / "times.json"
    before = {(m, s): at for m, s, at in (one for one in read(levels) if isinstance(one, list))}
    found: dict[tuple[str, float, float | None], list[Round]] = {}
    for one in read(file) if file.is_file() else []:
        if isinstance(one, list):
            name, share, rounds = one
            place = (name, share, before.get((name, share)))
        else:
            place, rounds = (one["method"], one["share"], one["level"]), one["rounds"]
        found[place] = [Round.from_json(made) for made in rounds]
    return found


def _write(comparison: Comparison, path: Path) -> Path:
    write(path / "results.json", json.dumps(comparison.to_json(), ensure_ascii=False, indent=1))
    write(path / "results.csv", comparison.to_csv())
    write(path / "README.md", comparison.to_markdown())
    for name, drawing in plots(comparison).items():
        write(path / name, drawing)
    page = path / "sparsify.html"
    write(page, build_page(comparison))
    return page
