"""Single keys that the heads of a layer choose in turns; and layers that read what another one chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.around import Around
from polyhead.attend.selectors.budgets import ranks
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.selector import Kept, Listing, Selector
from polyhead.attend.selectors.visible import seen_pairs
from polyhead.checks import given, number, several, whole
from polyhead.errors import ConfigError

__all__ = ["Follow", "Lead", "UnifiedKeys", "follow", "lead", "less_is_more", "unified_keys"]

_HELD = 1 << 22  # scores that are held at a time


class UnifiedKeys(Listing):
    """The keys that heads choose in turns, the first and the latest. See `unified_keys`."""

    keep: int
    recent: float = 0.25
    first: int = 4

    def __post_init__(self) -> None:
        whole("unified_keys: keep", self.keep, 1)
        object.__setattr__(self, "recent", number("unified_keys: recent", self.recent, least=0, most=1))
        whole("unified_keys: first", self.first, 0)

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return 1

    def flops(self, grid: Grid, width: int) -> int:
        return 2 * grid.batch * grid.heads * grid.queries * grid.keys * width

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = grid.spread(k.to(wide)).mT
        j = torch.arange(grid.keys, device=q.device)
        chosen = min(math.floor(self.keep * (1 - self.recent) + 1e-9), self.keep - 1)
        latest, first = self.keep - chosen, 0
        if latest > self.first:
            latest, first = latest - self.first, self.first

        def band(start: int, stop: int) -> Tensor:
            own = seen_pairs(mask, grid, start, stop, j)
            there = own.any(1, keepdim=True)  # to any head: all read the same
            place = there.cumsum(-1) - 1
            count = there.sum(-1, keepdim=True)
            edges = there & ((place < first) | (place >= count - latest))
            between = there & ~edges
            scores = q[:, :, start:stop].to(wide) @ keys * grid.scale
            candidates = (own & between).expand_as(scores)
            named = ranks(scores, candidates, torch.zeros_like(candidates))
            head = torch.arange(grid.heads, device=q.device)[:, None, None]
            turn = (named * grid.heads + head).amin(1, keepdim=True)
            turn = turn.masked_fill(~between, grid.keys * grid.heads).masked_fill(edges, -1)
            turn, found = turn.expand(grid.batch, -1, -1, -1).sort(dim=-1, stable=True)
            hidden = turn == grid.keys * grid.heads
            return found.masked_fill(hidden, -1)[..., : self.keep]

        step = max(1, _HELD // max(1, grid.batch * grid.heads * grid.keys))
        found = [band(at, min(at + step, grid.queries)) for at in range(0, grid.queries, step)]
        return torch.cat(found, 2)


def unified_keys(keep: int, recent: float = 0.25, first: int = 4) -> Selector:
    """For every query `keep` keys, the same ones for all heads, which name them in turns.

        m    = min(⌊keep · (1 - recent)⌋, keep - 1) keys that are named; the others: the first and the latest
        read = the `first` keys, the m named ones, and the keep - m - first latest, the query's own among them

    Every head ranks the keys between the first and the latest by q·k. The keys named are the heads' first
    choices, head by head, then their second choices and so on, what was named before left out, until there
    are m: the ⌈m/H⌉ best of every head are among them. Where keep - m is no more than `first`, the first keys
    get no places of their own: the query's own key is read in any case. A query that sees no more than `keep`
    keys reads them all.

    Every query ranks all keys for all heads, as dense attention does; what is saved is in layers that follow.

    Args:
        keep: keys that a query reads.
        recent: the share of them that is kept for the first and the latest keys, 0 to 1.
        first: how many of the first keys, of those that the query sees.
    """
    return UnifiedKeys(keep, recent, first)


class Lead(Around):
    """A choice that others follow, in a layer that reads everything itself. See `lead`."""

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector) or isinstance(self.selector, Follow | Lead):
            raise ConfigError(
                "lead: selector must be one that chooses, such as unified_keys(1024); "
                f"got {given(self.selector)}"
            )

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            return visible

        return kept


def lead(selector: Selector) -> Selector:
    """A layer that chooses for those that `follow` it, and reads everything itself.

    For the selectors by layer of `ph.sparse`. By itself it reads everything.

    Args:
        selector: what it chooses for the others, such as `unified_keys(1024)`.

    Raises:
        ConfigError: `selector` is none, or one that follows or leads itself.
    """
    return Lead(selector)


class Follow(Selector):
    """What another layer chose. See `follow`."""

    layer: int

    def __post_init__(self) -> None:
        whole("follow: layer", self.layer, 0)

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return 1

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        raise ConfigError(
            f"follow({self.layer}) reads what another layer of a model chose: it goes into the selectors by "
            "layer of ph.sparse, and chooses nothing by itself"
        )


def follow(layer: int) -> Selector:
    """A layer that reads what an earlier layer of the same forward pass chose.

    For the selectors by layer of `ph.sparse`. The layer that is followed has a selector of its own, with
    which it reads less itself, or `lead(selector)`, with which it reads everything.

    Args:
        layer: whom to follow, counted as in `ph.attach(model).layers`.
    """
    return Follow(layer)


def less_is_more(
    layers: int,
    keep: int = 1024,
    *,
    at: Sequence[int] = (2,),
    recent: float = 0.25,
    first: int = 4,
) -> list[Selector | None]:
    """LessIsMore: a few layers read everything and choose `keep` keys for all heads of those behind them.

        with ph.sparse(model, ph.less_is_more(30, 1024, at=(2, 12)), prefill=False):
            model.generate(**inputs)

    Layers before the first of `at` are dense, those of `at` are `lead(unified_keys(keep, recent, first))`,
    and the others follow the last one before them. The method is one for decoding, `prefill=False`; in calls
    on many queries each query chooses for itself.

    The paper starts at layer 2 and chooses anew at one more layer, which its authors set by model. "Less Is
    More: Training-Free Sparse Attention with Global Locality for Efficient Reasoning" (paper 122, arXiv
    2508.07101). It reads and rates keys of the whole cache in the layers of `at`, and `keep` in the others;
    nothing leaves the cache.

    Args:
        layers: attention layers of the model.
        keep, recent, first: see `unified_keys`.
        at: the layers that choose, ascending.
    """
    whole("less_is_more: layers", layers, 1)
    if not several(at) or not at or any(isinstance(one, bool) or not isinstance(one, int) for one in at):
        raise ConfigError(f"less_is_more: at must be numbers of layers, such as (2, 12); got {given(at)}")
    if any(a >= b for a, b in pairwise((-1, *at, layers))):
        raise ConfigError(f"less_is_more: at must ascend within the {layers} layers; got {given(tuple(at))}")
    own: list[Selector | None] = [None] * at[0]
    for start, stop in pairwise((*at, layers)):
        own += [lead(unified_keys(keep, recent, first)), *[follow(start)] * (stop - start - 1)]
    return own
