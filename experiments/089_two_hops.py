"""Two hops of pointers: one layer of plain attention, one of second order, and two plain layers.

Sixteen tokens, each with a code of its own, the code of the token that it points to, and a symbol; asked is
the symbol two pointers away. Four heads of 16 and MLPs of 128; accuracy after 1,500 steps of 64 questions.
Two plain layers have twice the parameters of one.

It shows what the paper says if one plain layer fails, the layer of second order learns it, and two plain
layers do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _shared import main
from _training import train
from torch import Tensor, nn

import polyhead as ph
from polyhead.league import Recipe
from polyhead.league.seeds import generator

DIM, HEADS, NODES, SYMBOLS, CODE = 64, 4, 16, 8, 24
RECIPE = Recipe(steps=1500, batch=64, rate=2e-3)
CODES = F.normalize(torch.randn(NODES, CODE, generator=generator("two hops", "codes")), dim=-1) * CODE**0.5
KINDS = {"plain": ("mha", 1), "second order": ("nexus_higher_order", 1), "two layers": ("mha", 2)}


def questions(split: str, number: int, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, 2·24 + 8), and the symbols that are asked (B, N)."""
    draw = generator("two hops", split, number, seed)
    to = torch.rand(count, NODES, generator=draw).argsort(-1)
    symbols = torch.randint(SYMBOLS, (count, NODES), generator=draw)
    tokens = torch.cat([CODES.expand(count, -1, -1), CODES[to], F.one_hot(symbols, SYMBOLS).float()], dim=-1)
    return tokens, symbols.gather(1, to.gather(1, to))


class Pointers(nn.Module):
    """Tokens, layers, and a read-out at every token."""

    def __init__(self, name: str, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * CODE + SYMBOLS, DIM)
        made = [ph.build(name, dim=DIM, heads=HEADS) for _ in range(layers)]
        self.stack = ph.nn.AttentionStack(made, DIM, mlp=128, final_norm=True)
        self.read = nn.Linear(DIM, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, 8)."""
        return self.read(self.stack(self.embed(tokens)))


def run(seed: int) -> dict[str, float]:
    """Accuracy of every kind."""
    found = {}
    tokens, wanted = questions("validation", 0, 0, 512)
    for kind, (name, layers) in KINDS.items():
        torch.manual_seed(seed)
        model = Pointers(name, layers)

        def loss(step: int, model: Pointers = model) -> Tensor:
            x, y = questions("train", step, seed, RECIPE.batch)
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

        train(model, loss, RECIPE, "two hops", seed)
        with torch.no_grad():
            found[kind] = float((model(tokens).argmax(-1) == wanted).double().mean())
    return found


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            "second order - plain": ("second order", "plain"),
            "two layers - second order": ("two layers", "second order"),
        },
    )
