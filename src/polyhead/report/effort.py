"""How much the main job tries: sizes, numbers of texts and facts, lengths, tolerances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from polyhead.errors import ConfigError

__all__ = ["FRACTIONS", "QUICK", "Effort", "shares", "sizes", "steps"]

FRACTIONS = (0.9, 0.75, 0.5, 0.33, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0)
"""Shares of KV heads that are tried, besides all of them."""


@dataclass(frozen=True)
class Effort:
    """How much is tried. The defaults take a model of 135 M parameters some minutes on two cores.

    Attributes:
        fractions: shares of KV heads that keep the whole context.
        alone_fractions: those of them at which heads chosen by retrieval alone are tried too.
        random_fractions: those of them at which random choices are tried too.
        seeds: seeds of the random choices; the first one also draws facts.
        sink, window: what the other heads keep.
        length: tokens of a text with hidden facts.
        facts: facts in one text.
        choosing_texts: texts, with facts of their own, that heads are chosen by.
        texts: texts of the curve.
        confirm_texts: texts that the recommendation is confirmed on, and as many again that it is told by.
        random_texts: how many of these texts random choices are tried on, the first ones.
        scored: tokens of the text whose perplexity is measured.
        lengths: context lengths whose cache bytes are told.
        decode_length: context length at which decoding is timed.
        decode_rounds: how often each cache is timed, in turn.
        tolerance: by which share perplexity may rise.
        losses: share of the facts found with the whole cache that may be lost.
    """

    fractions: tuple[float, ...] = FRACTIONS
    alone_fractions: tuple[float, ...] = (0.5, 0.33, 0.2)
    random_fractions: tuple[float, ...] = (0.5, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)
    sink: int = 4
    window: int = 256
    length: int = 2048
    facts: int = 8
    choosing_texts: int = 3
    texts: int = 4
    confirm_texts: int = 6
    random_texts: int = 1
    scored: int = 1024
    lengths: tuple[int, ...] = (2048, 8192)
    decode_length: int = 8192
    decode_rounds: int = 3
    tolerance: float = 0.05
    losses: float = 0.05

    def __post_init__(self) -> None:
        for f in self.fractions:
            if not 0 <= f <= 1:
                raise ConfigError(f"fractions must lie in 0..1, got {f}")
        if not self.fractions or not self.seeds:
            raise ConfigError("fractions and seeds must hold at least one value each")
        if not 0 <= self.losses < 1:
            raise ConfigError(
                f"losses must be a share of the facts from 0 to below 1, such as 0.05; got {self.losses}"
            )
        if self.sink < 0 or self.window < 1:
            raise ConfigError(
                f"sink must be at least 0 and window at least 1, got {self.sink} and {self.window}"
            )

    def fitting(self, context: int | None) -> Effort:
        """The same for a model that reads no more than `context` tokens."""
        if context is None:
            return self
        spare = 80  # for the question and the answer
        return replace(
            self,
            length=min(self.length, context - spare),
            scored=min(self.scored, context),
            lengths=tuple(n for n in self.lengths if n <= context) or (context,),
            decode_length=min(self.decode_length, context - 16),
        )


QUICK = Effort(
    fractions=(0.5, 0.2, 0.0),
    alone_fractions=(0.2,),
    random_fractions=(0.2,),
    seeds=(0,),
    length=640,
    facts=4,
    choosing_texts=1,
    texts=1,
    confirm_texts=1,
    scored=384,
    decode_length=2048,
    decode_rounds=1,
)
"""Enough to see that everything runs; too little to believe the numbers."""


def sizes(effort: Effort, total: int) -> list[int]:
    """The numbers of KV heads that are tried, from many to none, each once; not all of them."""
    return sorted({round(f * total) for f in effort.fractions} - {total}, reverse=True)


def shares(fractions: Iterable[float], total: int) -> list[int]:
    """The numbers of KV heads that other choices are tried at, from many to few; neither all nor none."""
    return sorted({round(f * total) for f in fractions} - {0, total}, reverse=True)


def steps(effort: Effort, total: int) -> int:
    """How often `advance` is called at most, for a progress bar."""
    tried = len(sizes(effort, total))
    alone = len(shares(effort.alone_fractions, total))
    drawn, seeds = len(effort.random_fractions) * len(effort.seeds), len(effort.seeds)
    curve = (tried + alone + 1) * (effort.texts + 1) + drawn * (effort.random_texts + 1)
    confirm = (tried + 3) * effort.confirm_texts + 2 + seeds * effort.random_texts
    return curve + confirm + (tried + 2) * effort.decode_rounds
