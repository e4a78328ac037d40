"""The naive twins: every mechanism as its equation, in plain float64 torch with loops.

A twin shares nothing with what it is the twin of. It is documentation, the oracle of the tests, and what a
kernel of one's own can be checked against: `reference("grouped_query")`.
"""

from polyhead.reference.registry import reference, references, twin

__all__ = ["reference", "references", "twin"]
