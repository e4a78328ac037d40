"""Tasks that show what a model, or a smaller cache, is able to do: needles in a haystack, perplexity."""

from polyhead.tasks.needle import HELD_OUT_NAMES, NAMES, NeedleCase, NeedleResult, NeedleScore, needle, score
from polyhead.tasks.perplexity import Perplexity, perplexity
from polyhead.tasks.texts import held_out_text, sample_text

__all__ = [
    "HELD_OUT_NAMES",
    "NAMES",
    "NeedleCase",
    "NeedleResult",
    "NeedleScore",
    "Perplexity",
    "held_out_text",
    "needle",
    "perplexity",
    "sample_text",
    "score",
]
