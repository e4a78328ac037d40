"""One run: a contender trained on a task with one seed, from the beginning or from where it was cut off.

A step depends on its number and on the parameters alone: its questions are made from the number, and torch's
generator is seeded anew before it. So a run that was cut off and goes on from a checkpoint ends with the same
numbers as one that was not.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyhead import __version__
from polyhead.errors import PolyheadError
from polyhead.league.budget import Fitted
from polyhead.league.model import Model
from polyhead.league.seeds import seed_of
from polyhead.league.tasks.base import Recipe, Task
from polyhead.memory import Peak

__all__ = ["Look", "Outcome", "evaluate", "train"]

_ON_THE_WAY = 4  # batches of questions of a look


@dataclass(frozen=True)
class Look:
    """How far a run is.

    Attributes:
        step: steps done.
        loss: mean training loss since the look before.
        score: on "validation".
    """

    step: int
    loss: float
    score: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "finished", "diverged" (a loss, a gradient or a parameter was not finite), or "failed".
        steps: steps done.
        scores: by split; NaN where there is none.
        curve: the looks on the way.
        tokens_per_second: of training, data included and looks left out; from the median step.
        peak_bytes: most memory that the run took beyond what the process had before it; None if unknown, as
            it is on a CPU where the process did other work before.
        seconds: of all steps.
        note: why it failed.
        made_with: versions and kind of machine that the last digits depend on.
    """

    status: str
    steps: int
    scores: dict[str, float]
    curve: tuple[Look, ...] = ()
    tokens_per_second: float = math.nan
    peak_bytes: int | None = None
    seconds: float = 0.0
    note: str = ""
    made_with: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; a number that is not finite is null."""
        data = asdict(self)
        data["scores"] = {name: _finite(score) for name, score in self.scores.items()}
        data["curve"] = [{key: _finite(value) for key, value in asdict(look).items()} for look in self.curve]
        data["tokens_per_second"] = _finite(self.tokens_per_second)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """What `to_json` made into plain data, made again."""

        def number(value: Any) -> float:
            return math.nan if value is None else float(value)

        return cls(
            status=data["status"],
            steps=int(data["steps"]),
            scores={name: number(score) for name, score in data["scores"].items()},
            curve=tuple(
                Look(int(one["step"]), number(one["loss"]), number(one["score"])) for one in data["curve"]
            ),
            tokens_per_second=number(data["tokens_per_second"]),
            peak_bytes=None if data["peak_bytes"] is None else int(data["peak_bytes"]),
            seconds=float(data["seconds"]),
            note=data["note"],
            made_with=data.get("made_with", ""),  # leagues of before it was kept
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _State:
    """What a checkpoint holds besides parameters and the optimiser."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[Look] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    peak: int | None = None


def train(
    task: Task,
    fitted: Fitted,
    recipe: Recipe,
    seed: int,
    *,
    device: str = "cpu",
    threads: int = 1,
    checkpoint: Path | None = None,
    progress: Callable[[Look], None] | None = None,
) -> Outcome:
    """Train and measure one contender.

    Args:
        task, fitted, recipe, seed: what is trained, and how.
        device: where.
        threads: of torch on a CPU, while this runs. Sums come out differently with another number.
        checkpoint: a file that the run keeps its state in at every look and goes on from. Whoever keeps the
            outcome removes it.
        progress: is told every look.
    """
    # with gradients, whatever the caller goes without
    with _threads(threads), _generators_kept(device), torch.inference_mode(False):
        torch.manual_seed(seed_of("parameters", seed))
        peak = Peak(device)
        model = fitted.model(task, device=device)
        steps = _optimizer(model, recipe)
        state = _State()
        if checkpoint is not None and checkpoint.is_file():
            state = _load(checkpoint, model, steps, device)
        looks = recipe.looks_at()
        while state.step < recipe.steps:
            start = time.perf_counter()
            loss = _step(model, steps, recipe, state.step, seed, device)
            state.times.append(time.perf_counter() - start)
            state.step += 1
            state.losses.append(loss)
            if not math.isfinite(loss):
                break
            if state.step in looks:
                score = evaluate(model, "validation", recipe.batch, _ON_THE_WAY)
                state.curve.append(Look(state.step, statistics.fmean(state.losses), score))
                state.losses.clear()
                state.peak = peak.most(state.peak)
                if checkpoint is not None:
                    _save(checkpoint, model, steps, state)
                if progress is not None:
                    progress(state.curve[-1])
        finished = state.step == recipe.steps and (not state.losses or math.isfinite(state.losses[-1]))
        # the last step may have thrown the parameters out, and no loss comes after it that would tell
        finished = finished and all(bool(p.isfinite().all()) for p in model.parameters())
        scores = dict.fromkeys(task.splits, math.nan)
        if finished:
            scores = {split: evaluate(model, split, recipe.batch) for split in task.splits}
        return Outcome(
            status="finished" if finished else "diverged",
            steps=state.step,
            scores=scores,
            curve=tuple(state.curve),
            tokens_per_second=recipe.batch * task.length / statistics.median(state.times),
            peak_bytes=peak.most(state.peak),
            seconds=sum(state.times),
            made_with=_here(),
        )


def _here() -> str:
    system = f"{platform.system()} {platform.machine()}"
    versions = f"polyhead {__version__}, torch {torch.__version__}, python {platform.python_version()}"
    return f"{versions}, {system}"


def _step(
    model: Model, steps: torch.optim.Optimizer, recipe: Recipe, number: int, seed: int, device: str
) -> float:
    """One step of the optimiser; its loss.

    NaN where the gradient is not finite; the parameters then stay as they are, as with a loss that is not.
    """
    torch.manual_seed(seed_of("step", seed, number))
    batch = model.task.batch("train", number, recipe.batch, seed).to(device)
    loss = model.loss(batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        return value
    loss.backward()
    if not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)):
        return math.nan
    for group in steps.param_groups:
        group["lr"] = recipe.rate_at(number)
    steps.step()
    steps.zero_grad(set_to_none=True)
    return value


def _optimizer(model: Model, recipe: Recipe) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": recipe.decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=recipe.rate, betas=(0.9, 0.98), fused=True
    )


@torch.no_grad()
def evaluate(model: Model, split: str, size: int, most: int | None = None) -> float:
    """The score on a split, or on the first batches of it; the same ones for everybody.

    NaN where it is not finite, or nothing is asked.
    """
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    points = weights = 0.0
    count = model.task.batches(split, size)
    for number in range(count if most is None else min(most, count)):
        torch.manual_seed(seed_of("look", split, number))
        batch = model.task.batch(split, number, size, 0).to(device)
        one, by = model.task.measure(model(batch).float(), batch)
        points, weights = points + float(one.double().sum()), weights + float(by.double().sum())
    model.train(was)
    score = points / weights if weights else math.nan
    return score if math.isfinite(score) else math.nan


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _generators_kept(device: str) -> contextlib.AbstractContextManager[None]:
    """Torch's generators go back to where they were, those of CUDA too where it is used."""
    used = device.startswith("cuda") or torch.cuda.is_initialized()
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else [])


def _save(file: Path, model: Model, steps: torch.optim.Optimizer, state: _State) -> None:
    """Completely, or not at all."""
    data = {"model": model.state_dict(), "steps": steps.state_dict(), "state": asdict(state)}
    beside = file.with_suffix(f".{os.getpid()}.part")
    buffer = io.BytesIO()
    torch.save(data, buffer)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    except OSError as error:
        raise PolyheadError(f"{file} cannot be written: {error.strerror}") from None


def _load(file: Path, model: Model, steps: torch.optim.Optimizer, device: str) -> _State:
    try:
        data = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(data["model"])
        steps.load_state_dict(data["steps"])
    except Exception as error:
        why = str(error).partition("\n")[0].strip()
        raise PolyheadError(
            f"{file}: this checkpoint cannot be read ({why}); remove it to begin the run anew"
        ) from None
    state = _State(**data["state"])
    state.curve = [Look(**look) for look in data["state"]["curve"]]
    return state
