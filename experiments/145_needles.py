"""DHSA in SmolLM2: are passkeys found where chunks begin as attention changes, or at one length?

What 145_chunks_that_follow_the_text.py asks of prose is asked of texts with passkeys here: 1,000 tokens that
hide four passkeys of four words, one of which is asked for at the end. Blocks of 32 queries read 120, 250 or
500 keys, the latest 32 among them; also the block that asks. Six texts a seed: the share of the words' tokens
that the model finds where it is given those before, and their loss less that of the dense model.

It shows what the paper says if chunks that follow the text find more than even ones.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice

import torch
import torch.nn.functional as F
from _chunks import BUDGETS, LENGTH, ROWS, arms
from _shared import main

import polyhead as ph
from polyhead.attend.selectors import Selector
from polyhead.cache import duo
from polyhead.hf import load
from polyhead.tasks import held_out_text

TEXTS = 6


@torch.no_grad()
def found(samples: list[duo.Sample], selector: Selector | None) -> tuple[float, float]:
    """Share of the answers' tokens that are found, and their mean loss."""
    right, lost = [], []
    for one in samples:
        with nullcontext() if selector is None else ph.sparse(MODEL, selector):
            logits = MODEL(one.ids, use_cache=False).logits[0, :-1][one.counted[0, :-1]].float()
        wanted = one.ids[0, 1:][one.counted[0, :-1]]
        right.append((logits.argmax(-1) == wanted).double())
        lost.append(F.cross_entropy(logits, wanted, reduction="none"))
    return float(torch.cat(right).mean()), float(torch.cat(lost).mean())


def run(seed: int) -> dict[str, float]:
    """Other texts for every seed."""
    drawn = duo.passkeys(TOKENIZER, held_out_text(), length=LENGTH, count=4, words=4, seed=seed)
    samples = list(islice(drawn, TEXTS))
    share, dense = found(samples, None)
    numbers = {"dense: found": share}
    for keep in BUDGETS:
        for name, (chunks, pooling) in arms().items():
            own = ph.dhsa(keep, chunks, pooling=pooling, local=ROWS, last=0, rows=ROWS)
            share, loss = found(samples, own)
            numbers |= {f"{keep} keys, {name}: found": share, f"{keep} keys, {name}: loss": loss - dense}
    return numbers


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    MODEL.requires_grad_(False)
    pairs = {
        f"{keep} keys, {name} less even: found": (f"{keep} keys, {name}: found", f"{keep} keys, even: found")
        for keep in BUDGETS
        for name in list(arms())[1:]
    }
    main(__doc__, run, pairs)
