"""MoBA's choice of blocks in SmolLM2, which was trained dense: perplexity as more blocks are read.

The model reads 1,536 tokens of prose; what is measured is the loss of the last 1,024, as nats and as percent
of perplexity above the dense model's, and of the words of passkeys that are asked for behind 1,536 tokens.
Every query reads its own block of 64 keys and, of those before it, the blocks whose mean key it likes best:
2, 4, 8, 16 or all 24 blocks with its own; or as many of the nearest ones. A seed draws the text.

It shows if the loss falls towards the dense one as more blocks are read, and chosen blocks lose less than
the nearest ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _samples import prose_and_passkeys
from _shared import main

import polyhead as ph
from polyhead.attend.selectors import Selector
from polyhead.cache.duo import Sample
from polyhead.hf import load
from polyhead.tasks import held_out_text

LENGTH, LAST, BLOCK = 1536, 1024, 64
BLOCKS = (2, 4, 8, 16, 24)


def chosen(count: int) -> Selector:
    """As the mechanism `moba` chooses."""
    own = ph.blocks(BLOCK)
    return ph.select(ph.mean_keys(), ph.keep_blocks(count), rows=1, cols=BLOCK, always=own)


def nearest(count: int) -> Selector:
    """The own block and the ones before it."""
    return ph.fixed(ph.window(BLOCK * (count - 1)), rows=1, cols=BLOCK)


@torch.no_grad()
def nats(sample: Sample) -> float:
    """Mean loss of the tokens that count."""
    logits = MODEL(sample.ids, use_cache=False).logits[0, :-1]
    lost = F.cross_entropy(logits.float(), sample.ids[0, 1:], reduction="none")
    return float(lost[sample.counted[0, :-1]].mean())


def run(seed: int) -> dict[str, float]:
    """One text."""
    prose = PROSE[seed * LENGTH :]
    samples = prose_and_passkeys(TOKENIZER, prose, length=LENGTH, last=LAST, seed=seed)
    dense = {kind: nats(one) for kind, one in samples.items()}
    found = {f"dense: {kind}": value for kind, value in dense.items()}
    for count in BLOCKS:
        for name, selector in (("chosen", chosen(count)), ("nearest", nearest(count))):
            with ph.sparse(MODEL, selector):
                lost = {kind: nats(one) for kind, one in samples.items()}
            for kind in samples:
                found[f"{count} blocks, {name}: {kind}, less dense"] = lost[kind] - dense[kind]
            rise = torch.tensor(lost["prose"] - dense["prose"]).expm1()
            found[f"{count} blocks, {name}: perplexity, % above"] = 100 * float(rise)
    return found


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    MODEL.requires_grad_(False)
    PROSE = torch.tensor(TOKENIZER(held_out_text(), verbose=False)["input_ids"])
    pairs = {
        f"{count} blocks, chosen less nearest: {kind}": (
            f"{count} blocks, chosen: {kind}, less dense",
            f"{count} blocks, nearest: {kind}, less dense",
        )
        for count in BLOCKS
        for kind in ("prose", "passkeys")
    }
    main(__doc__, run, pairs)
