"""Attention with fewer query heads, or fewer key/value heads alone, against all heads.

Width 256 in 16 heads, causal, one sequence, from queries, keys and values to the outputs of the heads. By
paper 008 the time goes down as the number of query heads does, and not at all with that of key/value heads:
half of the query heads should be twice as fast, a quarter four times. The aim is nine tenths of that at 4096
tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

HEADS, WIDTH = 16, 16
LENGTHS = (512, 2048, 4096)
FORMS = {  # query heads and key/value heads
    "mha": (16, 16),
    "grouped, 4": (16, 4),
    "multi-query": (16, 1),
    "sparse, 8 of 16 over 4": (8, 4),
    "sparse, 4 of 16 over 4": (4, 4),
}


def drawn(form: str, length: int, device: str) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values; those of fewer heads are the first of all."""
    heads, kv_heads = FORMS[form]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, generator=draw).to(device) for _ in range(3))
    return q[:, :heads], k[:, :kv_heads], v[:, :kv_heads]


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """Attention alone."""
    with torch.no_grad():
        return ph.attend(q, k, v, mask=ph.causal())


def check(device: str) -> None:
    """Raise unless every form gives what softmax written out gives."""
    for form, (heads, kv_heads) in FORMS.items():
        q, k, v = drawn(form, 64, device)
        logits = q @ k.repeat_interleave(heads // kv_heads, 1).mT / WIDTH**0.5
        hidden = torch.ones(64, 64, dtype=torch.bool, device=device).triu(1)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        expected = weights @ v.repeat_interleave(heads // kv_heads, 1)
        torch.testing.assert_close(run(q, k, v), expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    options = begin(arguments(__doc__, repeats=9))
    check(options.device)
    results = []
    for length in LENGTHS:
        calls = {form: partial(run, *drawn(form, length, options.device)) for form in FORMS}
        times = interleave(calls, options.repeats, device=options.device)
        results.append(report(f"{length} tokens", times, "mha"))
    ratio = results[-1]["ratio"]
    aim("half of the query heads", ratio["sparse, 8 of 16 over 4"], 1.8)
    aim("a quarter of them", ratio["sparse, 4 of 16 over 4"], 3.6)
    save(options, results)


if __name__ == "__main__":
    main()
