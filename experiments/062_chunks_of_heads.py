"""LongHeads in SmolLM2: is a passkey found when every query reads 512 tokens of a long text?

The small check of paper 062. Three passkeys of four words stand in prose of 1,536 tokens, and are asked for
at its end; what is measured is the loss of their words, and the share of them that are the likeliest tokens.
The model reads it all; by chunks of 64, eight a query and head, moved together (`long_heads`); the same
number of keys at their true positions by `mean_keys`, by lot, and as the first chunk and the nearest ones.
A seed draws prose and passkeys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Grid
from polyhead.cache import duo
from polyhead.tasks import held_out_text

LENGTH, READ, CHUNK = 1536, 512, 64

model, tokenizer = ph.hf.load("smollm2")


class ByLot(ph.Scorer):
    """Any chunk, whatever it holds."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Callable[[int, int], Tensor]:
        def scores(start: int, stop: int) -> Tensor:
            return torch.rand(grid.batch, grid.heads, stop - start, grid.col_blocks)

        return scores


def ranked(scorer: ph.Scorer) -> ph.Selector:
    """The same number of chunks, the first and the two nearest among them."""
    always = ph.sink(1) | ph.window(CHUNK)
    return ph.select(scorer, ph.keep_blocks(READ // CHUNK), rows=1, cols=CHUNK, always=always)


def ways() -> dict[str, AbstractContextManager[object]]:
    """Every way to read, by name."""
    near = ph.a_shape(1, READ - 2 * CHUNK + 1, rows=1, cols=CHUNK)
    return {
        "everything": nullcontext(),
        "long_heads": ph.long_heads(model, window=CHUNK, length=READ),
        "mean keys": ph.sparse(model, ranked(ph.mean_keys())),
        "by lot": ph.sparse(model, ranked(ByLot())),
        "first and nearest": ph.sparse(model, near),
    }


@torch.no_grad()
def run(seed: int) -> dict[str, float]:
    """One text with passkeys."""
    torch.manual_seed(seed)
    sample = next(duo.passkeys(tokenizer, held_out_text(), length=LENGTH, count=3, words=4, seed=seed))
    ids, counted = sample
    at = counted[0].nonzero().view(-1)
    numbers: dict[str, float] = {}
    for name, way in ways().items():
        with way:
            logits = model(ids, use_cache=False).logits[0, at].float()
        wanted = ids[0, at + 1]
        numbers[f"{name}: nats"] = float(torch.nn.functional.cross_entropy(logits, wanted))
        numbers[f"{name}: right"] = float((logits.argmax(-1) == wanted).float().mean())
    return numbers


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            f"long_heads less {other}, nats": ("long_heads: nats", f"{other}: nats")
            for other in ("everything", "mean keys", "by lot", "first and nearest")
        },
    )
