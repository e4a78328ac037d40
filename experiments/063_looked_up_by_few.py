"""Whether the mass that a choice of blocks misses tells what SmolLM2 can still look up in a text.

Scorers of blocks differ in what is averaged before queries meet keys. Each of them reads as many of the keys,
a fifth, matched on the text at hand. What is measured: the attention that is missed of 2,048 tokens of prose,
mean over queries and heads; the perplexity of the last 1,536 of them, % above that of the dense model; and
the loss of 1,024 tokens that are read a second time, which a model that looks them up has nearly for nothing.
A seed draws the texts.

    means                mean query of 128 and mean key of 64
    means of parts       means of 16 queries and of 16 keys, in blocks of 64 and 32
    mean query           mean query of 128 and every key, blocks of 8, alike for the heads of a group
    means and variance   means, and half of the variance of the scores of the keys: for keys that are normally
                         distributed the exact log of their summed powers
    means, flat capped   means, at most three tenths of the blocks for each block of queries
    few queries          one query of 16 by every second key, blocks of 256 and 32

It shows that missed mass does not tell if a scorer that misses less than another has the larger loss on what
is read again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Budget, Grid, Scorer, Selector, keep_mass
from polyhead.attend.selectors.scorers import Scores
from polyhead.heads import missed_mass
from polyhead.hf import load
from polyhead.sparsify.levels import listen, solve
from polyhead.sparsify.methods import Method
from polyhead.sparsify.reading import Case
from polyhead.tasks import held_out_text, sample_text

SHARE, CAP = 0.2, 0.3
LENGTH, FIRST = 2048, 512
ALWAYS = ph.sink(1) | ph.window(63)


class MeansAndVariance(Scorer):
    """q̄·k̄ + ½ Var_j(q̄·k_j), the variance of every feature of the keys of a block for itself."""

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Scores:
        blocks = F.pad(k, (0, 0, 0, -k.shape[2] % grid.cols)).unflatten(2, (-1, grid.cols))
        means, spread = blocks.mean(3), blocks.var(3, correction=0)

        def scores(start: int, stop: int) -> Tensor:
            asked = grid.mean_queries(q, start, stop) * grid.scale
            return grid.products(asked, means) + grid.products(asked.square(), spread) / 2

        return scores


class Capped(Budget):
    """What the rule keeps, if it is among the best so many of a row."""

    rule: Budget
    most: Budget

    def kept(self, scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        return self.rule.kept(scores, visible, forced) & self.most.kept(scores, visible, forced)


def ranked(scorer: Scorer, rows: int, cols: int, cap: float | None = None) -> Method:
    """A method with the budget of mass that is its level."""

    def make(level: float, case: Case) -> Selector:
        budget = keep_mass(level) if cap is None else Capped(keep_mass(level), ph.keep_share(cap))
        return ph.select(scorer, budget, rows=rows, cols=cols, always=ALWAYS)

    return Method("", "", "", make)


METHODS = {
    "means": ranked(ph.mean_keys(), 128, 64),
    "means of parts": ranked(ph.mean_mass(16, 16), 64, 32),
    "mean query": ranked(ph.shared(ph.mean_mass(128, 1), by="max"), 128, 8),
    "means and variance": ranked(MeansAndVariance(), 128, 64),
    "means, flat capped": ranked(ph.mean_keys(), 128, 64, CAP),
    "few queries": ranked(ph.sampled_mass(16, keys=2, power=2), 256, 32),
}


@torch.no_grad()
def nats(ids: Tensor, first: int) -> float:
    """Mean loss of the tokens from `first` on."""
    logits = MODEL(ids[None], use_cache=False).logits[0, first - 1 : -1]
    return float(F.cross_entropy(logits.float(), ids[first:]))


def run(seed: int) -> dict[str, float]:
    """One text of prose, and the one behind it twice."""
    start = seed * 3 * LENGTH // 2
    prose, once = IDS[start : start + LENGTH], IDS[start + LENGTH : start + 3 * LENGTH // 2]
    again = torch.cat([once, once])
    dense = nats(prose, FIRST), nats(again, len(once))
    found = {"dense: read again": dense[1], "dense: read once": nats(once, 1)}
    heard = listen(MODEL, prose)
    for name, method in METHODS.items():
        level, read = solve(method, SHARE, heard)
        selector = method.make(level, Case.of(MODEL, LENGTH))
        missed = missed_mass(MODEL, None, prose[None], select=selector).mass.flat
        with ph.sparse(MODEL, selector):
            lost = nats(prose, FIRST), nats(again, len(once))
        found[f"{name}: % of keys"] = 100 * read
        found[f"{name}: % missed"] = 100 * float(missed.mean())
        found[f"{name}: perplexity, % above"] = 100 * math.expm1(lost[0] - dense[0])
        found[f"{name}: read again"] = lost[1]
    return found


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    MODEL.requires_grad_(False)
    TEXT = sample_text() + held_out_text()
    IDS = torch.tensor(TOKENIZER(TEXT, verbose=False)["input_ids"])
    main(
        __doc__,
        run,
        {
            f"{name} less {other}: {what}": (f"{name}: {what}", f"{other}: {what}")
            for other in ("means", "means of parts")
            for name in METHODS
            if name != other
            for what in ("% missed", "read again")
        },
    )
