"""A per-head KV cache against transformers' DynamicCache, on SmolLM2-135M: bytes and decoding speed.

A fifth of the key/value heads keep the whole context, the rest 4 sinks and 256 recent tokens. The yardstick
is the same model with its own attention (SDPA) and a DynamicCache, which copies all keys and values at every
step. Both have read the same text. What is timed is one decoding step of the whole model, for one sequence
and for several at once.

No cache makes a step faster than the weights can be read: "no context" is the yardstick's step with
an empty cache, the most that any cache could reach. With one sequence the weights are most of a step.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import aim, arguments, begin, interleave, report, save
from transformers import DynamicCache

import polyhead as ph

SHARE, SINK, WINDOW = 0.2, 4, 256
LENGTHS, BATCHES = (2048, 8192), (1, 4)
SMALLER, FASTER = 4.0, 2.0  # DynamicCache over ours, after 8192 tokens


def nbytes(cache: DynamicCache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def step(model: Any, cache: Any, batch: int) -> Callable[[], Any]:
    tokens = torch.full((batch, 1), 5, device=model.device)
    return lambda: model(tokens, past_key_values=cache)


def without_context(model: Any, batch: int) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    forward = step(model, cache, batch)

    def call() -> Any:
        cache.reset()
        return forward()

    return call


def same_tokens(own: Any, attached: Any, ids: torch.Tensor) -> None:
    """The gate: a cache that keeps everything generates what DynamicCache generates."""
    how = {
        "max_new_tokens": 16,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
    }
    expected = own.generate(ids, past_key_values=DynamicCache(config=own.config), **how)
    cache = ph.cache.per_head(attached, full="all")
    if attached.generate(ids, past_key_values=cache, **how).tolist() != expected.tolist():
        raise SystemExit("a cache that keeps everything does not generate what DynamicCache does; no numbers")


def measured(
    own: Any, model: Any, ids: torch.Tensor, heads: Any, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], bool]:
    """Bytes and times after reading `ids`, and whether the aims are reached where there are some."""
    theirs = DynamicCache(config=own.config)
    ours = ph.cache.per_head(model, full=heads, sink=SINK, window=WINDOW)
    whole = ph.cache.per_head(model, full="all")
    length, dtype, aims = ids.shape[1], str(model.dtype).removeprefix("torch."), ids.shape[1] >= LENGTHS[-1]
    results, reached, seconds = [], True, []
    for who, cache in ((own, theirs), (model, ours), (model, whole)):
        start = time.perf_counter()
        who(ids, past_key_values=cache, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    sizes = {"DynamicCache": nbytes(theirs), "per head": ours.nbytes(), "used": ours.nbytes_used()}
    told = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    print(f"\n{length} tokens, {dtype}: {told}; {sizes['per head'] / sizes['DynamicCache']:.1%}")
    print(f"  prefill, once: {seconds[0]:.1f} s, per head {seconds[1]:.1f} s, all in full {seconds[2]:.1f} s")
    if aims:
        reached &= aim("bytes of DynamicCache over ours", sizes["DynamicCache"] / sizes["per head"], SMALLER)
    for batch in BATCHES:
        if batch > 1:
            for cache in (theirs, ours, whole):
                cache.batch_repeat_interleave(batch)
        calls = {
            "DynamicCache": step(own, theirs, batch),
            "per head, a fifth in full": step(model, ours, batch),
            "per head, all in full": step(model, whole, batch),
            "no context": without_context(own, batch),
        }
        times = interleave(calls, options.repeats, device=options.device)
        results.append(
            report(f"a decoding step of {batch} after {length} tokens, {dtype}", times, "DynamicCache")
        )
        results[-1]["bytes"] = sizes
        if aims:
            reached &= aim("speed of DynamicCache", results[-1]["ratio"]["per head, a fifth in full"], FASTER)
    return results, reached


def main() -> None:
    parser = arguments(__doc__, repeats=31)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = begin(parser)
    model, tokenizer = ph.hf.load("smollm2", device=options.device)
    model.requires_grad_(False)
    own = copy.deepcopy(model)  # with its own attention, while the other one is attached
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(options.device)
    results, reached = [], True
    with torch.inference_mode():
        same_tokens(own, model, ids[:, :500])
    heads = ph.cache.razor.probe(model, tokenizer, length=64).induction.top(SHARE)
    for dtype in options.dtypes:
        own, model = own.to(getattr(torch, dtype)), model.to(getattr(torch, dtype))
        for length in options.lengths:
            with torch.inference_mode():
                found, good = measured(own, model, ids[:, :length], heads, options)
            results += found
            reached &= good
    print(f"\nall aims reached: {'yes' if reached else 'NO'}")
    save(options, results)


if __name__ == "__main__":
    main()
