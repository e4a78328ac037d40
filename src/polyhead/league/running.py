"""Doing the runs: here one after the other, in several processes, or on the machines of a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from polyhead.checks import given
from polyhead.errors import ConfigError, MissingExtra
from polyhead.league import worker
from polyhead.league.tasks.base import Task
from polyhead.league.training import Look, Outcome

__all__ = ["Run", "check_jobs", "run_all"]


class Run(NamedTuple):
    """A run to be done.

    Attributes:
        key: what it is known by: the place of the contender, and the seed.
        order: see `worker.order`.
    """

    key: tuple[int, int]
    order: dict[str, Any]


Told = Callable[[tuple[int, int], Look], None]
Ended = Generator[tuple[tuple[int, int], Outcome], None, None]


def run_all(runs: Iterable[Run], jobs: int | str | None, told: Told) -> Ended:
    """Do runs, and give each outcome when it is there.

    Args:
        runs: what to do.
        jobs: None, one after the other in this process; a number, so many processes at once; "ray", on the
            Ray cluster that `ray.init` finds (RAY_ADDRESS), or a local one.
        told: is told every look.
    """
    check_jobs(jobs)
    if jobs is None:
        return _here(runs, told)
    if isinstance(jobs, int):
        return _in_processes(deque(runs), jobs, told)
    return _by_ray(runs)


def check_jobs(jobs: object, task: object = None) -> None:
    """A `ConfigError` unless it is None, a positive integer or "ray"; `MissingExtra` without Ray.

    With either of them, nor may the task be one that other processes do not know.
    """
    if jobs == "ray":
        if importlib.util.find_spec("ray") is None:
            raise MissingExtra("ray", "ray", 'jobs="ray"')
    elif jobs is not None and (type(jobs) is not int or jobs < 1):
        raise ConfigError(f'jobs must be a positive integer, or "ray"; got {given(jobs)}')
    if jobs is not None and isinstance(task, Task) and ":" in task.kind:
        raise ConfigError(
            f"task: {task.kind} is known in this process alone, and jobs={jobs!r} are others; give the path "
            "of its Python file, or leave jobs out"
        )


def _here(runs: Iterable[Run], told: Told) -> Ended:
    for run in runs:
        outcome = worker.run(run.order, lambda look, key=run.key: told(key, look))  # type: ignore[misc]
        if run.order["rules"]["device"].startswith("cpu"):
            # memory that the process freed before and takes again does not show
            outcome = replace(outcome, peak_bytes=None)
        yield run.key, outcome


def _in_processes(runs: deque[Run], jobs: int, told: Told) -> Ended:
    said: queue.Queue[tuple[tuple[int, int], dict[str, Any]]] = queue.Queue()
    going: dict[tuple[int, int], subprocess.Popen[bytes]] = {}
    try:
        while runs or going:
            while runs and len(going) < jobs:
                run = runs.popleft()
                going[run.key] = _begin(run, said)
            key, answer = _next(said)
            if "look" in answer:
                told(key, Look(**answer["look"]))
                continue
            process = going.pop(key)
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            process.wait()
            yield key, Outcome.from_json(answer["outcome"])
    finally:
        for process in going.values():
            process.kill()
        for process in going.values():
            process.wait()


def _next(
    said: queue.Queue[tuple[tuple[int, int], dict[str, Any]]],
) -> tuple[tuple[int, int], dict[str, Any]]:
    while True:
        with contextlib.suppress(queue.Empty):
            return said.get(timeout=1)  # on Windows a wait without an end cannot be interrupted


def _begin(run: Run, said: queue.Queue[tuple[tuple[int, int], dict[str, Any]]]) -> subprocess.Popen[bytes]:
    threads = str(run.order["rules"]["threads"])
    process = subprocess.Popen(
        # -P: a random.py in this folder is not the one that the libraries mean
        [sys.executable, "-P", "-m", "polyhead.league.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(_path())},
        start_new_session=True,  # Ctrl-C is for the one who asked, who ends the workers
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a worker that could not begin says why below
        process.stdin.write(json.dumps(run.order).encode() + b"\n")
        process.stdin.flush()
    threading.Thread(target=_listen, args=(process, run.key, said), daemon=True).start()
    return process


def _path() -> list[str]:
    """Where this process finds modules, so that a worker finds the same ones."""
    return [str(Path(entry or ".").absolute()) for entry in sys.path]


def _listen(
    process: subprocess.Popen[bytes],
    key: tuple[int, int],
    said: queue.Queue[tuple[tuple[int, int], dict[str, Any]]],
) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    errors: deque[str] = deque(maxlen=20)
    stream = process.stderr

    def drain() -> None:
        for line in stream:
            errors.append(line.decode(errors="replace").rstrip())

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    for line in process.stdout:
        try:
            answer = json.loads(line)
        except ValueError:  # printed before the worker took its output for itself, or cut short
            continue
        if not isinstance(answer, dict) or not answer.keys() & {"look", "outcome"}:
            continue
        said.put((key, answer))
        if "outcome" in answer:
            return
    reader.join()
    code = process.wait()
    why = next((line for line in reversed(errors) if line.strip()), "") or f"it ended with code {code}"
    if code < 0:
        why = f"it was ended by signal {-code}"
    said.put((key, {"outcome": Outcome("failed", 0, {}, note=why).to_json()}))


def _by_ray(runs: Iterable[Run]) -> Ended:
    import ray

    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, include_dashboard=False)
    going: dict[Any, tuple[int, int]] = {}
    try:
        runs, nodes = list(runs), ray.nodes()
        for run in runs:
            _fits(run, nodes)
        # a process for each: only a fresh one tells how much memory a run takes
        remote = ray.remote(max_retries=0, max_calls=1)(_on_a_machine)
        for run in runs:
            needs = _needs(run)
            placed = remote.options(num_cpus=needs["CPU"], num_gpus=needs["GPU"])
            going[placed.remote(run.order)] = run.key
        while going:
            (done,), _ = ray.wait(list(going), num_returns=1)
            key = going.pop(done)
            try:
                outcome = Outcome.from_json(ray.get(done))
            except ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1]
                outcome = Outcome("failed", 0, {}, note=last)
            yield key, outcome
    finally:
        for left in going:  # of a cluster that goes on without us
            ray.cancel(left, force=True)
        if begun:
            ray.shutdown()


def _needs(run: Run) -> dict[str, int]:
    """What of a machine a run takes for itself, by Ray's names."""
    rules = run.order["rules"]
    return {"CPU": rules["threads"], "GPU": 1 if rules["device"].startswith("cuda") else 0}


def _fits(run: Run, nodes: Iterable[dict[str, Any]]) -> None:
    """A `ConfigError` where no machine has what the run takes: Ray would wait for one without an end."""
    there = [node["Resources"] for node in nodes if node["Alive"]]
    needs = _needs(run)
    if not any(all(node.get(kind, 0) >= count for kind, count in needs.items()) for node in there):
        most = {kind: int(max((node.get(kind, 0) for node in there), default=0)) for kind in needs}
        raise ConfigError(
            f"jobs: a run takes {needs['CPU']} CPU(s), one for each thread, and {needs['GPU']} GPU(s); no "
            f"machine of this Ray cluster has so many, the most are {most['CPU']} and {most['GPU']}"
        )


def _on_a_machine(what: dict[str, Any]) -> dict[str, Any]:
    return worker.run(what).to_json()
