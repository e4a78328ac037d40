"""The main job, `polyhead report MODEL`: look at every head, try smaller caches, write the report.

Everything that can be wrong with the call is found before the work starts: the folder, the text, the model.
Files are written at the very end, all or none, so that an interruption leaves what was there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import torch
from rich.console import Console

from polyhead.console import wide_console
from polyhead.report import choosing, summary, words
from polyhead.report import data as d
from polyhead.report import savings as curve
from polyhead.report.assemble import assemble, machine
from polyhead.report.effort import Effort, steps
from polyhead.report.given import effort_of, read_text, tokens_of, usable_folder
from polyhead.report.packing import picture_side
from polyhead.report.page import require_jinja
from polyhead.report.stages import Stages
from polyhead.report.trying import Trial
from polyhead.report.write import Written, write_report

__all__ = ["run"]


def run(
    model: str,
    *,
    text: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "report",
    length: int | None = None,
    seeds: int = 3,
    seed: int = 0,
    fractions: Sequence[float] | None = None,
    sink: int = 4,
    window: int = 256,
    losses: float = 0.05,
    quick: bool = False,
    savings: bool = True,
    console: Console | None = None,
) -> Written:
    """Look at every head of a model, try smaller caches, and write the report into a folder.

    Args:
        model: what `polyhead.hf.load` takes by name: "smollm2", "minilm", a folder, a GGUF file, a hub id.
        text: a UTF-8 file that the heads are looked at on. Default: the packaged English sample.
        out: the folder to write to; empty, not there yet, or holding an earlier report.
        length: how many tokens of the text to read. Default: 2048, or all of a shorter text.
        seeds: how many random choices of heads to compare with, at each size that they are tried at.
        seed: the first of these seeds; it also draws the facts and all else that is drawn.
        fractions: shares of KV heads to keep in full. Default: `savings.FRACTIONS`.
        sink, window: first and recent tokens that the other heads keep.
        losses: share of the hidden facts found with the whole cache that a recommended cache may lose.
        quick: a much reduced run, to see that everything works.
        savings: whether to try smaller caches at all.
        console: where progress and findings go. Default: standard output, progress on standard error.

    Raises:
        PolyheadError: something is wrong with the call; nothing has been written.
    """
    effort = effort_of(seeds, seed, fractions, sink, window, quick, losses)
    command = _command(
        model,
        text=(text, None),
        length=(length, None),
        seeds=(seeds, 3),
        seed=(seed, 0),
        fractions=(None if fractions is None else ",".join(map(str, fractions)), None),
        sink=(sink, 4),
        window=(window, 256),
        losses=(losses, 0.05),
        out=(out, None),
        quick=(quick, False),
        no_savings=(not savings, False),
    )
    require_jinja()
    folder = usable_folder(out)
    source = read_text(text)
    console = console or wide_console(width=120)
    stages = Stages(Console(stderr=True))
    with stages:
        loaded, tokenizer = _load(model, stages, console)
        ids, held_out = tokens_of(loaded, tokenizer, source, text, length, console)
        profile = _profile(loaded, tokenizer, ids, seed, stages)
        measured = None
        notes: list[str] = []
        if savings and not profile.is_encoder:
            measured, notes = _savings(loaded, tokenizer, profile, effort, held_out, model, stages)
        with stages.stage("drawing"):
            extra = () if measured is None else (measured.gradients,)
            report = assemble(model, loaded, tokenizer, profile, ids, text, measured, notes, extra)
            report = replace(report, run=_about(command, effort, stages))
            written = write_report(report, folder)
    _tell(report, written, console)
    return written


# -- the parts of the work -----------------------------------------------------------------------------


def _load(name: str, stages: Stages, console: Console) -> tuple[Any, Any]:
    from polyhead import hf

    with stages.stage("loading the model"):
        loaded = hf.load(name, announce=console.print)
        hf.attach(loaded.model).detach()  # an architecture that cannot be looked into is refused here
    return loaded.model, loaded.tokenizer


def _profile(model: Any, tokenizer: Any, ids: torch.Tensor, seed: int, stages: Stages) -> Any:
    from polyhead.heads import profile
    from polyhead.hf import attach

    with attach(model) as attachment:
        heads = sum(layer.heads for layer in attachment.layers)
        causal = all(layer.kind == "decoder" for layer in attachment.layers)
    side = picture_side(heads, causal=causal, tokens=len(ids))
    with stages.stage("looking at every head") as advance:
        return profile(model, tokenizer, ids, seed=seed, pictures=side, progress=advance)


def _savings(
    model: Any,
    tokenizer: Any,
    profile: Any,
    effort: Effort,
    held_out: list[int] | None,
    name: str,
    stages: Stages,
) -> tuple[curve.Curve | None, list[str]]:
    if "retrieval" not in profile:
        return None, [
            "Retrieval scores could not be measured on this model, so no heads could be chosen by them."
        ]
    why = curve.why_not(model, tokenizer, effort)
    if why:
        return None, [why]
    trial = Trial(model, tokenizer, effort, held_out)
    with stages.stage("asking which heads answers need", trial.effort.choosing_texts) as advance:
        gradients = choosing.gradients(model, tokenizer, trial.effort, lambda done: advance("texts"))
    with stages.stage("trying smaller caches", steps(trial.effort, len(trial.all_heads))) as advance:
        trial.report_to(advance)
        found = curve.measure(trial, profile["retrieval"], gradients, name)
    return found, list(found.notes)


# -- what there is to say ---------------------------------------------------------------------------------


def _command(model: str, **options: tuple[Any, Any]) -> str:
    """The command as one would type it, from options as pairs (value, default)."""
    told = [f"polyhead report {model}"]
    for name, (value, default) in options.items():
        if value != default:
            told.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(told)


def _about(command: str, effort: Effort, stages: Stages) -> d.Run:
    """How the report came to be."""
    from polyhead import __version__

    return d.Run(
        version=__version__,
        command=command,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        machine=machine(),
        seeds=effort.seeds,
        phases=tuple(stages.phases),
    )


def _tell(report: d.ReportData, written: Written, console: Console) -> None:
    """The findings, and where the report is."""
    console.print()
    console.print(words.summary(report), soft_wrap=True, markup=False)
    if report.savings is not None:
        console.print()
        console.print(summary.points_table(report.savings))
    for note in report.notes:
        console.print(f"\nnote: {note}", soft_wrap=True, markup=False)
    if report.recommendation is not None:
        console.print(f"\n{report.recommendation.why}\n", soft_wrap=True)
        console.print(report.recommendation.python, markup=False, soft_wrap=True)
    elif report.savings is not None and report.savings.python:
        console.print("\nTo use a row of the table, give its number of KV heads in full:\n", soft_wrap=True)
        console.print(report.savings.python, markup=False, soft_wrap=True)
    seconds = sum(phase.seconds for phase in report.run.phases)
    console.print(f"the report is in {written.page} ({seconds:.0f} s)", soft_wrap=True, markup=False)
