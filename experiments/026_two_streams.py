"""Dual streams: what mixing fewer heads costs, whether attention selects, and what each stream is worth.

Language models of three layers, width 64, 8 heads, 250 steps, whose values and outputs mix heads at will, by
Kronecker maps, or not at all (with fewer parameters then, as in the paper). Then, in percent of the bits per
byte of held-out text: what it costs to multiply the logits of all heads by 2, 4 and 16, and to leave the
token stream or the context stream out wherever it is read.

It shows what the paper says if Kronecker maps cost less than independent ones, if 16-fold logits cost tens of
percent and no more, and if the token stream is worth more than the context stream.
"""

from __future__ import annotations

import torch
from _shared import learn, main, score
from torch import Tensor, nn

from polyhead.attend.masks import causal
from polyhead.heads import amplified
from polyhead.league import Batch, Recipe
from polyhead.league.tasks.text import TextTask
from polyhead.mechanisms.dual_stream import dual_streams
from polyhead.nn import rope

DIM, HEADS, LAYERS = 64, 8, 3
RECIPE = Recipe(steps=250, batch=16, rate=2e-3, warmup=0.05, decay=0.1)
MAPS = ("dense", "kronecker", "independent")
FACTORS = (2, 4, 16)


class Streams(nn.Module):
    """Embeddings, the streams, and a read-out."""

    def __init__(self, task: TextTask, mixing: str) -> None:
        super().__init__()
        self.task = task
        self.embed = nn.Embedding(task.vocabulary, DIM)
        nn.init.normal_(self.embed.weight, std=DIM**-0.5)
        self.inner = dual_streams(
            LAYERS, dim=DIM, heads=HEADS, value_map=mixing, output_map=mixing, position=rope()
        )
        self.read = nn.Linear(DIM, task.outputs)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the next tokens `(B·L, V)`."""
        return self.read(self.inner(self.embed(batch.inputs), mask=causal())).flatten(0, 1)

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch."""
        return self.task.loss(self(batch).float(), batch)


def run(seed: int) -> dict[str, float]:
    """Bits of every kind, and what changes cost in percent."""
    task, found = TextTask(tokens=64), {}
    for mixing in MAPS:
        torch.manual_seed(seed)
        model = Streams(task, mixing)
        learn(model, task, RECIPE, seed, loss=model.loss)
        model.eval()
        bits = score(model, task, 32, 8)
        found[f"{mixing}: bits"] = bits
        for factor in FACTORS:
            with amplified(model, factor):
                found[f"{mixing}: logits x {factor} %"] = 100 * (score(model, task, 32, 8) / bits - 1)
        for stream in ("token", "context"):
            with model.inner.sharing(**{stream: 0.0}, everywhere=True):
                found[f"{mixing}: without {stream} %"] = 100 * (score(model, task, 32, 8) / bits - 1)
    for mixing in MAPS[1:]:
        found[f"{mixing}: dearer than dense %"] = 100 * (found[f"{mixing}: bits"] / found["dense: bits"] - 1)
    return found


if __name__ == "__main__":
    pairs = {f"{m}: token - context %": (f"{m}: without token %", f"{m}: without context %") for m in MAPS}
    pairs["independent - kronecker: bits"] = ("independent: bits", "kronecker: bits")
    main(__doc__, run, pairs)
