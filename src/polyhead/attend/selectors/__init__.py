"""Selectors: which blocks of keys are worth reading, decided from the content.

    selector = block scorer × budget rule

A scorer gives every (head, block of queries, block of keys) a value, a budget keeps the best. The choice is a
mask (`chosen`), so that all that takes masks takes it: `attend(q, k, v, mask=causal(), select=...)` runs it
exactly, reading only what was chosen.
"""

from polyhead.attend.selectors.budgets import (
    Budget,
    KeepAbove,
    KeepBlocks,
    KeepMass,
    KeepShare,
    KeepTotal,
    keep_above,
    keep_blocks,
    keep_mass,
    keep_share,
    keep_total,
)
from polyhead.attend.selectors.fixed import Fixed, a_shape, fixed
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.guard import Guarded, Selections, guarded, selections
from polyhead.attend.selectors.prism import BandMeans, band_means, prism
from polyhead.attend.selectors.proxy_attn import (
    KeepLastMass,
    ProxyHeads,
    keep_last_mass,
    proxy_attn,
    proxy_heads,
)
from polyhead.attend.selectors.qada import (
    ExactFar,
    FarMass,
    KeyGaussian,
    NearGaussian,
    NearOrAll,
    qada,
)
from polyhead.attend.selectors.scorers import (
    KeyBounds,
    MeanKeys,
    SampledMass,
    Scorer,
    Shared,
    key_bounds,
    mean_keys,
    sampled_mass,
    shared,
)
from polyhead.attend.selectors.selector import Either, Ranked, Selector, choose, select
from polyhead.attend.selectors.spans import Spans, spans
from polyhead.attend.selectors.vertical_slash import VerticalSlash, vertical_slash

__all__ = [
    "BandMeans",
    "Budget",
    "Either",
    "ExactFar",
    "FarMass",
    "Fixed",
    "Grid",
    "Guarded",
    "KeepAbove",
    "KeepBlocks",
    "KeepLastMass",
    "KeepMass",
    "KeepShare",
    "KeepTotal",
    "KeyBounds",
    "KeyGaussian",
    "MeanKeys",
    "NearGaussian",
    "NearOrAll",
    "ProxyHeads",
    "Ranked",
    "SampledMass",
    "Scorer",
    "Selections",
    "Selector",
    "Shared",
    "Spans",
    "VerticalSlash",
    "a_shape",
    "band_means",
    "choose",
    "fixed",
    "guarded",
    "keep_above",
    "keep_blocks",
    "keep_last_mass",
    "keep_mass",
    "keep_share",
    "keep_total",
    "key_bounds",
    "mean_keys",
    "prism",
    "proxy_attn",
    "proxy_heads",
    "qada",
    "sampled_mass",
    "select",
    "selections",
    "shared",
    "spans",
    "vertical_slash",
]
