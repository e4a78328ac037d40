"""Looking at heads: measure every head of a pretrained model, in O(length) memory."""

from polyhead.heads import measurements
from polyhead.heads.amplify import amplified
from polyhead.heads.budget import ErrorCurve, allocate_budget, allocate_greedily, error_curve
from polyhead.heads.chai import Saved, Sharing, clustered
from polyhead.heads.head_maps import HeadMaps, head_maps
from polyhead.heads.key_gaussians import key_gaussians
from polyhead.heads.measurement import MEASUREMENTS, Gauge, Measurement, RowMean, register
from polyhead.heads.missed import HeadsMissed, missed_mass
from polyhead.heads.output_errors import (
    HiddenDistance,
    LogitDivergence,
    OutputError,
    hidden_distance,
    logit_divergence,
)
from polyhead.heads.pictures import Lookups, Pictures
from polyhead.heads.profile import Profile, profile
from polyhead.heads.retrieval import CopyScores, copy_scores, retrieval_mass, retrieval_score
from polyhead.heads.roles import RoleRule, RoleRules, Roles
from polyhead.heads.rows import Rows, View
from polyhead.heads.sensitivity import head_sensitivities, head_sensitivity
from polyhead.heads.shares import shares
from polyhead.heads.watch import Watcher, measure, watch

__all__ = [
    "MEASUREMENTS",
    "CopyScores",
    "ErrorCurve",
    "Gauge",
    "HeadMaps",
    "HeadsMissed",
    "HiddenDistance",
    "LogitDivergence",
    "Lookups",
    "Measurement",
    "OutputError",
    "Pictures",
    "Profile",
    "RoleRule",
    "RoleRules",
    "Roles",
    "RowMean",
    "Rows",
    "Saved",
    "Sharing",
    "View",
    "Watcher",
    "allocate_budget",
    "allocate_greedily",
    "amplified",
    "clustered",
    "copy_scores",
    "error_curve",
    "head_maps",
    "head_sensitivities",
    "head_sensitivity",
    "hidden_distance",
    "key_gaussians",
    "logit_divergence",
    "measure",
    "measurements",
    "missed_mass",
    "profile",
    "register",
    "retrieval_mass",
    "retrieval_score",
    "shares",
    "watch",
]
