"""DHSA in SmolLM2: chunks of one length against chunks that begin where attention changes.

The small check of paper 145. The model reads 1,000 tokens; blocks of 32 queries read 120, 250 or 500 keys,
the latest 32 among them. Chunks are of 16 keys; or at most 62 begin where the layer's own attention changes
most (`attention_chunks`, a teacher that no saving could afford), scored with √|c| or without, or by their
largest features; or a network that has learned layer 12's boundaries from 20 other pieces of text says where
they begin (there alone). What is measured: the attention that is missed, mean over heads and queries, and the
loss of the next token less that of the dense model. Of the network: how well its boundaries are the teacher's
(F1, those at most two tokens off count), against chunks of one length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _chunks import BUDGETS, LENGTH, ROWS, arms
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Chunks, Grid, Selector
from polyhead.hf import Call, attach, load
from polyhead.tasks import held_out_text, sample_text

LAYER, PIECES, PIECE, ROUNDS = 12, 20, 400, 12


def selector(keep: int, chunks: Chunks, pooling: str) -> Selector:
    """With no query that reads everything."""
    return ph.dhsa(keep, chunks, pooling=pooling, local=ROWS, last=0, rows=ROWS)


@torch.no_grad()
def loss(ids: Tensor) -> float:
    """Mean loss of the next token."""
    return F.cross_entropy(MODEL(ids, use_cache=False).logits[0, :-1], ids[0, 1:]).item()


@torch.no_grad()
def heard(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of the layer while the model reads."""
    found: list[Tensor] = []

    def listen(call: Call) -> Tensor:
        if call.layer.index == LAYER:
            assert isinstance(call.k, Tensor)
            found.extend((call.q.clone(), call.k.clone()))
        return call.proceed()

    with attach(MODEL) as attachment, attachment.handling(listen):
        MODEL(ids, use_cache=False)
    return found[0], found[1]


def learned(seed: int) -> Chunks:
    """Chunks of a network that has read other pieces."""
    pieces = [heard(IDS[:, at * PIECE : (at + 1) * PIECE]) for at in range(PIECES)]
    taught = [(k, ph.boundary_ratio(q, k)) for q, k in pieces]
    own = ph.boundary_predictor(pieces[0][1].shape[1] * pieces[0][1].shape[3], width=64, hidden=64)
    steps = torch.optim.Adam(own.tensors(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(ROUNDS):
            for k, ratio in taught:
                lost = ph.boundary_loss(own, k, ratio)
                steps.zero_grad(set_to_none=True)
                lost.backward()
                steps.step()
    own = own.map_tensors(Tensor.detach)
    every = torch.cat([own.logits(k).view(-1) for k, _ in taught])
    # as many boundaries as the teacher's length allows: the network's logits have no scale that is known
    middle = float(every[every.isfinite()].median())
    return ph.learned_chunks(own, 16, threshold=middle)


def agreement(found: Tensor, teacher: Tensor, off: int) -> float:
    """F1 of boundaries that may be so far off."""
    found, teacher = found.clone(), teacher.clone()
    found[:, 0] = teacher[:, 0] = False
    near = [F.max_pool1d(x.float()[:, None], 2 * off + 1, 1, off)[:, 0] > 0 for x in (teacher, found)]
    right = float((found & near[0]).sum() / found.sum().clamp(min=1))
    held = float((teacher & near[1]).sum() / teacher.sum().clamp(min=1))
    return 2 * right * held / max(right + held, 1e-9)


@torch.no_grad()
def run(seed: int) -> dict[str, float]:
    """Another text for every seed."""
    start = PIECES * PIECE + seed * LENGTH
    ids = IDS[:, start : start + LENGTH]
    numbers: dict[str, float] = {}
    dense = loss(ids)
    for keep in BUDGETS:
        for name, (chunks, pooling) in arms().items():
            own = selector(keep, chunks, pooling)
            missed = ph.heads.missed_mass(MODEL, text=ids, select=own).mass
            with ph.sparse(MODEL, own):
                numbers[f"{keep} keys, {name}: loss"] = loss(ids) - dense
            numbers[f"{keep} keys, {name}: missed"] = float(missed.flat.mean())
    q, k = heard(ids)
    grid = Grid(1, q.shape[1], k.shape[1], LENGTH, LENGTH, 1, 1, q.shape[-1] ** -0.5)
    network = learned(seed)
    begun = {
        name: one.starts(q, k, ph.causal(), grid).clone()
        for name, one in (
            ("teacher", ph.attention_chunks(16)),
            ("network", network),
            ("even", ph.even_chunks(16)),
        )
    }
    for name in ("network", "even"):
        for off in (0, 2):
            numbers[f"F1 of {name}, {off} off"] = agreement(begun[name], begun["teacher"], off)
    for name, chunks in (
        ("network", network),
        ("even", ph.even_chunks(16)),
        ("teacher", ph.attention_chunks(16)),
    ):
        one = {LAYER: selector(BUDGETS[0], chunks, "sqrt")}
        missed = ph.heads.missed_mass(MODEL, text=ids, select=one).mass
        numbers[f"layer {LAYER}, {BUDGETS[0]} keys, {name}: missed"] = sum(missed[LAYER]) / len(missed[LAYER])
    return numbers


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    MODEL.requires_grad_(False)
    IDS = TOKENIZER(sample_text() + held_out_text(), return_tensors="pt", verbose=False)["input_ids"]
    main(
        __doc__,
        run,
        {
            f"{keep} keys, {name} less even, {what}": (
                f"{keep} keys, {name}: {what}",
                f"{keep} keys, even: {what}",
            )
            for keep in BUDGETS
            for name in list(arms())[1:]
            for what in ("missed", "loss")
        },
        seeds=3,
    )
