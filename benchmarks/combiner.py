"""Combiner with segments, against attention to all keys, as the length grows.

Width 256 in 8 heads, causal, one sequence through the module; segments of about √L tokens, as the paper has
them. Attention reads L² / 2 pairs of tokens, the combiner L·√L / 2 of them and as many of a token and a
segment, so it gains with the length. There is no aim: what is asked is from which length on it is faster.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _harness import arguments, begin, interleave, report, save

import polyhead as ph

DIM, HEADS = 256, 8
LENGTHS = {512: 32, 2048: 64, 8192: 128}  # tokens, and those of a segment


def run(module: torch.nn.Module, x: torch.Tensor) -> Any:
    """One call."""
    with torch.no_grad():
        return module(x, mask=ph.causal())


def check(device: str) -> None:
    """Raise unless one segment gives what attention gives."""
    torch.manual_seed(0)
    plain = ph.build("mha", dim=DIM, heads=HEADS, device=device)
    own = ph.build("combiner", dim=DIM, heads=HEADS, segment=64, device=device)
    own.load_state_dict(plain.state_dict())
    x = torch.randn(1, 64, DIM, device=device)
    torch.testing.assert_close(run(own, x), run(plain, x), rtol=1e-4, atol=1e-5)


def main() -> None:
    options = begin(arguments(__doc__, repeats=9))
    check(options.device)
    results = []
    for length, segment in LENGTHS.items():
        torch.manual_seed(0)
        x = torch.randn(1, length, DIM, device=options.device)
        made = {"mha": {}, "combiner": {"segment": segment}}
        calls = {
            name: partial(run, ph.build(name, dim=DIM, heads=HEADS, device=options.device, **own), x)
            for name, own in made.items()
        }
        times = interleave(calls, options.repeats, device=options.device)
        results.append(report(f"{length} tokens", times, "mha"))
    save(options, results)


if __name__ == "__main__":
    main()
