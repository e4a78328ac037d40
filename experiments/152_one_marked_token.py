"""One marked token, anywhere: does a search over square distances find it?

The small check of paper 152. One of 256 symbols carries a mark, at any distance; every token behind it is
asked which symbol that was. Two layers of two heads without positions, 300 steps of 8 texts. The last query
reads 81 keys or so: by superlinear attention with two spans, backwards only, and a window of 15; in a window;
in a smaller window and at every fourth key before it. And all keys.

Accuracy of the last token at the length of training, over all distances and for the worst of eight ranges of
distance, and at 1,024 tokens. How often a head of the second layer has the mark in its spans or its window,
the mean over heads and the best head; and how often it would have, were anchors drawn.

It shows if the search answers as well as all keys within 0.02, also in the worst range, and its best head
meets the mark more often than drawn anchors by 0.1.
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

DIM, SYMBOLS, LENGTH, LONG, RANGES = 64, 16, 256, 1024, 8
RECIPE = Recipe(steps=300, batch=8, rate=3e-3)
SEARCH = {"window_index": 3, "top_k": 2, "backward": 2.0, "forward": 0.0}
ARMS: dict[str, tuple[str, dict[str, object]]] = {
    "all keys": ("mha", {}),
    "superlinear": ("superlinear_attention", SEARCH),
    "window": ("mha", {"mask": ph.window(80)}),
    "every fourth": ("mha", {"mask": ph.window(15) | ph.strided(4)}),
}


def texts(split: str, number: int, seed: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Symbols (B, L), and the place of the mark (B,)."""
    draw = generator("one mark", split, number, seed)
    return (
        torch.randint(SYMBOLS, (count, length), generator=draw),
        torch.randint(length - 1, (count,), generator=draw),
    )


class Reader(nn.Module):
    """Two layers of attention over symbols."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.symbol, self.mark = nn.Embedding(SYMBOLS, DIM), nn.Parameter(torch.randn(DIM))
        self.attention = [ph.build(name, dim=DIM, heads=2, **options) for _ in range(2)]
        self.stack = ph.nn.AttentionStack(self.attention, DIM, mlp=2 * DIM)
        self.read = nn.Linear(DIM, SYMBOLS)

    def forward(self, symbols: Tensor, at: Tensor) -> Tensor:
        """Logits of the symbol that is marked, (B, L, 16)."""
        x = self.symbol(symbols)
        x = x + F.one_hot(at, symbols.shape[1])[..., None] * self.mark
        return self.read(self.stack(x, mask=ph.causal()))


def loss_of(model: Reader, symbols: Tensor, at: Tensor) -> Tensor:
    """Cross-entropy behind the mark."""
    behind = torch.arange(symbols.shape[1]) > at[:, None]
    wanted = symbols.gather(1, at[:, None]).expand_as(symbols)
    return F.cross_entropy(model(symbols, at)[behind], wanted[behind])


@torch.no_grad()
def right(model: Reader, symbols: Tensor, at: Tensor) -> Tensor:
    """Whether the last token answers right, (B,)."""
    parts = zip(symbols.split(32), at.split(32), strict=True)
    found = torch.cat([model(x, place)[:, -1].argmax(-1) for x, place in parts])
    return found == symbols.gather(1, at[:, None])[:, 0]


@torch.no_grad()
def hits(model: Reader, symbols: Tensor, at: Tensor) -> dict[str, float]:
    """How often the last token reads the mark in the second layer, by its search and by drawn anchors."""
    module, seen = model.attention[1], []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(symbols, at)
    hook.remove()
    x = seen[0]
    last = x.shape[1] - 1
    search = module._queries(x, 0)[:, :2, -1:].unflatten(1, (2, 1))
    k = module._rows(x, 0)[0]
    place = torch.tensor([[last]])
    chosen = module._routes(search, k, None, place, last, False)[0][:, :, 0, 0]  # B H k
    anchors = torch.tensor([last - back for back in module.rule.anchors(last)])
    drawn = anchors[torch.rand(*chosen.shape[:2], len(anchors)).argsort(-1)[..., : chosen.shape[-1]]]
    reach = int(module.rule.reach(module.rule.backward, torch.tensor(last + 1.0, dtype=torch.float64)))

    def rate(found: Tensor) -> Tensor:
        mark = at[:, None, None]
        inside = ((mark <= found) & (mark >= found - reach)).any(-1)
        return (inside | (at > last - module.rule.window)[:, None]).float().mean(0)

    return {
        "the mark is read, mean of heads": float(rate(chosen).mean()),
        "the mark is read, best head": float(rate(chosen).max()),
        "the mark is read, drawn anchors": float(rate(drawn).mean()),
    }


def run(seed: int) -> dict[str, float]:
    """Train every arm."""
    numbers: dict[str, float] = {}
    symbols, at = texts("test", 0, 0, 512, LENGTH)
    long, far = texts("test", 1, 0, 128, LONG)
    part = (LENGTH - 1 - at) * RANGES // LENGTH
    for arm, (name, options) in ARMS.items():
        torch.manual_seed(seed)
        model = Reader(name, **options)

        def loss(number: int, model: Reader = model) -> Tensor:
            return loss_of(model, *texts("train", number, seed, RECIPE.batch, LENGTH))

        train(model, loss, RECIPE, seed)
        own = right(model, symbols, at).float()
        numbers[f"{arm}: accuracy"] = float(own.mean())
        numbers[f"{arm}: worst range"] = min(float(own[part == n].mean()) for n in range(RANGES))
        numbers[f"{arm}: at 1,024 tokens"] = float(right(model, long, far).float().mean())
        if name == "superlinear_attention":
            numbers |= hits(model, symbols, at)
    return numbers


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            "superlinear less all keys": ("superlinear: accuracy", "all keys: accuracy"),
            "superlinear less window": ("superlinear: accuracy", "window: accuracy"),
            "worst range, superlinear less all keys": ("superlinear: worst range", "all keys: worst range"),
            "best head less drawn anchors": (
                "the mark is read, best head",
                "the mark is read, drawn anchors",
            ),
        },
        seeds=2,
    )
