"""What the benchmarks of maps of logits and weights share: a gate, times and memory against the dense form.

A benchmark is a file with `operands(device, length)`, which gives q, k, v and more leaves, and `CALLS`: for
"dense" and "polyhead" what makes a call of them, from whether it shall be causal.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _harness import aim, interleave, report

__all__ = ["against_dense", "peak", "trained"]


def trained(call: Any, leaves: list[torch.Tensor], up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of a call for all its leaves."""
    return torch.autograd.grad(call(*leaves), leaves, up)


def peak(file: str, name: str, length: int) -> float:
    """MiB that forward and backward need on top of the operands, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"import torch, {file} as a, _against_dense as d, _harness as h\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"x = a.operands('cpu', {length}); up = torch.ones_like(x[0])\n"
        "before = h.peak()\n"
        f"d.trained(a.CALLS[{name!r}](True), x, up)\n"
        "print((h.peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _inputs(bench: ModuleType, device: str, length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    leaves = bench.operands(device, length)
    up = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))
    return leaves, up.to(device)


def against_dense(
    options: argparse.Namespace,
    bench: ModuleType,
    *,
    length: int,
    forward: float,
    backward: float,
    masks: tuple[bool, ...] = (False, True),
) -> list[dict[str, Any]]:
    """Check that both ways give one output and one set of gradients, then time and weigh them.

    Args:
        options: what `begin` gave.
        bench: the benchmark's own module.
        length: tokens.
        forward, backward: aims, how many times as fast as the dense form a causal call shall be.
        masks: whether causal, for each measurement.
    """
    results: list[dict[str, Any]] = []
    for causal in masks:
        calls = {name: make(causal) for name, make in bench.CALLS.items()}
        few, up = _inputs(bench, options.device, length // 4)  # right answers are the same at any length
        answers = [(call(*few), *trained(call, few, up)) for call in calls.values()]
        for a, b in zip(*answers, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
        del answers, a, b, few
        leaves, up = _inputs(bench, options.device, length)

        def alone(call: Any, leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            with torch.no_grad():
                return call(*leaves)

        def both(
            call: Any, leaves: list[torch.Tensor] = leaves, up: torch.Tensor = up
        ) -> tuple[torch.Tensor, ...]:
            return trained(call, leaves, up)

        for title, way, least in (
            ("forward", alone, forward),
            ("forward and backward", both, backward),
        ):
            ways = {name: lambda c=call, w=way: w(c) for name, call in calls.items()}
            result = report(
                f"{'causal' if causal else 'both directions'}, {title}",
                interleave(ways, options.repeats, device=options.device),
                "dense",
            )
            if causal:
                aim("polyhead", result["ratio"]["polyhead"], least)
            results.append(result)
    if options.device == "cpu":
        print("\npeak memory of forward and backward, causal, above the operands")
        for name, tokens in (("dense", length), ("polyhead", length), ("polyhead", 4 * length)):
            mib = peak(Path(str(bench.__file__)).stem, name, tokens)
            print(f"  {name:8}  {tokens:6} tokens  {mib:7.0f} MiB")
            results.append({"title": "peak memory", "way": name, "length": tokens, "mib": mib})
    return results
