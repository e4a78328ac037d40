"""Writing while reading: does monotonic attention give up delay before it gives up accuracy?

The second small check of paper 133. The source is six symbols, none like the one before it, each said one to
four times; the target is each of them once, then the end. Whoever has read the first of a run can write it. A
source layer of causal attention, a target layer of causal attention and monotonic attention with two heads,
an MLP. The loss of lagging is weighted by 0 to 0.3; once more with the variance of the delays at 0.1.

How many source symbols have been read when a target is written (mean of both heads; "least" is the mean place
of the first symbol of a run), the accuracy of each target with the ones before it given, and the variance of
the delays.

It shows if the delay falls with the weight while the accuracy stays within 0.01, and if the weight of the
variance lowers the variance.
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
from polyhead.nn.positions import Rope

DIM, SYMBOLS, RUNS, LONGEST = 48, 12, 6, 4
END, BEGIN, NOTHING = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2
LENGTH = RUNS * LONGEST + 1
RECIPE = Recipe(steps=500, batch=32, rate=3e-3)
ARMS = {f"lagging {w}": {"latency": w} for w in (0.0, 0.03, 0.1, 0.3)}
ARMS["lagging 0.1, variance 0.1"] = {"latency": 0.1, "variance": 0.1}


def questions(split: str, number: int, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sources (B, 25), targets (B, 7), and how much of the source is least to be read for each target."""
    draw = generator("runs of symbols", split, number, seed)
    steps = torch.randint(1, SYMBOLS, (count, RUNS), generator=draw)
    symbols = steps.cumsum(1) % SYMBOLS  # never the same twice in a row
    times = torch.randint(1, LONGEST + 1, (count, RUNS), generator=draw)
    ends = times.cumsum(1)
    places = torch.arange(LENGTH).expand(count, -1)
    which = torch.searchsorted(ends, places.contiguous(), right=True)
    told = torch.cat([symbols, torch.tensor([[END, NOTHING]]).expand(count, -1)], 1)
    after = (places > ends[:, -1:]).long()
    source = told.gather(1, which + after)
    target = torch.cat([symbols, torch.full((count, 1), END)], 1)
    return source, target, torch.cat([ends - times, ends[:, -1:]], 1) + 1


class Writer(nn.Module):
    """A source layer, a target layer, monotonic attention and an MLP."""

    def __init__(self, **weights: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 3, DIM)
        self.source, self.target = (ph.build("mha", dim=DIM, heads=2, position=Rope()) for _ in range(2))
        self.reading = ph.build("emma", dim=DIM, heads=2, **weights)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(5))
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.read = nn.Linear(DIM, SYMBOLS + 1)

    def states(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The target's states, what they attend to, and which of it is real."""
        h = self.embed(source)
        h = h + self.source(self.norms[0](h), mask=ph.causal())
        x = self.embed(torch.cat([torch.full_like(target[:, :1], BEGIN), target[:, :-1]], 1))
        x = x + self.target(self.norms[1](x), mask=ph.causal())
        return x, self.norms[2](h), {"padding": source != NOTHING}

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, h, real = self.states(source, target)
        x = x + self.reading(self.norms[3](x), h, **real)
        return self.read(x + self.mlp(self.norms[4](x)))


def run(seed: int) -> dict[str, float]:
    """Train with every weight."""
    numbers: dict[str, float] = {}
    source, target, least = questions("test", 0, 0, 512)
    numbers["least that must be read"] = float(least.float().mean())
    for arm, weights in ARMS.items():
        torch.manual_seed(seed)
        model = Writer(**weights)

        def loss(number: int, model: Writer = model) -> Tensor:
            asked, wanted, _ = questions("train", number, seed, RECIPE.batch)
            found = F.cross_entropy(model(asked, wanted).flatten(0, 1), wanted.flatten())
            return found + sum(ph.auxiliary_losses(model).values(), torch.zeros(()))

        train(model, loss, RECIPE, seed)
        with torch.no_grad():
            right = (model(source, target).argmax(-1) == target).float()
            x, h, real = model.states(source, target)
            seen = model.reading.alignment(model.norms[3](x), h, **real)
        numbers |= {
            f"{arm}: accuracy": float(right.mean()),
            f"{arm}: read": float(seen.delays.mean()),
            f"{arm}: lagging": float(seen.lagging.mean()),
            f"{arm}: variance": float(seen.variances.mean()),
        }
    return numbers


if __name__ == "__main__":
    pairs = {
        f"{what}, {arm} less 0.0": (f"{arm}: {what}", f"lagging 0.0: {what}")
        for arm in list(ARMS)[1:4]
        for what in ("accuracy", "read")
    }
    both, one = "lagging 0.1, variance 0.1", "lagging 0.1"
    for what in ("accuracy", "read", "variance"):
        pairs[f"{what}, with variance less without"] = (f"{both}: {what}", f"{one}: {what}")
    main(__doc__, run, pairs)
