"""Variants of attention at 2048 tokens × 512, as modules, against x-transformers' options for the same.

Causal, batch 1, 8 heads of 64, float32, equal weights. The gate: equal outputs, and equal gradients of the
input and of every weight. The aim is twice their speed, forward, and forward and backward.

Compared is what both have:

- talking heads: theirs adds the mix of the logits to the logits, so its matrix and the identity are ours;
- sigmoid: without a bias;
- a learned sink of each head;
- top-k: both keep logits that equal the k-th largest;
- differential attention: x-transformers has none, and the yardstick is written by hand as the equations of
  the Differential Transformer stand, with the weights of both maps as tensors.

Besides, without an aim: a key and a value of zeros, which is a sink of 0. There x-transformers can use the
fused kernel of torch, and the same module around that kernel without any sink is less than twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save
from torch import Tensor, nn
from x_transformers.x_transformers import Attention

import polyhead as ph

DIM, HEADS, LENGTH, KEPT = 512, 8, 2048, 64
AIM = 2.0
CAUSAL = ph.causal()


class Pair(NamedTuple):
    """Two modules with equal weights: `same` are theirs and ours of which the gradients have to agree."""

    theirs: nn.Module
    ours: nn.Module
    same: list[tuple[Tensor, Tensor]]
    least: float | None = AIM


def paired(name: str = "mha", *, least: float | None = AIM, options: dict, **own: object) -> Pair:
    """A module of x-transformers with `options`, and ours with `own`, with the same four projections."""
    theirs = Attention(dim=DIM, heads=HEADS, dim_head=DIM // HEADS, causal=True, **options)
    ours = ph.build(name, dim=DIM, heads=HEADS, **own)
    same = [
        (theirs.to_q.weight, ours.projection.query.weight),
        (theirs.to_k.weight, ours.projection.key.weight),
        (theirs.to_v.weight, ours.projection.value.weight),
        (theirs.to_out.weight, ours.output.weight),
    ]
    with torch.no_grad():
        for a, b in same:
            b.copy_(a)
    return Pair(theirs, ours, same, least)


def talking_heads() -> Pair:
    pair = paired("talking_heads", options={"pre_talking_heads": True, "post_talking_heads": True})
    before, after = (
        getattr(pair.theirs.attend, f"{when}_softmax_talking_heads").weight for when in ("pre", "post")
    )
    with torch.no_grad():
        for matrix in (before, after):
            matrix.add_(0.3 * torch.randn_like(matrix))
        pair.ours.logit_mixing.weight.copy_(torch.eye(HEADS) + before[..., 0, 0])
        pair.ours.weight_mixing.weight.copy_(after[..., 0, 0])
    pair.same.extend(((before, pair.ours.logit_mixing.weight), (after, pair.ours.weight_mixing.weight)))
    return pair


def learned_sink() -> Pair:
    sink = nn.Parameter(torch.randn(HEADS))
    pair = paired(options={"head_learned_sink": True}, normalizer=ph.softmax(sink=sink))
    (own,) = pair.ours.normalizer.parameters()
    with torch.no_grad():
        pair.theirs.attend.head_attn_sink.copy_(own)
    pair.same.append((pair.theirs.attend.head_attn_sink, own))
    return pair


class ByHand(nn.Module):
    """Differential attention as its equations stand, over the weights of ours."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.ours = [ours]  # hidden, so that its weights are not counted twice
        self.weights = nn.ParameterList(p.detach().clone() for p in ours.parameters())
        self.names = [name for name, _ in ours.named_parameters()]

    def forward(self, x: Tensor) -> Tensor:
        (ours,) = self.ours
        held = dict(zip(self.names, self.weights, strict=True))
        batch, length, _ = x.shape

        def heads(name: str, count: int) -> Tensor:
            made = F.linear(x, held[f"projection.{name}.weight"])
            return made.view(batch, length, count, -1).transpose(1, 2)

        q, k, v = heads("query", 2 * HEADS), heads("key", 2 * HEADS), heads("value", HEADS)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        signal, noise = logits.masked_fill(hidden, float("-inf")).softmax(-1).chunk(2, dim=1)
        l_q, l_k, n_q, n_k = (held[f"noise_share.{name}"] for name in ("q1", "k1", "q2", "k2"))
        start = ours.noise_share.start
        share = (l_q @ l_k).exp() - (n_q @ n_k).exp() + start
        y = (signal - share * noise) @ v
        y = F.rms_norm(y, y.shape[-1:], held["norm.weight"], 1e-5) * (1 - start)
        return F.linear(y.transpose(1, 2).flatten(2), held["output.weight"])


def differential() -> Pair:
    ours = ph.build("grouped_differential", dim=DIM, heads=HEADS, noise_heads=HEADS)
    theirs = ByHand(ours)
    return Pair(theirs, ours, list(zip(theirs.weights, ours.parameters(), strict=True)))


PAIRS: dict[str, Callable[[], Pair]] = {
    "talking heads": talking_heads,
    "sigmoid": lambda: paired(options={"sigmoid": True}, normalizer=ph.sigmoid()),
    "learned sink": learned_sink,
    f"top {KEPT}": lambda: paired(options={"sparse_topk": KEPT}, normalizer=ph.top_k(KEPT)),
    "differential, by hand": differential,
    "zero key and value, fused": lambda: paired(
        options={"add_zero_kv": True, "flash": True}, normalizer=ph.softmax(sink=0.0), least=None
    ),
}


def trained(call: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """The output, and the gradients of the input and of the weights."""
    y = call(x)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return y.detach(), *torch.autograd.grad(y, [x, *weights], up)


def main() -> None:
    options = begin(arguments(__doc__, repeats=7))
    results, missed = [], []
    for name, make in PAIRS.items():
        torch.manual_seed(0)
        pair = make()
        pair.theirs.to(options.device)
        pair.ours.to(options.device)
        x = torch.randn(1, LENGTH, DIM, device=options.device, requires_grad=True)
        yardstick = "by hand" if isinstance(pair.theirs, ByHand) else "x-transformers"
        modules = {
            yardstick: (pair.theirs, [a for a, _ in pair.same]),
            "polyhead": (lambda x, m=pair.ours: m(x, mask=CAUSAL), [b for _, b in pair.same]),
        }
        for tokens in (LENGTH // 4, LENGTH):
            answers = [trained(call, x[:, :tokens], own) for call, own in modules.values()]
            for a, b in zip(*answers, strict=True):
                close = {"rtol": 1e-3, "atol": 1e-3 * b.abs().max().item()}
                torch.testing.assert_close(a.view_as(b), b, **close, msg=lambda m, n=name: f"{n}: {m}")
        del answers, a, b

        def alone(call: Callable[[Tensor], Tensor], _: object, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return call(x)

        def both(call: Callable[[Tensor], Tensor], own: list[Tensor], x: Tensor = x) -> object:
            return trained(call, x, own)

        for title, way in (("forward", alone), ("forward and backward", both)):
            calls = {n: lambda given=given, w=way: w(*given) for n, given in modules.items()}
            times = interleave(calls, options.repeats, device=options.device)
            results.append(report(f"{name}, {title}", times, yardstick))
            ratio = results[-1]["ratio"]["polyhead"]
            if pair.least is not None and not aim(f"speed of {yardstick}", ratio, pair.least):
                missed.append(f"{name}, {title}")
    print("\nall aims reached" if not missed else f"\nmissed: {'; '.join(missed)}")
    save(options, results)


if __name__ == "__main__":
    main()
