"""Head scores: one number per (layer, head), with a name.

Every measurement of heads returns `HeadScores`; everything that acts on heads (caches, pruning, steering,
reports) takes them, or the `Heads` chosen from them:

    scores = profile["retrieval"]
    scores[3, 0]                        # layer 3, head 0
    best = scores.top(0.2)              # Heads: the best fifth, best first
    cautious = scores.top(20) - profile["sink"].above(0.5)
    both = (scores + profile["induction"]) / 2
"""

from polyhead.head_scores.heads import Heads
from polyhead.head_scores.scores import HeadScores

__all__ = ["HeadScores", "Heads"]
