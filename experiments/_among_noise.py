"""Pairs of key and value among noise, and the keys again at the end: which value belongs to each?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polyhead as ph
from polyhead.league import Recipe
from polyhead.league.seeds import generator
from polyhead.nn.positions import Rope

DIM, PAIRS, LENGTH, NOISE, SYMBOLS = 64, 6, 64, 8, 12
FIRST_KEY, FIRST_VALUE = NOISE, NOISE + SYMBOLS
ASKED = LENGTH - 2 * PAIRS
RECIPE = Recipe(steps=500, batch=32, rate=3e-3)


def questions(split: str, number: int, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L), the last 2 PAIRS of them each key and its value again, and which are of pairs (B, L).

    The key of a pair is directly before its value, and between pairs there is noise, drawn anew.
    """
    draw = generator("pairs among noise", split, number, seed)
    tokens = torch.randint(NOISE, (count, LENGTH), generator=draw)
    order = torch.rand(count, SYMBOLS, generator=draw).argsort(1)[:, :PAIRS]
    keys, values = FIRST_KEY + order, FIRST_VALUE + torch.randint(SYMBOLS, (count, PAIRS), generator=draw)
    places = 2 * torch.rand(count, ASKED // 2, generator=draw).argsort(1)[:, :PAIRS]
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    mixed = torch.rand(count, PAIRS, generator=draw).argsort(1)
    tokens[:, ASKED::2], tokens[:, ASKED + 1 :: 2] = keys.gather(1, mixed), values.gather(1, mixed)
    return tokens, tokens >= NOISE


class Reader(nn.Module):
    """Two layers of attention and MLP over token embeddings."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        size = {"dim": DIM, "heads": 4, "position": Rope()}
        self.embed = nn.Embedding(NOISE + 2 * SYMBOLS, DIM)
        self.attention = nn.ModuleList(ph.build(name, **size | options) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(5))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2)
        )
        self.read = nn.Linear(DIM, SYMBOLS)

    def forward(self, tokens: Tensor, look: Callable[[int, Tensor], None] = lambda n, x: None) -> Tensor:
        """Scores of the values at every asked key, (B, PAIRS, SYMBOLS); `look` sees each layer's input."""
        x = self.embed(tokens)
        for n, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            inputs = self.norms[2 * n](x)
            look(n, inputs)
            x = x + attention(inputs, mask=ph.causal())
            x = x + mlp(self.norms[2 * n + 1](x))
        return self.read(self.norms[4](x[:, ASKED::2]))


def loss_of(model: Reader, tokens: Tensor) -> Tensor:
    """The cross-entropy of the answers, and what the layers lose beside them."""
    wanted = tokens[:, ASKED + 1 :: 2] - FIRST_VALUE
    found = F.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())
    return found + sum(ph.auxiliary_losses(model).values(), torch.zeros(()))


@torch.no_grad()
def accuracy(model: Reader, tokens: Tensor) -> float:
    """The share of right answers."""
    wanted = tokens[:, ASKED + 1 :: 2] - FIRST_VALUE
    return float((model(tokens).argmax(-1) == wanted).float().mean())
