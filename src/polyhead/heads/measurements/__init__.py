"""The measurements of heads that there are; importing this makes them known to the registry."""

from polyhead.heads.measurements.output import OutputShare
from polyhead.heads.measurements.places import MeanDistance, NextToken, OwnToken, PreviousToken, WindowMass
from polyhead.heads.measurements.received import Concentration, FirstToken, FoundSinks, FutureInfluence
from polyhead.heads.measurements.repeats import DuplicateToken, Induction
from polyhead.heads.measurements.spread import Entropy, LargestLogit, NormalizedEntropy

__all__ = [
    "Concentration",
    "DuplicateToken",
    "Entropy",
    "FirstToken",
    "FoundSinks",
    "FutureInfluence",
    "Induction",
    "LargestLogit",
    "MeanDistance",
    "NextToken",
    "NormalizedEntropy",
    "OutputShare",
    "OwnToken",
    "PreviousToken",
    "WindowMass",
]
