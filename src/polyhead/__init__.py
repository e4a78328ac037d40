"""Polyhead: multi-head attention, described once, run fast, looked into, changed and costed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# The operator shares its name with the package that it lives in: imported here, the function wins.
from polyhead.attend.across_heads import head_mix
from polyhead.attend.across_pairs import pair_convolution
from polyhead.attend.certificate import Missed, missed_mass
from polyhead.attend.function import attend, explain, observe
from polyhead.attend.masks import (
    Mask,
    blocks,
    causal,
    chosen,
    dilated,
    documents,
    halo,
    lattice,
    neighborhood,
    padding,
    per_head,
    prefix,
    shard,
    sink,
    strided,
    where,
    window,
)
from polyhead.attend.normalizers import Normalizer, entmax, sigmoid, softmax, sparsemax
from polyhead.attend.plan import Plan, strict
from polyhead.attend.scores import Score, alibi, relative_bias, score_function, soft_cap, t5_bias, temperature
from polyhead.attend.selectors import (
    Budget,
    ExactFar,
    KeyGaussian,
    NearGaussian,
    Scorer,
    Selector,
    a_shape,
    attention_chunks,
    band_means,
    boundary_loss,
    boundary_predictor,
    boundary_ratio,
    computed_indexer,
    dhsa,
    even_chunks,
    fixed,
    follow,
    gain_gate,
    grid_blocks,
    guarded,
    hisa,
    index_scores,
    indexer_loss,
    keep_above,
    keep_at_least,
    keep_blocks,
    keep_last_mass,
    keep_mass,
    keep_share,
    keep_similarity,
    keep_total,
    key_bounds,
    lead,
    learned_chunks,
    learned_indexer,
    less_is_more,
    low_rank_scores,
    mean_indexer,
    mean_keys,
    mean_mass,
    open_gate,
    prism,
    proxy_attn,
    proxy_heads,
    qada,
    rectified,
    region_routing,
    sampled_mass,
    select,
    selections,
    shared,
    spans,
    together,
    token_indexer,
    triangle_spans,
    unified_keys,
    vertical_slash,
    vmoba,
)
from polyhead.attend.simulate import Simulation, simulate
from polyhead.attend.tile import Tile
from polyhead.attend.tiles import Consumer
from polyhead.attend.top_k import top_k
from polyhead.attend.weight_maps import WeightMap
from polyhead.description import find_parts_with, from_json, to_json
from polyhead.errors import PolyheadError
from polyhead.head_scores import HeadScores
from polyhead.papers import papers
from polyhead.reference import reference

if TYPE_CHECKING:
    from polyhead import cache, heads, hf, league, nn, tasks
    from polyhead.heads import profile
    from polyhead.hf import attach, long_heads, sparse
    from polyhead.intensity import roofline
    from polyhead.league import compare
    from polyhead.mechanisms import build, build_stack, catalog, entry
    from polyhead.nn import auxiliary_losses, hyper_attention

__version__ = "0.1.0"

# What is imported at first use, so that `import polyhead` stays light: name -> where it lives.
_LAZY = {
    "attach": "polyhead.hf",
    "auxiliary_losses": "polyhead.nn",
    "build": "polyhead.mechanisms",
    "build_stack": "polyhead.mechanisms",
    "catalog": "polyhead.mechanisms",
    "compare": "polyhead.league",
    "entry": "polyhead.mechanisms",
    "hyper_attention": "polyhead.nn",
    "long_heads": "polyhead.hf",
    "profile": "polyhead.heads",
    "roofline": "polyhead.intensity",
    "sparse": "polyhead.hf",
}
_ROOMS = ("cache", "heads", "hf", "league", "nn", "tasks")

__all__ = [
    "Budget",
    "Consumer",
    "ExactFar",
    "HeadScores",
    "KeyGaussian",
    "Mask",
    "Missed",
    "NearGaussian",
    "Normalizer",
    "Plan",
    "PolyheadError",
    "Score",
    "Scorer",
    "Selector",
    "Simulation",
    "Tile",
    "WeightMap",
    "__version__",
    "a_shape",
    "alibi",
    "attach",
    "attend",
    "attention_chunks",
    "auxiliary_losses",
    "band_means",
    "blocks",
    "boundary_loss",
    "boundary_predictor",
    "boundary_ratio",
    "build",
    "build_stack",
    "cache",
    "catalog",
    "causal",
    "chosen",
    "compare",
    "computed_indexer",
    "dhsa",
    "dilated",
    "documents",
    "entmax",
    "entry",
    "even_chunks",
    "explain",
    "fixed",
    "follow",
    "from_json",
    "gain_gate",
    "grid_blocks",
    "guarded",
    "halo",
    "head_mix",
    "heads",
    "hf",
    "hisa",
    "hyper_attention",
    "index_scores",
    "indexer_loss",
    "keep_above",
    "keep_at_least",
    "keep_blocks",
    "keep_last_mass",
    "keep_mass",
    "keep_share",
    "keep_similarity",
    "keep_total",
    "key_bounds",
    "lattice",
    "lead",
    "league",
    "learned_chunks",
    "learned_indexer",
    "less_is_more",
    "long_heads",
    "low_rank_scores",
    "mean_indexer",
    "mean_keys",
    "mean_mass",
    "missed_mass",
    "neighborhood",
    "nn",
    "observe",
    "open_gate",
    "padding",
    "pair_convolution",
    "papers",
    "per_head",
    "prefix",
    "prism",
    "profile",
    "proxy_attn",
    "proxy_heads",
    "qada",
    "rectified",
    "reference",
    "region_routing",
    "relative_bias",
    "roofline",
    "sampled_mass",
    "score_function",
    "select",
    "selections",
    "shard",
    "shared",
    "sigmoid",
    "simulate",
    "sink",
    "soft_cap",
    "softmax",
    "spans",
    "sparse",
    "sparsemax",
    "strict",
    "strided",
    "t5_bias",
    "tasks",
    "temperature",
    "to_json",
    "together",
    "token_indexer",
    "top_k",
    "triangle_spans",
    "unified_keys",
    "vertical_slash",
    "vmoba",
    "where",
    "window",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"polyhead.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'polyhead' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def _define_every_part() -> None:
    """Import what defines parts that are not known from the start: positions, plans, mechanisms."""
    for room in ("nn", "heads", "cache"):
        importlib.import_module(f"polyhead.{room}")
    importlib.import_module("polyhead.mechanisms").catalog()


find_parts_with(_define_every_part)


def __dir__() -> list[str]:
    return sorted(__all__)
