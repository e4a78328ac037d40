"""One step of decoding under selectors after 2,048 to 16,384 tokens, against dense SDPA in the same run.

9 heads in 3 groups of 64 features, as in SmolLM2-135M; a tenth and a quarter of blocks of 64 keys.
Projections and the cache's own copy of the new row are part of the time. "kept" goes on from what is kept
of the blocks of the step before, "anew" works it out of all keys. The gate: both give the same, and with
everything chosen the output is the dense one. Keys are random: the heads of a group agree no more than by
chance, so that more is gathered than in a trained model; "a group together" ranks for the group. On a
machine that does other things besides, ratios of so short calls are provisional.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

LENGTHS = (2_048, 8_192, 16_384)
SIZES = {"dim": 576, "heads": 9, "kv_heads": 3}
AIM = 1.0  # from 8,192 tokens on, a tenth of the blocks


def selector(scorer: ph.Scorer, share: float) -> ph.Selector:
    return ph.select(scorer, ph.keep_share(share), rows=128, cols=64, always=ph.sink(1) | ph.window(63))


SELECTORS = {
    "mean_keys, a tenth": selector(ph.mean_keys(), 0.1),
    "mean_keys, a quarter": selector(ph.mean_keys(), 0.25),
    "key_bounds, a tenth": selector(ph.key_bounds(), 0.1),
    "a group together, a quarter": selector(ph.shared(ph.mean_keys()), 0.25),
    "sampled_mass, a tenth": selector(ph.sampled_mass(8), 0.1),
    "everything": selector(ph.mean_keys(), 1.0),
}


def step(select: ph.Selector | None, length: int, device: str, kept: bool) -> Callable[[], torch.Tensor]:
    """A call that decodes the token behind `length` cached ones, again and again."""
    torch.manual_seed(0)
    module = ph.build("grouped_query", **SIZES, select=select, device=device).eval()
    x = torch.randn(1, length + 1, SIZES["dim"], device=device)
    cache = module.new_cache(1, max_length=length + 1)
    if not kept:
        cache.summaries = None
    cache.append(*module._rows(x[:, :-1], 0))  # the prefill: only rows of the cache are needed

    def run() -> torch.Tensor:
        cache.crop(length)
        return module(x[:, -1:], mask=ph.causal(), cache=cache)

    return run


def main() -> None:
    options = begin(arguments(__doc__, repeats=31))
    results, reached = [], True
    with torch.no_grad():
        for length in LENGTHS:
            calls = {"dense SDPA": step(None, length, options.device, kept=False)}
            for name, own in SELECTORS.items():
                calls[f"{name}, kept"] = step(own, length, options.device, kept=True)
            for name in ("mean_keys, a tenth", "key_bounds, a tenth"):
                calls[f"{name}, anew"] = step(SELECTORS[name], length, options.device, kept=False)
            outputs = {name: call() for name, call in calls.items()}
            torch.testing.assert_close(outputs["everything, kept"], outputs["dense SDPA"])
            for name in ("mean_keys, a tenth", "key_bounds, a tenth"):
                torch.testing.assert_close(outputs[f"{name}, kept"], outputs[f"{name}, anew"])
            times = interleave(calls, options.repeats, device=options.device)
            results.append(report(f"one query after {length} tokens", times, "dense SDPA"))
            if length >= 8_192:
                reached &= aim("a tenth", results[-1]["ratio"]["mean_keys, a tenth, kept"], AIM)
    print(f"all aims reached: {'yes' if reached else 'NO'}")
    save(options, results)


if __name__ == "__main__":
    main()
