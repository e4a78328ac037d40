"""A per-head KV cache against transformers' DynamicCache, on SmolLM2-135M: bytes and decoding speed.

A fifth of the key/value heads keep the whole context, the rest 4 sinks and 256 recent tokens. The yardstick
is the same model with its own attention (SDPA) and a DynamicCache, which copies all keys and values at every
step. Both have read the same text. What is timed is one decoding step of the whole model, for one sequence
and for several at once.

No cache makes a step faster than the weights can be read: "no context" is the yardstick's step with
an empty cache, the most that any cache could reach. With one sequence the weights are most of a step.
"""

from __future__ import annotations

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


def main() -> None:
    parser = arguments(__doc__, repeats=31)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = begin(parser)
    torch.manual_seed(0)
    model, tokenizer = ph.hf.load("smollm2", dtype=getattr(torch, options.dtype), device=options.device)
    model.requires_grad_(False)
    own = copy.deepcopy(model)  # with its own attention, while the other one is attached
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(options.device)
    same_tokens(own, model, ids[:, :500])
    heads = ph.cache.razor.probe(model, tokenizer, length=64).induction.top(SHARE)
    results, reached = [], True
    for length in options.lengths:
        theirs = DynamicCache(config=own.config)
        ours = ph.cache.per_head(model, full=heads, sink=SINK, window=WINDOW)
        whole = ph.cache.per_head(model, full="all")
        with torch.inference_mode():
            seconds = []
            for who, cache in ((own, theirs), (model, ours), (model, whole)):
                start = time.perf_counter()
                who(ids[:, :length], past_key_values=cache, logits_to_keep=1)
                seconds.append(time.perf_counter() - start)
            sizes = {"DynamicCache": nbytes(theirs), "per head": ours.nbytes(), "used": ours.nbytes_used()}
            told = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
            print(
                f"\n{length} tokens, {options.dtype}: {told}; {sizes['per head'] / sizes['DynamicCache']:.1%}"
            )
            print(f"  prefill, once: {seconds[0]:.1f} s, {seconds[1]:.1f} s; all in full {seconds[2]:.1f} s")
            if length == LENGTHS[-1]:
                ratio = sizes["DynamicCache"] / sizes["per head"]
                reached &= aim("bytes of DynamicCache over ours", ratio, SMALLER)
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
                title = f"a decoding step of {batch} after {length} tokens, {options.dtype}"
                results.append(report(title, times, "DynamicCache") | {"bytes": sizes})
                if length == LENGTHS[-1] and batch == BATCHES[-1]:
                    ratio = results[-1]["ratio"]["per head, a fifth in full"]
                    reached &= aim("speed of DynamicCache", ratio, FASTER)
    print(f"\nall aims reached: {'yes' if reached else 'NO'}")
    save(options, results)


if __name__ == "__main__":
    main()
