"""Selectors: which blocks of keys are worth reading, decided from the content.

    selector = block scorer × budget rule

A scorer gives every (head, block of queries, block of keys) a value, a budget keeps the best. The choice is a
mask (`chosen`), so that all that takes masks takes it: `attend(q, k, v, mask=causal(), select=...)` runs it
exactly, reading only what was chosen.
"""

from polyhead.attend.selectors.around import Around, Recalling
from polyhead.attend.selectors.budgets import (
    Budget,
    KeepAbove,
    KeepAtLeast,
    KeepBlocks,
    KeepMass,
    KeepShare,
    KeepSimilarity,
    KeepTotal,
    keep_above,
    keep_at_least,
    keep_blocks,
    keep_mass,
    keep_share,
    keep_similarity,
    keep_total,
)
from polyhead.attend.selectors.choice import choose
from polyhead.attend.selectors.chunks import (
    AttentionChunks,
    BoundaryPredictor,
    Chunks,
    EvenChunks,
    LearnedChunks,
    attention_chunks,
    boundary_loss,
    boundary_predictor,
    boundary_ratio,
    even_chunks,
    learned_chunks,
)
from polyhead.attend.selectors.dhsa import Dhsa, dhsa
from polyhead.attend.selectors.fixed import Fixed, a_shape, fixed
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.grid_blocks import GridBlocks, grid_blocks, vmoba
from polyhead.attend.selectors.guard import Guarded, Selections, guarded, selections
from polyhead.attend.selectors.hisa import Hisa, hisa
from polyhead.attend.selectors.indexer import (
    ComputedIndexer,
    Indexer,
    IndexScores,
    LearnedIndexer,
    MeanIndexer,
    SeparateIndexer,
    computed_indexer,
    index_scores,
    indexer_loss,
    learned_indexer,
    mean_indexer,
    token_indexer,
)
from polyhead.attend.selectors.less_is_more import (
    Follow,
    Lead,
    UnifiedKeys,
    follow,
    lead,
    less_is_more,
    unified_keys,
)
from polyhead.attend.selectors.low_rank import LowRankScores, low_rank_scores
from polyhead.attend.selectors.masses import MeanMass, SampledMass, mean_mass, sampled_mass
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
from polyhead.attend.selectors.ranked import Ranked, select
from polyhead.attend.selectors.rectified import (
    GainGate,
    OpenGate,
    PoolingGate,
    Rectified,
    gain_gate,
    open_gate,
    rectified,
)
from polyhead.attend.selectors.region_routing import RegionRouting, region_routing
from polyhead.attend.selectors.scorers import (
    KeyBounds,
    MeanKeys,
    Scorer,
    Shared,
    key_bounds,
    mean_keys,
    shared,
)
from polyhead.attend.selectors.selector import Correcting, Either, Listing, Selector
from polyhead.attend.selectors.spans import Spans, spans
from polyhead.attend.selectors.summaries import Summaries, unchanged
from polyhead.attend.selectors.together import Together, together
from polyhead.attend.selectors.triangle_spans import SpanIndex, TriangleSpans, triangle_spans
from polyhead.attend.selectors.triangles import Span, cover, detect_spans, triangle_scores
from polyhead.attend.selectors.vertical_slash import VerticalSlash, vertical_slash

__all__ = [
    "Around",
    "AttentionChunks",
    "BandMeans",
    "BoundaryPredictor",
    "Budget",
    "Chunks",
    "ComputedIndexer",
    "Correcting",
    "Dhsa",
    "Either",
    "EvenChunks",
    "ExactFar",
    "FarMass",
    "Fixed",
    "Follow",
    "GainGate",
    "Grid",
    "GridBlocks",
    "Guarded",
    "Hisa",
    "IndexScores",
    "Indexer",
    "KeepAbove",
    "KeepAtLeast",
    "KeepBlocks",
    "KeepLastMass",
    "KeepMass",
    "KeepShare",
    "KeepSimilarity",
    "KeepTotal",
    "KeyBounds",
    "KeyGaussian",
    "Lead",
    "LearnedChunks",
    "LearnedIndexer",
    "Listing",
    "LowRankScores",
    "MeanIndexer",
    "MeanKeys",
    "MeanMass",
    "NearGaussian",
    "NearOrAll",
    "OpenGate",
    "PoolingGate",
    "ProxyHeads",
    "Ranked",
    "Recalling",
    "Rectified",
    "RegionRouting",
    "SampledMass",
    "Scorer",
    "Selections",
    "Selector",
    "SeparateIndexer",
    "Shared",
    "Span",
    "SpanIndex",
    "Spans",
    "Summaries",
    "Together",
    "TriangleSpans",
    "UnifiedKeys",
    "VerticalSlash",
    "a_shape",
    "attention_chunks",
    "band_means",
    "boundary_loss",
    "boundary_predictor",
    "boundary_ratio",
    "choose",
    "computed_indexer",
    "cover",
    "detect_spans",
    "dhsa",
    "even_chunks",
    "fixed",
    "follow",
    "gain_gate",
    "grid_blocks",
    "guarded",
    "hisa",
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
    "lead",
    "learned_chunks",
    "learned_indexer",
    "less_is_more",
    "low_rank_scores",
    "mean_indexer",
    "mean_keys",
    "mean_mass",
    "open_gate",
    "prism",
    "proxy_attn",
    "proxy_heads",
    "qada",
    "rectified",
    "region_routing",
    "sampled_mass",
    "select",
    "selections",
    "shared",
    "spans",
    "together",
    "token_indexer",
    "triangle_scores",
    "triangle_spans",
    "unchanged",
    "unified_keys",
    "vertical_slash",
    "vmoba",
]
