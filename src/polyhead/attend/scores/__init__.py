"""Scores: what happens to the logit of a pair (i, j) before the normaliser.

A `Score` maps the logits of one tile, `scale * q·k` of shape `(B, H, r, c)`, to new logits of the same
shape. Several are applied in the order in which they are written: `score=(alibi(8), soft_cap(30.0))`.
Every one is differentiable, also with respect to the tensors that it holds.
"""

from polyhead.attend.scores.base import Chain, Score, chain
from polyhead.attend.scores.gathered import GatheredScore
from polyhead.attend.scores.grid import GridBias, grid_bias
from polyhead.attend.scores.neighborhood import NeighborhoodBias, neighborhood_bias
from polyhead.attend.scores.pointwise import (
    ScoreFunction,
    SoftCap,
    Temperature,
    score_function,
    soft_cap,
    temperature,
)
from polyhead.attend.scores.positional import (
    ALiBi,
    Positional,
    RelativeBias,
    T5Bias,
    alibi,
    alibi_slopes,
    relative_bias,
    t5_bias,
    t5_bucket,
)
from polyhead.attend.scores.taylor import LogTaylor, log_taylor
from polyhead.attend.scores.window import WindowBias, window_bias

__all__ = [
    "ALiBi",
    "Chain",
    "GatheredScore",
    "GridBias",
    "LogTaylor",
    "NeighborhoodBias",
    "Positional",
    "RelativeBias",
    "Score",
    "ScoreFunction",
    "SoftCap",
    "T5Bias",
    "Temperature",
    "WindowBias",
    "alibi",
    "alibi_slopes",
    "chain",
    "grid_bias",
    "log_taylor",
    "neighborhood_bias",
    "relative_bias",
    "score_function",
    "soft_cap",
    "t5_bias",
    "t5_bucket",
    "temperature",
    "window_bias",
]
