"""Masks: who may look at whom, as a small algebra.

`causal() & (window(255) | sink(4))` is a value: it prints as it is written, compares, hashes, goes through
JSON, answers for single pairs and for whole tiles. Query row r of a call with L queries and S keys stands at
position i = r + (S - L); keys stand at j = 0..S-1.
"""

from polyhead.attend.masks.algebra import And, Mask, Not, Or, all_of, terms_of
from polyhead.attend.masks.bands import Band, band, span
from polyhead.attend.masks.chosen import Chosen, chosen
from polyhead.attend.masks.content import (
    Documents,
    Padding,
    PerHead,
    Where,
    documents,
    padding,
    per_head,
    where,
)
from polyhead.attend.masks.gathered import Gathered, gathered
from polyhead.attend.masks.last_row import runs_of_last
from polyhead.attend.masks.neighborhood import Neighborhood, neighborhood
from polyhead.attend.masks.on_grid import Halo, Lattice, OnGrid, halo, lattice
from polyhead.attend.masks.positional import (
    Blocks,
    Dilated,
    Prefix,
    Shard,
    Sink,
    Strided,
    Window,
    blocks,
    causal,
    dilated,
    is_causal,
    prefix,
    shard,
    sink,
    strided,
    window,
)
from polyhead.attend.masks.some_of import some_of
from polyhead.attend.masks.tilemap import TileMap, densify, tile_map, visible_tiles
from polyhead.attend.masks.until import Until, until

__all__ = [
    "And",
    "Band",
    "Blocks",
    "Chosen",
    "Dilated",
    "Documents",
    "Gathered",
    "Halo",
    "Lattice",
    "Mask",
    "Neighborhood",
    "Not",
    "OnGrid",
    "Or",
    "Padding",
    "PerHead",
    "Prefix",
    "Shard",
    "Sink",
    "Strided",
    "TileMap",
    "Until",
    "Where",
    "Window",
    "all_of",
    "band",
    "blocks",
    "causal",
    "chosen",
    "densify",
    "dilated",
    "documents",
    "gathered",
    "halo",
    "is_causal",
    "lattice",
    "neighborhood",
    "padding",
    "per_head",
    "prefix",
    "runs_of_last",
    "shard",
    "sink",
    "some_of",
    "span",
    "strided",
    "terms_of",
    "tile_map",
    "until",
    "visible_tiles",
    "where",
    "window",
]
