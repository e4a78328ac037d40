"""Overhead of the attention module over one written by hand around SDPA.

The same weights, the same projections, the same `scaled_dot_product_attention`: what is measured is what a
description costs. The aim is at most 1.05 times the time of the module written by hand. Besides full
passes there is decoding, against a module that keeps its cache in one tensor and never copies it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save
from torch import Tensor, nn

import polyhead as ph

AIM = 1 / 1.05
# heads, kv heads, width, and the shapes of calls: (batch, length)
MODULES = {"mha 8 × 64": (8, 8, 512), "grouped 8:2 × 64": (8, 2, 512)}
CALLS = ((1, 256), (4, 256), (1, 2048))
DECODE = 4096


class ByHand(nn.Module):
    """Causal attention as one writes it without a library."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.value = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.held: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, seen: int = 0) -> Tensor:
        batch, length, dim = x.shape
        q = self.query(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.key(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.value(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        if self.held is not None:
            for tensor, new in zip(self.held, (k, v), strict=True):
                tensor[:, :, seen : seen + length] = new
            k, v = (tensor[:, :, : seen + length] for tensor in self.held)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=length > 1, enable_gqa=self.heads != self.kv_heads
        )
        return self.output(y.transpose(1, 2).reshape(batch, length, dim))


def pair(heads: int, kv_heads: int, dim: int, device: str) -> tuple[nn.Module, ByHand]:
    """Polyhead's module and the one by hand, with the same weights."""
    ours = ph.build("grouped_query", dim=dim, heads=heads, kv_heads=kv_heads, device=device)
    hand = ByHand(dim, heads, kv_heads).to(device)
    hand.load_state_dict({name.removeprefix("projection."): w for name, w in ours.state_dict().items()})
    return ours, hand


def passes(ours: nn.Module, hand: ByHand, x: Tensor, backward: bool) -> dict[str, Callable[[], object]]:
    causal = ph.causal()
    calls = {"by hand": lambda: hand(x), "polyhead": lambda: ours(x, mask=causal)}
    if not backward:
        return calls

    def both(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call().sum(), [x])

    return {name: both(call) for name, call in calls.items()}


def steps(ours: nn.Module, hand: ByHand, device: str) -> dict[str, Callable[[], object]]:
    """32 decoding steps after a prefill of `DECODE` tokens; every call begins after the prefill."""
    causal = ph.causal()
    x = torch.randn(1, DECODE + 32, hand.heads * hand.width, device=device)
    shape = (1, hand.kv_heads, DECODE + 32, hand.width)
    hand.held = (torch.zeros(shape, device=device), torch.zeros(shape, device=device))
    cache = ours.new_cache(1, max_length=DECODE + 32)
    hand(x[:, :DECODE])
    ours(x[:, :DECODE], mask=causal, cache=cache)

    def by_hand() -> Tensor:
        return torch.cat([hand(x[:, n : n + 1], n) for n in range(DECODE, DECODE + 32)], dim=1)

    def polyhead() -> Tensor:
        cache.crop(DECODE)
        places = range(DECODE, DECODE + 32)
        return torch.cat([ours(x[:, n : n + 1], mask=causal, cache=cache) for n in places], dim=1)

    return {"by hand": by_hand, "polyhead": polyhead}


def main() -> None:
    options = begin(arguments(__doc__, repeats=31))
    torch.manual_seed(0)
    results, reached = [], True
    for name, (heads, kv_heads, dim) in MODULES.items():
        ours, hand = pair(heads, kv_heads, dim, options.device)
        for backward in (False, True):
            for batch, length in CALLS:
                x = torch.randn(batch, length, dim, device=options.device, requires_grad=backward)
                torch.testing.assert_close(ours(x, mask=ph.causal()), hand(x), rtol=1e-4, atol=1e-5)
                with torch.set_grad_enabled(backward):
                    calls = passes(ours, hand, x, backward)
                    times = interleave(calls, options.repeats, device=options.device)
                what = "forward and backward" if backward else "forward"
                results.append(report(f"{name}, {batch} × {length}, {what}", times, "by hand"))
                reached &= aim("speed of the module by hand", results[-1]["ratio"]["polyhead"], AIM)
        with torch.no_grad():
            calls = steps(ours, hand, options.device)
            torch.testing.assert_close(calls["polyhead"](), calls["by hand"](), rtol=1e-4, atol=1e-5)
            times = interleave(calls, options.repeats, device=options.device)
        results.append(report(f"{name}, 32 decoding steps after {DECODE} tokens", times, "by hand"))
        reached &= aim("speed of the module by hand", results[-1]["ratio"]["polyhead"], AIM)
    print(f"\nall aims reached: {'yes' if reached else 'NO'}")
    save(options, results)


if __name__ == "__main__":
    main()
