"""Ways to cut a text into chunks for DHSA, and how much is read."""

from __future__ import annotations

from collections.abc import Mapping

import polyhead as ph
from polyhead.attend.selectors import Chunks

LENGTH, ROWS = 1000, 32
BUDGETS = (120, 250, 500)


def arms() -> Mapping[str, tuple[Chunks, str]]:
    """Every way by its name."""
    own = ph.attention_chunks(16)
    return {
        "even": (ph.even_chunks(16), "mean"),
        "attention": (own, "mean"),
        "attention, √": (own, "sqrt"),
        "attention, max": (own, "max"),
    }
