"""Looking at heads: measure every head of a pretrained model, in O(length) memory."""

import polyhead.heads.measurements  # noqa: F401  (makes the measurements known)
from polyhead.heads.measurement import MEASUREMENTS, Gauge, Measurement, RowMean, register
from polyhead.heads.pictures import Lookups, Pictures
from polyhead.heads.profile import Profile, profile
from polyhead.heads.rows import Rows, View
from polyhead.heads.watch import Watcher, measure, watch

__all__ = [
    "MEASUREMENTS",
    "Gauge",
    "Lookups",
    "Measurement",
    "Pictures",
    "Profile",
    "RowMean",
    "Rows",
    "View",
    "Watcher",
    "measure",
    "profile",
    "register",
    "watch",
]
