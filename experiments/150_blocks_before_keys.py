"""HISA in SmolLM2: what is lost by searching the best blocks alone for the keys that an indexer likes most.

The small check of paper 150. Texts of 1,500 tokens are read once; in layers 4, 12, 20 and 28 queries and keys
are taken as they are. Two indexers score keys for all heads of a layer together: the mean query with the mean
key, and one of 4 heads of 16 features that has learned the layer's mean attention from another part of the
text (300 steps on 256 tokens each). Of 1,500 keys 128 are read. What is measured, in the mean over layers
and over the queries from 512 on: the intersection over the union of the keys that HISA and the flat indexer
read, and the share of attention on what is read, in the mean over heads: by the flat indexer, by HISA, and by
whole blocks with as many keys, the first and the own block among them; and how much the flat indexer reads
that HISA misses, altogether and in the key of which most is missed.
"""

from __future__ import annotations

import torch
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Indexer, Selector, choose
from polyhead.hf import Call, attach, load
from polyhead.tasks import held_out_text, sample_text

LAYERS = (4, 12, 20, 28)
LENGTH, KEEP, FIRST = 1500, 128, 512
SEARCHED = (
    (8, 16),
    (8, 32),
    (16, 8),
    (16, 16),
    (16, 32),
    (64, 2),
    (64, 4),
    (64, 8),
)  # keys of a block, blocks
STEPS, PIECE = 300, 256


@torch.no_grad()
def heard(ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries and keys of the layers while SmolLM2 reads."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def listen(call: Call) -> Tensor:
        if call.layer.index in LAYERS:
            assert isinstance(call.k, Tensor)
            found[call.layer.index] = call.q.clone(), call.k.clone()
        return call.proceed()

    with attach(MODEL) as attachment, attachment.handling(listen):
        MODEL(ids, use_cache=False)
    return found


def learned(q: Tensor, k: Tensor) -> Indexer:
    """An indexer of 4 heads that has learned the mean attention of a layer."""
    sizes = (4, 16, q.shape[1] * q.shape[3]), (4, q.shape[1] * q.shape[3]), (16, k.shape[1] * k.shape[3])
    own = ph.learned_indexer(*((torch.randn(s) / s[-1] ** 0.5).requires_grad_() for s in sizes))
    steps = torch.optim.Adam(own.tensors(), lr=3e-3)
    for number in range(STEPS):
        for group in steps.param_groups:
            group["lr"] = 3e-3 * (1 - number / STEPS)
        at = int(torch.randint(q.shape[2] - PIECE, ()))
        piece = (x[:, :, at : at + PIECE] for x in (q, k))
        loss = ph.indexer_loss(own, *piece, ph.causal())
        steps.zero_grad(set_to_none=True)
        loss.backward()
        steps.step()
    return own.map_tensors(Tensor.detach)


@torch.no_grad()
def pairs(selector: Selector, q: Tensor, k: Tensor) -> Tensor:
    """Which keys the queries from FIRST on read: bool (L - FIRST, S)."""
    found = ph.causal() & choose(selector, q, k, ph.causal(), q.shape[-1] ** -0.5)
    j = torch.arange(k.shape[2])
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    return found.allowed(zero, zero, j[FIRST:, None], j)[0, 0]


@torch.no_grad()
def run(seed: int) -> dict[str, float]:
    """One part of the text for learning, another for measuring."""
    start = (seed + 1) * LENGTH
    train, test = heard(IDS[:, :LENGTH]), heard(IDS[:, start : start + LENGTH])
    totals: dict[str, list[float]] = {}
    for layer in LAYERS:
        q, k = test[layer]
        away = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        logits = q[0] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).mT * q.shape[-1] ** -0.5
        p = logits.masked_fill(away < 0, -torch.inf).softmax(-1).mean(0)[FIRST:]
        totals.setdefault("the best keys for all heads: mass", []).append(
            float(p.topk(KEEP, -1).values.sum(-1).mean())
        )
        with torch.enable_grad():
            fitted = learned(*train[layer])
        for name, indexer in (("means", ph.mean_indexer()), ("learned", fitted)):
            flat = pairs(ph.token_indexer(KEEP, indexer), q, k)
            totals.setdefault(f"{name}, flat: mass", []).append(float((p * flat).sum(-1).mean()))
            for size, blocks in SEARCHED:
                own = pairs(ph.hisa(KEEP, blocks, size, indexer), q, k)
                same = (own & flat).sum(-1) / (own | flat).sum(-1)
                said = f"{name}, {blocks} blocks of {size}"
                totals.setdefault(f"{said}: same", []).append(float(same.mean()))
                totals.setdefault(f"{said}: mass", []).append(float((p * own).sum(-1).mean()))
                lost = (p * (flat & ~own)).mean(0)
                totals.setdefault(f"{said}: missed", []).append(float(lost.sum()))
                totals.setdefault(f"{said}: missed in one key", []).append(float(lost.max()))
            for size in (8, 16, 64):
                whole = ph.select(
                    ph.index_scores(indexer),
                    ph.keep_blocks(KEEP // size),
                    rows=1,
                    cols=size,
                    always=ph.sink(1) | ph.window(0),
                )
                mass = float((p * pairs(whole, q, k)).sum(-1).mean())
                totals.setdefault(f"{name}, whole blocks of {size}: mass", []).append(mass)
    return {name: sum(numbers) / len(numbers) for name, numbers in totals.items()}


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    MODEL.requires_grad_(False)
    TEXT = sample_text() + held_out_text()
    IDS = TOKENIZER(TEXT, return_tensors="pt", verbose=False)["input_ids"]
    main(
        __doc__,
        run,
        {
            f"{name}, {blocks} blocks of {size} less flat": (
                f"{name}, {blocks} blocks of {size}: mass",
                f"{name}, flat: mass",
            )
            for name in ("means", "learned")
            for size, blocks in SEARCHED
        },
        seeds=2,
    )
