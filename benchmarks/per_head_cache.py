"""A per-head KV cache against transformers' DynamicCache, on SmolLM2-135M: bytes and decoding speed.

A fifth of the key/value heads keep the whole context, the rest 4 sinks and 256 recent tokens. The yardstick
is the same model with its own attention (SDPA) and a DynamicCache, which copies all keys and values at every
step; its attention reads nine heads, ours reads three. Both models have read the same text. What is timed
is one decoding step of the whole model, so that what the cache cannot change, the weights, is in it:
"no context" is a step of the model with its own attention and an empty cache, the most that any cache can
reach.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import torch
from _harness import aim, arguments, begin, interleave, report, save
from transformers import DynamicCache

import polyhead as ph

SHARE, SINK, WINDOW = 0.2, 4, 256
LENGTHS = (2048, 8192)
ENOUGH = {"bytes": {8192: 4.0}, "speed": {8192: 2.0}}  # DynamicCache over ours


def nbytes(cache: DynamicCache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def stepper(model: Any, cache: Any) -> Callable[[], Any]:
    token = torch.tensor([[5]], device=model.device)
    return lambda: model(token, past_key_values=cache)


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
            for who, cache in ((own, theirs), (model, ours), (model, whole)):
                who(ids[:, :length], past_key_values=cache, logits_to_keep=1)
            smaller = nbytes(theirs) / ours.nbytes()
            print(
                f"\n{length} tokens, {options.dtype}: DynamicCache {nbytes(theirs) / 2**20:.1f} MiB, "
                f"per head {ours.nbytes() / 2**20:.1f} MiB ({ours.nbytes_used() / 2**20:.1f} in use): "
                f"{1 / smaller:.1%}"
            )
            if length in ENOUGH["bytes"]:
                reached &= aim("bytes of DynamicCache over ours", smaller, ENOUGH["bytes"][length])
            empty = DynamicCache(config=own.config)

            def without_context(empty: DynamicCache = empty) -> Any:
                empty.reset()
                return stepper(own, empty)()

            calls = {
                "DynamicCache": stepper(own, theirs),
                "per head, a fifth in full": stepper(model, ours),
                "per head, all in full": stepper(model, whole),
                "no context": without_context,
            }
            times = interleave(calls, options.repeats, device=options.device)
        row = report(f"a decoding step after {length} tokens", times, "DynamicCache")
        results.append(row | {"bytes": {"DynamicCache": nbytes(theirs), "per head": ours.nbytes()}})
        if length in ENOUGH["speed"]:
            reached &= aim(
                "speed of DynamicCache", row["ratio"]["per head, a fifth in full"], ENOUGH["speed"][length]
            )
    print(f"\nall aims reached: {'yes' if reached else 'NO'}")
    save(options, results)


if __name__ == "__main__":
    main()
