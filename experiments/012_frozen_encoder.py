"""Gaussian adaptive attention as a pooling head on a frozen encoder, against means and attention.

Passages of 48 tokens from twelve chapters of the Python documentation, as all-MiniLM-L6-v2 leaves them in
its last layer; which chapter a passage is from is learned by a linear read-out of one vector: their mean; the
mean behind a normalisation of features; the mean of x and what 8 heads of self-attention add; the mean of
features that Gaussians weigh; or a sum over tokens that Gaussians weigh. 300 steps, the encoder stays as it
is. The last quarter of every chapter is asked.

It shows what the paper says if one of the Gaussian heads is more accurate than attention. Further: of 64
features of noise the first three hold the class; "planted" is how many of these are among the three with the
highest importance once the Gaussian head is trained.
"""

from __future__ import annotations

from functools import cache
from pydoc_data import topics

import torch
import torch.nn.functional as F
from _shared import main
from torch import Tensor, nn

import polyhead as ph
from polyhead.hf import load
from polyhead.nn.gaussian import GaussianHeads, gaussian_weights, importance_factor

CHAPTERS, TOKENS, STEPS = 12, 48, 300


@cache
def passages() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States `(N, 48, 384)` and chapters of passages to learn from, and of those to be asked about."""
    model, tokenizer = load("minilm")
    longest = sorted(topics.topics, key=lambda name: -len(topics.topics[name]))[:CHAPTERS]
    parts: tuple[list[Tensor], ...] = ([], [], [], [])
    for label, name in enumerate(longest):
        ids = tokenizer(topics.topics[name], return_tensors="pt", verbose=False).input_ids[0, 1:-1]
        rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)[:60]
        with torch.no_grad():
            states = model(input_ids=rows).last_hidden_state
        cut = len(rows) * 3 // 4
        for n, part in enumerate((states[:cut], states[cut:])):
            parts[2 * n].append(part)
            parts[2 * n + 1].append(torch.full((len(part),), label))
    x, y, asked, answers = map(torch.cat, parts)
    return x, y, asked, answers


class OverTime(nn.Module):
    """A sum over tokens, weighed for every feature by a Gaussian that all features share."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))
        self.spread = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return (gaussian_weights(x, self.offset, self.spread, dim=1) * x).sum(1)


class Residual(nn.Module):
    """The mean of x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)).mean(1)


class Mean(nn.Module):
    """The mean of f(x)."""

    def __init__(self, inner: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x).mean(1)


def heads(dim: int) -> dict[str, nn.Module]:
    """The heads of this experiment; features of a Gaussian head sum to about 1 and are scaled up to x."""
    return {
        "mean": Mean(nn.Identity()),
        "norm": Mean(nn.LayerNorm(dim)),
        "attention": Residual(ph.build("mha", dim=dim, heads=8)),
        "gaussian features": Mean(GaussianHeads(dim, 8, 1), dim / 8),
        "gaussian time": OverTime(),
    }


def accuracy(head: nn.Module, seed: int, x: Tensor, y: Tensor, asked: Tensor, answers: Tensor) -> float:
    """Of a head with a linear read-out, trained together."""
    model = nn.Sequential(head, nn.Linear(x.shape[-1], int(y.max()) + 1))
    steps = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (32,), generator=draw)
        steps.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        steps.step()
    with torch.no_grad():
        return float((model(asked).argmax(-1) == answers).float().mean())


def planted(seed: int) -> int:
    """How many of three features that hold the class have the highest importance in a trained head."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (2000,), generator=draw)
    x = torch.randn(2000, 1, 64, generator=draw)
    x[:, 0, :3] += 2 * torch.randn(4, 3, generator=draw)[y]
    head = GaussianHeads(64, 1, 1)
    accuracy(Mean(head, 64), seed, x, y, x, y)
    importance = importance_factor(head.weights(x).detach())
    return len(set(importance.topk(3).indices.tolist()) & {0, 1, 2})


def run(seed: int) -> dict[str, float]:
    """Accuracy of every head."""
    torch.manual_seed(seed)
    data = passages()
    found = {name: accuracy(head, seed, *data) for name, head in heads(data[0].shape[-1]).items()}
    return found | {"planted": float(planted(seed))}


if __name__ == "__main__":
    pairs = {
        f"{a} - {b}": (a, b)
        for a in ("gaussian features", "gaussian time")
        for b in ("mean", "norm", "attention")
    }
    main(__doc__, run, pairs, seeds=5)
