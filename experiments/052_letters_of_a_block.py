"""Multi-token attention on the toy task of its paper: which block holds two letters.

A sequence has five blocks of five letters, each closed by a full stop; then two letters are asked, of which
one block alone has both, and the answer is the first letter of that block. The convolution reaches over the
two letters and over a block. Two layers, 1,000 steps, with as many parameters as plain heads.

It shows what the paper says if multi-token attention makes far fewer mistakes than plain heads.
"""

from __future__ import annotations

import torch
from _shared import main

from polyhead.league import Batch, Recipe, Sizes, Task, plan
from polyhead.league.seeds import generator
from polyhead.league.training import train

LETTERS, BLOCKS, LONG = 26, 5, 5
FULL_STOP, QUESTION = LETTERS, LETTERS + 1


class LettersTask(Task):
    """Which block holds both letters; the letters asked are never the first one."""

    name = "letters"
    summary = "which block of letters holds two that are asked"
    sizes = Sizes(dim=64, heads=2, layers=2, mlp=128)
    recipe = Recipe(steps=1000, batch=32, rate=3e-3, looks=1)
    vocabulary = LETTERS + 2
    outputs = LETTERS
    length = BLOCKS * (LONG + 1) + 3

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        draw = generator(self.name, split, number, seed)
        blocks = torch.rand(4 * size, BLOCKS, LETTERS, generator=draw).argsort(-1)[..., :LONG]
        asked = torch.rand(4 * size, LONG - 1, generator=draw).argsort(-1)[:, :2] + 1
        pair = blocks[:, 0].gather(1, asked)  # the first block has it, and changes places below
        both = (blocks[..., None] == pair[:, None, None]).any(2).all(-1)
        alone = (both.sum(1) == 1).nonzero()[:size, 0]
        assert len(alone) == size
        order = torch.rand(size, BLOCKS, generator=draw).argsort(-1)
        shuffled = blocks[alone[:, None], order]
        closed = torch.cat([shuffled, torch.full((size, BLOCKS, 1), FULL_STOP)], -1).flatten(1)
        inputs = torch.cat([closed, torch.full((size, 1), QUESTION), pair[alone]], 1)
        targets = torch.full_like(inputs, -100)
        targets[:, -1] = blocks[alone, 0, 0]
        return Batch(inputs, targets)


CONTENDERS = {
    "mha": "mha",
    "multi_token": f"multi_token_attention:logit_kernel=(3, {2 * LONG - 1}),weight_kernel=None",
}


def run(seed: int) -> dict[str, float]:
    """Accuracy of each."""
    league = plan(list(CONTENDERS.values()), LettersTask())
    fitted = dict(zip(CONTENDERS, league.contenders, strict=True))
    return {
        name: train(league.rules.task, one, league.rules.recipe, seed).scores["validation"]
        for name, one in fitted.items()
    }


if __name__ == "__main__":
    main(__doc__, run, {"multi_token - mha": ("multi_token", "mha")})
