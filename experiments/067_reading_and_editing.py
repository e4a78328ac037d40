"""What changed between two pictures: does a bottleneck's map say it, and does editing it change the answer?

The small check of paper 067. Two canvases of 16 × 16 pixels show the same four digits in four cells, with
noise of their own; in every second question one digit of the second canvas is another one. The answer is "no
change" or the new digit. A token holds 4 × 4 pixels of both canvases at one place, and one more token reads:
two layers of plain attention, then either a bottleneck (one head, gated, no residual) or the same head
without the gate and with a residual; an MLP, and a read-out of the first token.

Of the mass that the first token puts on patches: how well it tells changed from unchanged (area under the
curve), and its share on the four patches of the changed cell. Then the map is edited: zeros for changed pairs
("no change" is then answered how often?), and all mass on the changed cell where the answer was wrong (how
often is it mended?).

It shows if the bottleneck answers as well as the other layer within 0.02, its mass tells changes (above 0.9),
zeros silence it, and edits mend some of the wrong answers.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from _shared import main
from _training import train
from sklearn.datasets import load_digits
from torch import Tensor, nn

import polyhead as ph
from polyhead.league import Recipe
from polyhead.league.seeds import generator

DIM, NOISE = 64, 0.3
SAME = 10  # the answer "no change"
HELD_OUT = 360
RECIPE = Recipe(steps=800, batch=64, rate=2e-3, decay=0.05)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pictures (1797, 8, 8) in [-1, 1] and their digits, in an order drawn once."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=generator("order of digits"))
    return torch.tensor(raw.images, dtype=torch.float32)[order] / 8 - 1, torch.tensor(raw.target)[order]


def questions(split: str, number: int, seed: int, count: int = RECIPE.batch) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of both canvases (B, 16, 32), answers, and the cell (of four) that is changed or would be."""
    draw = generator("pictures with changes", split, number, seed)
    pictures, labels = digits()
    first, last = (HELD_OUT, len(labels)) if split == "train" else (0, HELD_OUT)
    cells = torch.randint(first, last, (count, 4), generator=draw)
    cell = torch.randint(4, (count,), generator=draw)
    changed = torch.rand(count, generator=draw) < 0.5
    other = torch.randint(first, last, (count, 64), generator=draw)
    differs = labels[other] != labels[cells.gather(1, cell[:, None])]
    new = other.gather(1, differs.int().argmax(-1, keepdim=True))  # the first that is another digit
    after = torch.where(changed[:, None], cells.scatter(1, cell[:, None], new), cells)

    def canvas(of: Tensor) -> Tensor:
        whole = pictures[of].unflatten(1, (2, 2)).transpose(2, 3).reshape(count, 16, 16)
        return whole + NOISE * torch.randn(whole.shape, generator=draw)

    def patches(of: Tensor) -> Tensor:
        return canvas(of).unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).flatten(1, 2)

    answer = torch.where(changed, labels[new[:, 0]], SAME)
    return torch.cat([patches(cells), patches(after)], -1), answer, cell


def of_cell(cell: Tensor) -> Tensor:
    """Which of the 16 patches lie in a cell, bool (B, 16)."""
    rows, columns = torch.arange(16) // 8, torch.arange(16) % 4 // 2
    return 2 * rows + columns == cell[:, None]


class Reader(nn.Module):
    """Two layers of plain attention, one that the first token reads by, and an MLP."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(32, DIM), nn.Parameter(torch.zeros(1, 1, DIM))
        self.places = nn.Parameter(torch.randn(17, DIM) * DIM**-0.5)
        plain = [ph.build("mha", dim=DIM, heads=4) for _ in range(2)]
        self.stack = ph.nn.AttentionStack(plain, DIM, mlp=2 * DIM)
        self.norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.last = ph.build("attention_bottleneck", dim=DIM, heads=1, gate=gate)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.read = nn.Linear(DIM, 11)
        self.gate = gate

    def before(self, pictures: Tensor) -> Tensor:
        """What the last layer is given, before its norm."""
        x = torch.cat([self.first.expand(len(pictures), -1, -1), self.embed(pictures)], 1)
        return self.stack(x + self.places)

    def forward(self, pictures: Tensor, weights: Tensor | None = None) -> Tensor:
        """Answers; `weights` (B, 17) in the place of those of the first token."""
        x = self.before(pictures)
        seen = self.norm(x)
        y = self.last(seen) if weights is None else self.last.edited(seen, weights=weights[:, None])
        z = (y if self.gate else x + y)[:, 0]
        return self.read(z + self.mlp(self.mlp_norm(z)))

    def row(self, pictures: Tensor) -> Tensor:
        """Effective weights of the first token (B, 17)."""
        return self.last.first_row(self.norm(self.before(pictures))).effective[:, 0]


def area(scores: Tensor, positive: Tensor) -> float:
    """How often a positive scores more than a negative, ties by halves."""
    one, other = scores[positive][:, None], scores[~positive]
    return float(((one > other).float() + 0.5 * (one == other).float()).mean())


def run(seed: int) -> dict[str, float]:
    """Train with a bottleneck and with a plain layer, read and edit both."""
    numbers: dict[str, float] = {}
    pictures, answers, cell = questions("test", 0, 0, 1024)
    changed, inside = answers != SAME, of_cell(cell).float()
    for arm, gate in (("bottleneck", True), ("plain", False)):
        torch.manual_seed(seed)
        model = Reader(gate)

        def loss(number: int, model: Reader = model) -> Tensor:
            found, wanted, _ = questions("train", number, seed)
            return F.cross_entropy(model(found), wanted)

        train(model, loss, RECIPE, seed)
        with torch.no_grad():
            said, row = model(pictures).argmax(-1), model.row(pictures)
            mass = row[:, 1:].sum(-1)
            silent = model(pictures, torch.zeros_like(row)).argmax(-1)
            moved = torch.cat([torch.zeros(len(row), 1), inside / 4], 1)
            edited = model(pictures, moved).argmax(-1)
        wrong = changed & (said != answers)
        numbers |= {
            f"{arm}, accuracy": float((said == answers).float().mean()),
            f"{arm}, accuracy where nothing changed": float((said == answers)[~changed].float().mean()),
            f"{arm}, area under the curve of the mass": area(mass, changed),
            f"{arm}, share on the changed cell": float(
                ((row[:, 1:] * inside).sum(-1) / mass.clamp(min=1e-9))[changed].mean()
            ),
            f"{arm}, zeros answer no change": float((silent == SAME)[changed].float().mean()),
            f"{arm}, wrong answers of changed pairs": float(wrong.sum() / changed.sum()),
            f"{arm}, wrong answers mended": float((edited == answers)[wrong].float().mean()),
            f"{arm}, right answers kept by the same edit": float(
                (edited == answers)[changed & ~wrong].float().mean()
            ),
        }
    return numbers


if __name__ == "__main__":
    main(__doc__, run, {"accuracy, bottleneck less plain": ("bottleneck, accuracy", "plain, accuracy")})
