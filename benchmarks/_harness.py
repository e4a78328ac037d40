"""What the benchmarks share: taking turns, medians, ratios, and saying where it was measured."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyhead.machine import processor

Times = dict[str, list[float]]


def arguments(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU; default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this run; sets the threads and prints where the run takes place."""
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine(options.device))
    return options


def machine(device: str = "cpu") -> str:
    """One line: processor, threads, versions, revision of the source, and how busy the machine is.

    Where more processes run than there are cores, threads that wait by spinning (the default of OpenMP) hold
    up whatever consists of many short operations: OMP_WAIT_POLICY=passive then measures the work itself.
    """
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}; "
        f"torch {torch.__version__}, python {platform.python_version()}; revision {_revision()}; "
        f"load {os.getloadavg()[0]:.1f}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'default')}"
    )


def _revision() -> str:
    try:
        folder = Path(__file__).parent
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def interleave(calls: Mapping[str, Callable[[], Any]], repeats: int, *, device: str = "cpu") -> Times:
    """Seconds of every repeat of every call. They take turns, so that what disturbs one disturbs all."""

    def once(call: Callable[[], Any]) -> float:
        _finish(device)
        start = time.perf_counter()
        call()
        _finish(device)
        return time.perf_counter() - start

    for call in calls.values():  # the first time fills caches, and is not measured
        once(call)
    times: Times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(once(call))
    return times


def peak() -> int:
    """KiB of memory that this process has held at most (Linux); `ru_maxrss` would count the parent's in."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def report(title: str, rows: Times, ratio_of: str) -> dict[str, Any]:
    """Print the medians and how many times faster than `ratio_of` each one is; the same as plain data."""
    medians = {name: statistics.median(values) for name, values in rows.items()}
    width = max(map(len, rows))
    print(f"\n{title}")
    for name, values in rows.items():
        ratio = medians[ratio_of] / medians[name]
        print(
            f"  {name:{width}}  {medians[name] * 1e3:9.2f} ms  (best {min(values) * 1e3:.2f})"
            f"  {'yardstick' if name == ratio_of else f'{ratio:.2f} x as fast'}"
        )
    ratios = {name: medians[ratio_of] / median for name, median in medians.items()}
    return {"title": title, "yardstick": ratio_of, "seconds": rows, "median": medians, "ratio": ratios}


def aim(what: str, ratio: float, least: float) -> bool:
    """Print whether a ratio reaches what it should."""
    reached = ratio >= least
    print(f"  aim: {what} at least {least:g} x: {'reached' if reached else 'MISSED'} ({ratio:.2f} x)")
    return reached


def save(options: argparse.Namespace, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the results to the file of `--json`, if one was given."""
    if options.json is not None:
        data = {"machine": machine(options.device), "results": list(results)}
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.json)
