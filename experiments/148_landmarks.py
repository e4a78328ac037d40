"""Which blocks the landmarks name: recall from sixteen blocks with all, a few or random ones of them read.

The small check of paper 148. A token is a pair of a key and a value, drawn together; eight of them and a
landmark are a block. After sixteen blocks come three of keys alone, whose values are asked for.
Two layers of landmark attention with two heads and rotary positions learn with all blocks read. Then every
query reads the one, two or four blocks with the best landmarks, or as many at random, and of sixty-four
blocks the best four, where they stand and with `reach`, which moves far blocks to positions known from
training. Accuracies, and how often the best landmark of a head of the last layer is the asked block's.

It shows if four blocks answer within 0.02 of all, more than four at random by 0.1, and if `reach` answers
more of the long texts than true positions do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from _shared import main
from _training import train
from torch import Tensor, nn

import polyhead as ph
from polyhead.league import Recipe
from polyhead.league.seeds import generator
from polyhead.nn import landmarks

DIM, SIZE, BLOCKS, LONG = 64, 9, 16, 64
PAIRS = SIZE - 1  # of a block
ASKED = 3 * PAIRS
KEYS, VALUES = LONG * PAIRS, 16
RECIPE = Recipe(steps=900, batch=24, rate=3e-3)


def questions(
    split: str, number: int, seed: int, count: int, blocks: int = BLOCKS
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, n), and the place of every asked pair (B, 24); KEYS and VALUES stand for none."""
    draw = generator("pairs in blocks", split, number, seed)
    keys = torch.stack([torch.randperm(KEYS, generator=draw)[: blocks * PAIRS] for _ in range(count)])
    values = torch.randint(VALUES, keys.shape, generator=draw)
    asked = torch.stack([torch.randperm(blocks * PAIRS, generator=draw)[:ASKED] for _ in range(count)])
    keys = torch.cat([keys, keys.gather(1, asked)], 1)
    values = torch.cat([values, torch.full_like(asked, VALUES)], 1)
    return keys, values, asked


class Recall(nn.Module):
    """Two layers of landmark attention over pairs."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(KEYS + 1, DIM), nn.Embedding(VALUES + 1, DIM)
        layers = [
            ph.build(
                "landmark_attention", dim=DIM, heads=2, block_size=SIZE, position=ph.nn.rope(), **options
            )
            for _ in range(2)
        ]
        self.stack = ph.nn.AttentionStack(layers, DIM, mlp=2 * DIM)
        self.read = nn.Linear(DIM, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Values (B, 24, 16) of the keys that stand last."""
        keys = landmarks.insert_landmarks(keys, SIZE, KEYS)
        values = landmarks.insert_landmarks(values, SIZE, VALUES)
        x = self.stack(self.key(keys) + self.value(values), mask=ph.causal())
        return self.read(landmarks.without_landmarks(x, SIZE)[:, -ASKED:])


@contextmanager
def instead(best: object) -> Iterator[None]:
    """Another choice of blocks."""
    kept = landmarks._best
    landmarks._best = best  # type: ignore[assignment]
    try:
        yield
    finally:
        landmarks._best = kept


def at_random(gates: Tensor, count: int) -> Tensor:
    """Any of the blocks that may be read."""
    return torch.rand_like(gates).masked_fill(gates == -torch.inf, -1.0).topk(count, dim=-1).indices


def accuracy(model: Recall, blocks: int = BLOCKS, **options: int) -> tuple[float, float]:
    """Of answers with other options, and of the best landmark of either head of the last layer."""
    other = Recall(**options)
    other.load_state_dict(model.state_dict())
    other.eval()
    keys, values, asked = questions("test", 0, 0, 96 if blocks == BLOCKS else 32, blocks)
    calls: list[Tensor] = []
    choose = landmarks._best

    def noted(gates: Tensor, count: int) -> Tensor:
        calls.append(choose(gates, count))
        return calls[-1]

    with torch.no_grad(), instead(noted):
        said = other(keys, values).argmax(-1)
    hit = float("nan")
    if calls:
        length = keys.shape[1] + keys.shape[1] // PAIRS
        last = (~landmarks.is_landmark(length, SIZE)).nonzero()[-ASKED:, 0] - length
        best = calls[-1][..., 0].flatten(1, 2)[..., last]  # B H n; a call is a strip, the latest has the last
        hit = float((best == (asked // PAIRS)[:, None]).any(1).float().mean())
    return float((said == values.gather(1, asked)).float().mean()), hit


def run(seed: int) -> dict[str, float]:
    """Train once, and read more or fewer blocks."""
    torch.manual_seed(seed)
    model = Recall()

    def loss(number: int) -> Tensor:
        keys, values, asked = questions("train", number, seed, RECIPE.batch)
        return F.cross_entropy(model(keys, values).flatten(0, 1), values.gather(1, asked).flatten())

    train(model, loss, RECIPE, seed)
    numbers = {"all blocks": accuracy(model)[0]}
    for count in (1, 2, 4):
        numbers[f"best {count}"], hit = accuracy(model, top_k=count)
        with instead(at_random):
            numbers[f"random {count}"] = accuracy(model, top_k=count)[0]
        if count == 4:
            numbers["the best landmark of a head is that of the asked block"] = hit
    numbers["long, all blocks"] = accuracy(model, LONG)[0]
    numbers["long, best 4"] = accuracy(model, LONG, top_k=4)[0]
    numbers["long, best 4, reach"] = accuracy(model, LONG, top_k=4, reach=BLOCKS + 1)[0]
    return numbers


if __name__ == "__main__":
    pairs = {
        "best 4 less all": ("best 4", "all blocks"),
        "best 4 less random 4": ("best 4", "random 4"),
        "long, reach less true positions": ("long, best 4, reach", "long, best 4"),
    }
    main(__doc__, run, pairs)
