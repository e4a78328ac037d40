"""Decoding with a latent cache: absorbed against expanded order, and against multi-head attention.

One step after 8192 tokens, and chunks of new tokens, with the same weights and the same cache: expanded makes
the keys and values of all latents again in every call, absorbed attends to the latents themselves with wider
queries. The aim is that absorbed decodes at least four times as fast, and that what the plan takes by counted
operations is at most 1.25 times as slow as the best that was measured. Multi-head attention is there for its
time and its bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

DIM, HEADS, CACHED = 1024, 16, 8192
CHUNKS = (1, 8, 64, 256)
SCHEMES = ("expanded", "absorbed", "absorbed_reuse", "absorbed_recompute")
AIM, PLANNED = 4.0, 1 / 1.25


def steps(queries: int, device: str) -> tuple[dict[str, Callable[[], torch.Tensor]], ph.nn.AttentionModule]:
    """One call of every order with `queries` new tokens, from one filled cache each."""
    torch.manual_seed(0)
    first = ph.build("mla", dim=DIM, heads=HEADS, query_latent_dim=384, device=device)
    x = torch.randn(1, CACHED + queries, DIM, device=device)
    calls = {}
    for scheme in (*SCHEMES, "mha"):
        if scheme == "mha":
            module = ph.build("mha", dim=DIM, heads=HEADS, position=ph.nn.rope(), device=device)
        else:
            module = ph.build("mla", dim=DIM, heads=HEADS, query_latent_dim=384, scheme=scheme, device=device)
            module.load_state_dict(first.state_dict())
        cache = module.new_cache(1, max_length=CACHED + queries)
        # the prefill: only rows of the cache are needed
        cache.append(*module._rows(x[:, :CACHED], 0))

        def step(module=module, cache=cache):
            cache.crop(CACHED)
            return module(x[:, CACHED:], mask=ph.causal(), cache=cache)

        calls[scheme] = step
    return calls, first


def main() -> None:
    options = begin(arguments(__doc__, repeats=9))
    results, reached = [], True
    with torch.no_grad():
        for queries in CHUNKS:
            calls, module = steps(queries, options.device)
            for scheme in SCHEMES[1:]:
                torch.testing.assert_close(calls[scheme](), calls["expanded"](), rtol=1e-3, atol=1e-4)
            times = interleave(calls, options.repeats, device=options.device)
            title = f"{queries} new after {CACHED} tokens, {HEADS} heads, d = {DIM}"
            results.append(report(title, times, "expanded"))
            ratios = results[-1]["ratio"]
            chosen = module.step_cost(CACHED, queries)
            plan = module.plan(queries, CACHED)
            planned = min(("expanded", "absorbed"), key=lambda s: plan[s].flops)
            fewer = plan["expanded"].flops / plan["absorbed"].flops
            print(f"  operations of expanded over absorbed: {fewer:.2f}")
            print(f"  auto: {planned}, {chosen.flops / 1e9:.3g} GFLOP")
            if queries == 1:
                reached &= aim("absorbed against expanded", ratios["absorbed"], AIM)
            best = max(ratios["expanded"], ratios["absorbed"])
            reached &= aim("what is planned, of the best measured", ratios[planned] / best, PLANNED)
        plain = ph.build("mha", dim=DIM, heads=HEADS, device="meta").cost(1).kv_bytes_per_token
        print(f"\nbytes a token: latent {module.cost(1).kv_bytes_per_token:,}, multi-head {plain:,}")
    print(f"all aims reached: {'yes' if reached else 'NO'}")
    save(options, results)


if __name__ == "__main__":
    main()
