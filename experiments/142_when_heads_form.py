"""Induction heads form in two layers, and in one layer whose keys are smeared with the key before.

Attention without MLPs, four heads of 16, ALiBi: one layer; two layers; and one layer with keys
σ(a_h) k_j + (1 - σ(a_h)) k_{j-1}, a learned. Words of random symbols repeat, and what follows is asked. Every
25 steps the loss and the prefix score of the best head are taken: the mean weight, at places that are asked,
of the places behind earlier ones with the same symbol. "heads at" is the step from which that score is above
a half, "loss at" the one from which the loss is below half of ln 64; the number of all steps where that
never came.

It shows what the paper says if two layers and smeared keys get there, one layer does not, and the two steps
lie close to each other.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from _maps import maps_of
from _shared import learn, main, score
from torch import Tensor, nn

import polyhead as ph
from polyhead.league import Batch, Recipe
from polyhead.league.tasks.induction import InductionTask
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.projections import Projection

DIM, HEADS = 64, 4
RECIPE = Recipe(steps=1000, batch=64, rate=3e-3)
EVERY = 25
TASK = InductionTask(tokens=64, shortest=8, longest=24)


class Smeared(Projection):
    """Keys that are mixed with the key before them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.own = nn.Parameter(torch.zeros(heads))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, H, L, D)`."""
        k, v = super().keys_values(source)
        share = self.own.sigmoid()[:, None, None]
        return share * k + (1 - share) * F.pad(k, (0, 0, 1, -1)), v


class Words(nn.Module):
    """Embeddings, layers of attention alone, and a read-out."""

    def __init__(self, layers: int, projection: type[Projection]) -> None:
        super().__init__()
        self.embed = nn.Embedding(TASK.vocabulary, DIM)
        made = [MultiHeadAttention(projection(DIM, HEADS), score=ph.alibi(HEADS)) for _ in range(layers)]
        self.stack = ph.nn.AttentionStack(made, DIM, final_norm=True)
        self.read = nn.Linear(DIM, TASK.outputs)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the places that are asked."""
        x = self.read(self.stack(self.embed(batch.inputs), mask=ph.causal()))
        return x[batch.targets >= 0]

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch), batch.targets[batch.targets >= 0])


@torch.no_grad()
def prefix(model: Words, batch: Batch) -> float:
    """The prefix score of the best head of all layers."""
    x = batch.inputs
    before = F.pad(x, (1, 0), value=-1)[:, :-1]  # the symbol before every place
    targets = (before[:, None] == x[..., None]).tril()  # B L S: what follows an earlier one
    asked = batch.targets >= 0
    best = 0.0
    for one in maps_of(model, lambda: model(batch)):
        mass = (one * targets[:, None]).sum(-1).transpose(1, 2)[asked]
        best = max(best, float(mass.mean(0).max()))
    return best


def trained(layers: int, projection: type[Projection], seed: int) -> dict[str, float]:
    """What one model comes to, and when."""
    torch.manual_seed(seed)
    model = Words(layers, projection)
    looks: list[tuple[int, float, float]] = []
    held_out = TASK.batch("validation", 0, 32, 0)

    @torch.no_grad()
    def look(step: int) -> None:
        looks.append((step, prefix(model, held_out), float(model.loss(held_out))))

    def around(step: int, batch: Batch) -> nullcontext[None]:
        if step % EVERY == 0:
            look(step)
        return nullcontext()

    learn(model, TASK, RECIPE, seed, loss=model.loss, around=around)
    look(RECIPE.steps)
    half = math.log(TASK.outputs) / 2
    return {
        "accuracy": score(model, TASK, 64, 4),
        "prefix score": looks[-1][1],
        "heads at": float(next((n for n, heads, _ in looks if heads > 0.5), RECIPE.steps)),
        "loss at": float(next((n for n, _, loss in looks if loss < half), RECIPE.steps)),
    }


KINDS = {"one layer": (1, Projection), "two layers": (2, Projection), "smeared": (1, Smeared)}


def run(seed: int) -> dict[str, float]:
    """All kinds."""
    return {
        f"{kind}: {name}": value
        for kind, what in KINDS.items()
        for name, value in trained(*what, seed).items()
    }


if __name__ == "__main__":
    pairs = {f"{k}: heads - loss": (f"{k}: heads at", f"{k}: loss at") for k in ("two layers", "smeared")}
    pairs |= {
        f"{k} - one layer: accuracy": (f"{k}: accuracy", "one layer: accuracy")
        for k in ("two layers", "smeared")
    }
    main(__doc__, run, pairs)
