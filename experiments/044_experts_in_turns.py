"""A mixture of attentive experts trained in turns with its gate, on a task of two kinds of sequences.

A flag says whether twelve symbols are to be copied or written in reverse. Two layers of 4 heads, 400 steps:
plain heads; the mixture trained together with its gate; in turns, five epochs of ten steps to a cycle; and
with experts drawn evenly all the time, whose gates never learn. Accuracy of the symbols; then, of the gates
at the last token, their entropy and how much the expert of the greatest weight tells of the flag.

It shows what the paper says if training in turns is more accurate than plain heads and than the others.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from _shared import learn, main, score
from torch import Tensor

from polyhead.league import Batch, Recipe, Sizes, Task, plan
from polyhead.league.seeds import generator
from polyhead.nn.attentive_experts import AttentiveExperts, BlockCoordinates

SYMBOLS, COUNT = 16, 12
EPOCH = 10  # steps
MIXTURE = (
    "mixture_attentive_experts:hidden=32"  # a small gate, as the number of parameters is that of plain heads
)
SPECS = {
    "mha": "mha",
    "together": MIXTURE,
    "turns": MIXTURE,
    "even": MIXTURE,
}


class TwoKindsTask(Task):
    """Copy or reverse, by the first symbol."""

    name = "two_kinds"
    summary = "a sequence to be copied or written in reverse"
    sizes = Sizes(dim=64, heads=4, layers=2, mlp=128)
    recipe = Recipe(steps=400, batch=64, rate=3e-3)
    vocabulary = SYMBOLS + 3
    outputs = SYMBOLS
    length = 2 * COUNT + 1

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        symbols = torch.randint(SYMBOLS, (size, COUNT), generator=draw)
        flag = torch.randint(2, (size, 1), generator=draw)
        answer = torch.where(flag == 1, symbols.flip(1), symbols)
        whole = torch.cat([flag + SYMBOLS, symbols, torch.full((size, 1), SYMBOLS + 2), answer], 1)
        targets = whole[:, 1:].clone()
        targets[:, : COUNT + 1] = -100  # the symbols cannot be told, and the mark need not
        return Batch(whole[:, :-1], targets)


def run(seed: int) -> dict[str, float]:
    """Accuracy of each, and what the gates of mixtures say."""
    found = {}
    task = TwoKindsTask()
    for name, spec in SPECS.items():
        fitted = plan([spec], task).contenders[0]
        torch.manual_seed(seed)
        model = fitted.model(task)
        turns = None if name in ("mha", "together") else BlockCoordinates(model)

        def around(
            step: int, batch: Batch, turns: BlockCoordinates | None = turns, name: str = name
        ) -> AbstractContextManager[object]:
            if turns is None:
                return nullcontext()
            return turns.experts() if name == "even" else turns.epoch(step // EPOCH)

        learn(model, task, task.recipe, seed, loss=model.loss, around=around)
        model.eval()
        found[name] = score(model, task, 128, 8)
        if name not in ("mha", "even"):
            entropy, told = gates(model, task)
            found |= {f"{name}: entropy of gates": entropy, f"{name}: bits of the flag": told}
    return found


@torch.no_grad()
def gates(model: torch.nn.Module, task: Task) -> tuple[float, float]:
    """Mean entropy of the gates, and the most that a layer's greatest weight tells of the flag, in bits."""
    weights: dict[str, Tensor] = {}
    hooks = [
        layer.gate.register_forward_hook(lambda _, given, out, n=n: weights.update({n: out[:, -1]}))
        for n, layer in model.named_modules()
        if isinstance(layer, AttentiveExperts)
    ]
    batch = task.batch("validation", 0, 512, 0)
    model(batch)
    for hook in hooks:
        hook.remove()
    flag = batch.inputs[:, 0] - SYMBOLS
    entropies = [float(-(g * g.clamp(min=1e-12).log2()).sum(-1).mean()) for g in weights.values()]
    return sum(entropies) / len(entropies), max(mutual(g.argmax(-1), flag) for g in weights.values())


def mutual(a: Tensor, b: Tensor) -> float:
    """Mutual information of two labels, in bits."""
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    joint.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    even = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    here = joint > 0
    return float((joint[here] * (joint[here] / even[here]).log()).sum()) / math.log(2)


if __name__ == "__main__":
    main(__doc__, run, {f"turns - {other}": ("turns", other) for other in ("mha", "together", "even")})
