"""What a comparison of selectors is made under: results under other settings do not compare."""

from __future__ import annotations

from polyhead.checks import number, whole
from polyhead.description import Part
from polyhead.errors import ConfigError
from polyhead.report.facts import STOCK
from polyhead.sparsify.methods import find, key

__all__ = ["LENGTHS", "QUICK", "SHARES", "Settings"]

LENGTHS = (1024, 2048, 4096, 8192)
SHARES = (0.1, 0.25)
ROOM = 96  # tokens that are left for a question and its answer
UNSEEN = 128  # tokens at the end of a text that hold no fact


class Settings(Part):
    """What is tried, and how much of it.

    Attributes:
        model: as `polyhead.hf.load` takes it.
        methods: names, or files that define one, as `methods.find` takes them.
        shares: of the keys that may be seen, how many are read, above 0 and below 1: at the longest length,
            in the mean over queries, heads and layers.
        lengths: tokens of the texts with hidden facts.
        facts: facts in a text, at as many depths.
        texts: texts of a length, of each kind: facts unlike each other, and alike but for the name.
        missed: tokens over which the missed mass is measured, at most the longest length.
        steps: decoding steps that are timed.
        rounds: how often each method is timed, in turn with the others; 0: never.
        seed: draws facts and depths.
    """

    model: str
    methods: tuple[str, ...]
    shares: tuple[float, ...] = SHARES
    lengths: tuple[int, ...] = LENGTHS
    facts: int = 8
    texts: int = 1
    missed: int = 4096
    steps: int = 16
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("methods", "shares", "lengths"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value or len(set(value)) < len(value):
                raise ConfigError(f"{name} must be some values, each once; got {value}")
        for method in self.methods:
            find(method)
        if len({key(method) for method in self.methods}) < len(self.methods):
            raise ConfigError(
                f"methods must be some values, each once; two files of {self.methods} are the same"
            )
        for share in self.shares:
            if number("shares", share, above=0, most=1) == 1:
                raise ConfigError("shares must be below 1: all keys are read by the model as it is")
        least = ROOM + UNSEEN + 40 * whole("facts", self.facts, 1, len(STOCK.kinds))
        for length in self.lengths:
            if whole("lengths", length, 1) < least:
                raise ConfigError(
                    f"lengths must be at least {least}, to hide {self.facts} facts in; got {length}"
                )
        object.__setattr__(self, "lengths", tuple(sorted(self.lengths)))
        for name, lowest in (("texts", 1), ("missed", 2), ("steps", 1), ("rounds", 0)):
            whole(name, getattr(self, name), lowest)

    @property
    def longest(self) -> int:
        """The longest length: where shares are matched, perplexity is measured and times are taken."""
        return self.lengths[-1]


QUICK = {"shares": (0.25,), "lengths": (512, 1024), "facts": 4, "missed": 512, "steps": 4, "rounds": 1}
"""A much reduced run, to see that everything works."""
