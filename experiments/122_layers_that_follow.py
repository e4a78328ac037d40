"""LessIsMore in SmolLM2: layers that read what an earlier layer chose for all heads, by turns of the heads.

The small check of paper 122. The model reads 900 tokens densely and then 100 more, each of which chooses for
itself from layer 2 on (as steps of decoding would; layers 2 and 12 read everything and choose, the others
follow). With 32 to 256 keys: one list for all heads, with shares of 0, 0.25, 0.5 and 1 for the first and
latest keys; a list for each head, its best keys, chosen by the same layers; and the first 4 keys and the
latest. What is measured: the divergence (KL) of the next token from that of the dense model, and the
attention that is missed in the layers that follow. Of the dense model besides: how alike the 64 best keys of
two heads of a layer are (intersection over union; chance gives 0.035), how many of them are among the latest
16, and how alike those of the same head in two layers in a row are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise

import torch
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Selector
from polyhead.hf import Call, attach, load
from polyhead.tasks import held_out_text

PROMPT, MORE = 900, 100
AT = (2, 12)
BUDGETS = (32, 64, 128, 256)
LAYERS = 30


def by_head(keep: int) -> list[Selector | None]:
    """The best keys of every head, chosen by the same layers."""
    best = ph.select(ph.mean_keys(), ph.keep_blocks(keep), rows=1, cols=1)
    own = ph.less_is_more(LAYERS, keep, at=AT)
    return [ph.lead(best) if layer in AT else one for layer, one in enumerate(own)]


def near(keep: int) -> list[Selector | None]:
    """The first four keys and the latest ones, in the layers that would follow."""
    own = ph.fixed(ph.sink(4) | ph.window(keep - 5), rows=1, cols=1)
    return [None if layer in (0, 1, *AT) else own for layer in range(LAYERS)]


def arms() -> Mapping[str, list[Selector | None]]:
    """Every way by its name."""
    found = {}
    for keep in BUDGETS:
        for recent in (0.0, 0.25, 0.5, 1.0):
            own = ph.less_is_more(LAYERS, keep, at=AT, recent=recent)
            found[f"{keep} keys, all heads, {recent:g} latest"] = own
        found[f"{keep} keys, each head"] = by_head(keep)
        found[f"{keep} keys, first and latest"] = near(keep)
    return found


class Watch:
    """Adds up what the layers miss, and keeps queries and keys."""

    def __init__(self) -> None:
        self.missed: list[float] = []
        self.heard: list[tuple[Tensor, Tensor]] = []

    def __call__(self, call: Call) -> Tensor:
        assert isinstance(call.k, Tensor)
        assert isinstance(call.v, Tensor)
        if call.q.shape[2] != MORE:
            return call.proceed()
        self.heard.append((call.q, call.k))
        if call.layer.index > AT[0] and call.layer.index not in AT:
            _, read = ph.attend(call.q, call.k, call.v, mask=call.mask, return_lse=True)
            _, dense = ph.attend(call.q, call.k, call.v, mask=ph.causal(), return_lse=True)
            self.missed.append(float((1 - (read - dense).exp()).mean()))
        return call.proceed()


def tops(q: Tensor, k: Tensor, keep: int = 64) -> Tensor:
    """Which keys are among the best of each head and query: bool (H, L, S)."""
    logits = q[0] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).mT
    away = torch.arange(PROMPT, PROMPT + MORE)[:, None] - torch.arange(PROMPT + MORE)
    best = logits.masked_fill(away < 0, -torch.inf).topk(keep, -1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)


def alike(one: Tensor, other: Tensor) -> float:
    """Intersection over union, mean over all but the last dimension."""
    return float(((one & other).sum(-1) / (one | other).sum(-1)).mean())


@torch.no_grad()
def run(seed: int) -> dict[str, float]:
    """Another text for every seed."""
    ids = IDS[:, seed * 2000 : seed * 2000 + PROMPT + MORE]
    numbers: dict[str, float] = {}
    watch = Watch()
    with attach(MODEL) as attachment, attachment.handling(watch):
        held = MODEL(ids[:, :PROMPT], use_cache=True).past_key_values
        dense = MODEL(ids[:, PROMPT:], past_key_values=copy.deepcopy(held)).logits.log_softmax(-1)
        best = [tops(*one) for one in watch.heard]
        away = torch.arange(PROMPT, PROMPT + MORE)[:, None] - torch.arange(PROMPT + MORE)
        pairs = [(a, b) for a in range(9) for b in range(a)]
        numbers["best keys of two heads alike"] = sum(
            alike(own[a], own[b]) for own in best for a, b in pairs
        ) / (len(best) * len(pairs))
        numbers["best keys among the latest 16"] = sum(
            float((own & (away < 16)).sum(-1).float().mean()) / 64 for own in best
        ) / len(best)
        numbers["best keys of the next layer's head alike"] = sum(
            alike(one, other) for one, other in pairwise(best)
        ) / (len(best) - 1)
        for name, own in arms().items():
            watch.missed.clear()
            with ph.sparse(MODEL, own):
                found = MODEL(ids[:, PROMPT:], past_key_values=copy.deepcopy(held)).logits.log_softmax(-1)
            numbers[f"{name}: KL"] = float((dense.exp() * (dense - found)).sum(-1).mean())
            numbers[f"{name}: missed"] = sum(watch.missed) / len(watch.missed)
    return numbers


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    IDS = TOKENIZER(held_out_text(), return_tensors="pt", verbose=False)["input_ids"]
    main(
        __doc__,
        run,
        {
            f"{keep} keys, {which}, KL less all heads": (
                f"{keep} keys, {which}: KL",
                f"{keep} keys, all heads, 0.25 latest: KL",
            )
            for keep in BUDGETS
            for which in ("each head", "first and latest", "all heads, 0 latest", "all heads, 1 latest")
        },
    )
