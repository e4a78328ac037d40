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
from dataclasses import replace
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
from polyhead.sparsify.methods import METHODS, find
from polyhead.sparsify.page import build_page
from polyhead.sparsify.plots import plots
from polyhead.sparsify.settings import LENGTHS, QUICK, ROOM, Settings
from polyhead.sparsify.table import Comparison, Row
from polyhead.sparsify.timing import Round, Taken, measure
from polyhead.sparsify.trials import Outcome, Trial
from polyhead.tasks.reading import context_length

__all__ = ["run"]

Pair = tuple[str, float]


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
            with the same methods and shares or others.
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
        folder = JobFolder(out, _rules(settings), file="settings.json", what="comparison of selectors")
        with folder.held():
            levels = _levels(trial, folder.path, stages)
            outcomes = _outcomes(trial, levels, folder.path, stages)
            times = _times(settings, levels, folder.path, stages)
        rows = [
            Row(method, share, outcomes[method, share], tuple(times.get((method, share), ())))
            for method, share in outcomes
        ]
        machine = f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}"
        comparison = Comparison(settings, tuple(rows), machine)
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


def _pairs(settings: Settings) -> list[Pair]:
    return [(method, share) for method in settings.methods for share in settings.shares]


def _levels(trial: Trial, path: Path, stages: Stages) -> dict[Pair, float]:
    """For every method and share the level at which it reads so much."""
    file = path / "levels.json"
    known = {(m, float(s)): level for m, s, level in read(file)} if file.is_file() else {}
    missing = [pair for pair in _pairs(trial.settings) if pair not in known]
    if missing:
        with stages.stage("matching shares", len(missing)) as advance:
            text = trial.text(trial.settings.longest - ROOM)
            readers = [trial.reader(find(method), 1.0, len(text)) for method, _ in missing]
            heard = listen(trial.model, text, followed={n for one in readers for n in one.followed})
            for method, share in missing:
                known[method, share], _ = solve(find(method), share, heard)
                write(file, json.dumps([[m, s, level] for (m, s), level in known.items()], indent=1))
                advance(f"{method} {share:g}")
    return {pair: known[pair] for pair in _pairs(trial.settings)}


def _outcomes(trial: Trial, levels: dict[Pair, float], path: Path, stages: Stages) -> dict[Pair, Outcome]:
    """What came out: of the model as it is, then of every method and share."""
    found: dict[Pair, Outcome] = {}
    pairs: list[Pair] = [("", 1.0), *levels]
    with stages.stage("trying", trial.steps * len(pairs)) as advance:
        for method, share in pairs:
            file = path / "trials" / (f"{_name(method)}.{share:g}.json" if method else "dense.json")
            said = f"{method} {share:g}" if method else "dense"
            if file.is_file():
                found[method, share] = _outcome(file)
                for _ in range(trial.steps):
                    advance(said)
                continue
            own = find(method) if method else None
            level = levels[method, share] if method else None
            found[method, share] = trial.run(own, level, lambda said=said: advance(said))  # type: ignore[misc]
            write(file, json.dumps(found[method, share].to_json(), indent=1))
    return found


def _outcome(file: Path) -> Outcome:
    try:
        return Outcome.from_json(read(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise PolyheadError(
            f"{file} is not what came out of a trial ({error!r}); remove it, and it is made anew"
        ) from None


def _times(
    settings: Settings, levels: dict[Pair, float], path: Path, stages: Stages
) -> dict[Pair, list[Round]]:
    """Prefill and decoding in rounds, each of which begins with the dense model."""
    file = path / "times.json"
    held = read(file) if file.is_file() else []
    found = {(m, float(s)): [Round.from_json(one) for one in rounds] for m, s, rounds in held}
    timed = [pair for pair in levels if not find(pair[0]).oracle]  # its time would say nothing
    with stages.stage("timing", settings.rounds * len(timed)) as advance:
        for number in range(settings.rounds):
            same: Taken | None = None  # of the dense model, for all of this round
            for method, share in timed:
                own = found.setdefault((method, share), [])
                if len(own) <= number:
                    size = {"length": settings.longest, "steps": settings.steps}
                    same = same or measure(settings.model, None, None, **size)
                    own.append(Round(measure(settings.model, method, levels[method, share], **size), same))
                    rows = [[m, s, [one.to_json() for one in rounds]] for (m, s), rounds in found.items()]
                    write(file, json.dumps(rows, indent=1))
                advance(f"{method} {share:g}")
    dense = dict.fromkeys(one.dense for pair in timed for one in found.get(pair, ()))
    found["", 1.0] = [Round(one, one) for one in dense]
    return found


def _name(method: str) -> str:
    return Path(method).stem


def _write(comparison: Comparison, path: Path) -> Path:
    write(path / "results.json", json.dumps(comparison.to_json(), ensure_ascii=False, indent=1))
    write(path / "results.csv", comparison.to_csv())
    write(path / "README.md", comparison.to_markdown())
    for name, drawing in plots(comparison).items():
        write(path / name, drawing)
    page = path / "sparsify.html"
    write(page, build_page(comparison))
    return page
