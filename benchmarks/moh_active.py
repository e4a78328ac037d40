"""Mixture of heads with half of the heads active, against plain attention of the same sizes.

8 heads of 64, causal, one sequence. Two heads are shared, two of the other six are chosen by every token. The
aim is at most 0.7 of the time of SDPA at 4096 tokens for attention alone, forward, and forward and backward,
from queries, keys and values to the outputs of the heads, packing the chosen rows included. Keys and values
lie as a projection makes them, and those of the chosen rows are not copied. Besides, whole modules with
projections and routers, of which keys and values are made in full; the load is even, or one head is chosen by
half of the tokens and another by few. And one step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _harness import aim, arguments, begin, interleave, report, save
from torch import Tensor, nn

import polyhead as ph
from polyhead.nn.chosen_options import of_lanes
from polyhead.nn.chosen_rows import ChosenRows
from polyhead.nn.routed_heads import keys_of

AIM = 1 / 0.7
DIM, HEADS, SHARED, CHOSEN = 512, 8, 2, 2
LENGTHS = (512, 2048, 4096)


def modules(device: str) -> dict[str, nn.Module]:
    """Plain attention and mixtures of heads with the same projections."""
    torch.manual_seed(0)
    plain = ph.build("mha", dim=DIM, heads=HEADS, device=device).eval()
    made: dict[str, nn.Module] = {"mha": plain}
    for name in ("moh", "moh, uneven load"):
        mixed = ph.build("moh", dim=DIM, heads=HEADS, shared_heads=SHARED, top_k=CHOSEN, device=device).eval()
        mixed.load_state_dict(plain.state_dict(), strict=False)
        made[name] = mixed
    with torch.no_grad():
        made["moh, uneven load"].router.routed.weight[0, 0] += 20.0
        made["moh, uneven load"].router.routed.weight[5, 0] -= 20.0
    return made


def check(made: dict[str, nn.Module], x: torch.Tensor) -> None:
    """Raise unless the mixtures give what all heads times their gates give."""
    plain = made["mha"]
    for name, mixed in made.items():
        if mixed is plain:
            continue
        gates = mixed.choice(x).gates.transpose(1, 2)[..., None]

        def gated(_: nn.Module, heads: tuple[Any, ...], gates: torch.Tensor = gates) -> tuple[Any, ...]:
            return (heads[0] * gates,)

        hook = plain.output.register_forward_pre_hook(gated)
        torch.testing.assert_close(
            mixed(x, mask=ph.causal()), plain(x, mask=ph.causal()), rtol=1e-3, atol=1e-4, msg=name
        )
        hook.remove()


def attention(length: int, device: str, *, backward: bool = False) -> dict[str, Callable[[], Any]]:
    """Attention alone: all heads by SDPA, and the active rows of a random even choice."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, length, HEADS, 64, generator=generator).to(device).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    scores = torch.rand(1, length, HEADS - SHARED, generator=generator).to(device)
    active = scores >= scores.topk(CHOSEN, dim=-1).values[..., -1:]

    def chosen() -> tuple[Tensor, ...]:
        shared = ph.attend(q[:, :SHARED], k[:, :SHARED], v[:, :SHARED], mask=ph.causal())
        rows = ChosenRows(active)
        queries = q[rows.item, rows.head + SHARED, rows.token]
        options = {"mask": ph.causal(), "score": None}
        groups, outs = rows.groups(length), []
        for group in groups:
            own = queries.index_select(0, group.index.flatten()).unflatten(0, (1, *group.index.shape))
            given = of_lanes(options, group, rows.token[group.index], SHARED, HEADS, length - group.rows)
            outs.append(ph.attend(own, *keys_of(group, k, v, SHARED, HEADS), **given)[0])
        return shared, rows.packed(groups, outs)

    def run(call: Callable[[], tuple[Tensor, ...]]) -> Any:
        if backward:
            outs = call()
            return torch.autograd.grad(outs, (q, k, v), [torch.ones_like(out) for out in outs])
        with torch.no_grad():
            return call()

    calls = {"SDPA": lambda: (ph.attend(q, k, v, mask=ph.causal()),), "half of the heads": chosen}
    return {name: partial(run, call) for name, call in calls.items()}


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    made = modules(options.device)
    results = []
    for length in LENGTHS:
        for title in ("forward", "forward and backward"):
            calls = attention(length, options.device, backward=title != "forward")
            times = interleave(calls, options.repeats, device=options.device)
            results.append(report(f"attention alone, {length} tokens, {title}", times, "SDPA"))
            if length == LENGTHS[-1]:
                aim("half of the heads against SDPA", results[-1]["ratio"]["half of the heads"], AIM)
    with torch.no_grad():
        for length in LENGTHS:
            x = torch.randn(1, length, DIM, device=options.device)
            check(made, x[:, :512])
            calls = {n: partial(m, x, mask=ph.causal()) for n, m in made.items()}
            times = interleave(calls, options.repeats, device=options.device)
            results.append(report(f"module, {length} tokens", times, "mha"))
        steps = {name: step(module, options.device) for name, module in made.items()}
        times = interleave(steps, 20 * options.repeats, device=options.device)
        results.append(report(f"one token after {LENGTHS[-1]}", times, "mha"))
    save(options, results)


def step(module: nn.Module, device: str) -> Callable[[], Any]:
    """One step of decoding; the token is taken back, so that every step is the same."""
    cache = module.new_cache(1, max_length=LENGTHS[-1] + 1)
    module(torch.randn(1, LENGTHS[-1], DIM, device=device), mask=ph.causal(), cache=cache)
    token = torch.randn(1, 1, DIM, device=device)

    def once() -> None:
        module(token, mask=ph.causal(), cache=cache)
        cache.crop(LENGTHS[-1])

    return once


if __name__ == "__main__":
    main()
