"""What a selector leaves out is stood for by means, and what it reads counts for its share of the whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.masks import Chosen, Mask, Padding, all_of, terms_of
from polyhead.attend.precision import exact
from polyhead.attend.selectors.around import Around
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.less_is_more import Follow, Lead
from polyhead.attend.selectors.lists import listed
from polyhead.attend.selectors.selector import Correcting, Selector
from polyhead.attend.selectors.visible import looked_at, real_keys
from polyhead.checks import given
from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = ["GainGate", "OpenGate", "PoolingGate", "Rectified", "gain_gate", "open_gate", "rectified"]

_HELD = 1 << 22  # numbers of a table that are held at a time


class PoolingGate(Part):
    """Which blocks of keys may be stood for by their means."""

    def opens(self, q: Tensor, q_away: Tensor, k: Tensor, k_away: Tensor) -> Tensor:
        """Whether a mean may stand for a block, bool `(B, H, m, N)`.

        Args:
            q, k: means of the blocks of queries `(B, H, m, D)` and of keys `(B, H, N, D)`.
            q_away, k_away: how far those of the block are from their mean, in the mean, feature by feature.
        """
        raise NotImplementedError


class GainGate(PoolingGate):
    """Where the product of the means is larger than what taking means may have changed."""

    def opens(self, q: Tensor, q_away: Tensor, k: Tensor, k_away: Tensor) -> Tensor:
        gain = (q @ k.mT).abs()
        return gain > (q_away @ k.mT).abs() + (q @ k_away.mT).abs()


class OpenGate(PoolingGate):
    """Everywhere."""

    def opens(self, q: Tensor, q_away: Tensor, k: Tensor, k_away: Tensor) -> Tensor:
        return torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)


def gain_gate() -> PoolingGate:
    """A block is stood for by its mean where |q̄·k̄| > |δq·k̄| + |q̄·δk|, δ the mean |x - x̄| of a block.

    The larger the product, the more is gained by not leaving the block out; the right side is what the means
    may be wrong by.
    """
    return GainGate()


def open_gate() -> PoolingGate:
    """Every block that is not read is stood for by its mean."""
    return OpenGate()


class Rectified(Around, Correcting):
    """Another selector, and an estimate of what it leaves out. See `rectified`."""

    gate: PoolingGate
    apart: Mask | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector) or isinstance(self.selector, Correcting | Follow | Lead):
            raise ConfigError(
                "rectified: selector must be one that chooses by itself and corrects nothing, such as "
                f"select(mean_keys(), keep_mass(0.5)); got {given(self.selector)}"
            )
        if not isinstance(self.gate, PoolingGate):
            raise ConfigError(f"rectified: gate must be one such as gain_gate(); got {given(self.gate)}")
        if self.apart is not None and not isinstance(self.apart, Mask):
            raise ConfigError(f"rectified: apart must be a mask such as sink(1); got {given(self.apart)}")

    def flops(self, grid: Grid, width: int) -> int:
        # products of means: logits, the two sides of the gate, means of values
        pairs = grid.batch * grid.heads * grid.row_blocks * grid.col_blocks
        return self.selector.flops(grid, width) + 8 * pairs * width

    def correct(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, found: Chosen, scale: float
    ) -> Tensor:
        with exact(q.device):
            share, means = self.estimate(q, k, v, mask, found, scale)
        queries = q.shape[2]
        share, means = (x.repeat_interleave(self.rows, 2)[:, :, :queries] for x in (share[..., None], means))
        return (share * out + means).to(out.dtype)

    def estimate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, found: Chosen, scale: float
    ) -> tuple[Tensor, Tensor]:
        """What is read instead of all keys, and what stands for the rest.

        Args:
            q, k, v, mask, scale: of the call.
            found: what was chosen in it.

        Returns:
            For the blocks of queries the weight of the output of what is read, R `(B, H, M)`, and the means
            of the values of unread blocks times their weights, summed, `(B, H, M, Dv)`.
        """
        real = real_keys(mask, q.device)
        batch, heads, queries, _ = q.shape
        grid = Grid(batch, heads, k.shape[1], queries, k.shape[2], self.rows, self.cols, scale, real)
        # means know which keys are real
        own = all_of(term for term in terms_of(mask) if not isinstance(term, Padding))
        means = _Means(self, grid, q, k, v, own)
        step = max(1, _HELD // max(1, grid.batch * grid.heads * grid.col_blocks))
        index = found.index.to(q.device)
        parts = [
            means.of(start, min(start + step, grid.row_blocks), index)
            for start in range(0, grid.row_blocks, step)
        ]
        if not parts:
            return means.q.new_zeros(q.shape[:3]), means.q.new_zeros(*q.shape[:3], v.shape[3])
        shares, stand_ins = zip(*parts, strict=True)
        return torch.cat(shares, 2), torch.cat(stand_ins, 2)


class _Means:
    """The means of the blocks of one call, and attention among them."""

    def __init__(
        self, own: Rectified, grid: Grid, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None
    ) -> None:
        self.own, self.grid, self.mask = own, grid, mask
        wide = torch.promote_types(q.dtype, torch.float32)
        q, self.keys = q.to(wide), k.to(wide)
        self.q = grid.mean_queries(q, 0, grid.row_blocks)
        means = grid.mean_keys(self.keys)
        away = (q - self.q.repeat_interleave(grid.rows, 2)[:, :, : grid.queries]).abs()
        self.q_away = grid.mean_queries(away, 0, grid.row_blocks)
        away = (self.keys - means.repeat_interleave(grid.cols, 2)[:, :, : grid.keys]).abs()
        self.k_away, self.k = grid.spread(grid.mean_keys(away)), grid.spread(means)
        self.v = grid.spread(grid.mean_keys(v.to(wide)))
        there = q.new_ones(1, grid.keys) if grid.real is None else grid.real.to(wide)
        own_blocks = torch.arange(grid.keys, device=q.device) // grid.cols
        counts = there.new_zeros(len(there), grid.col_blocks).index_add(1, own_blocks, there)
        self.counts = counts[:, None, None].log()
        self.short = torch.arange(grid.col_blocks, device=q.device) >= grid.keys // grid.cols

    def of(self, start: int, stop: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """R and the sum of weighted means of the blocks of queries start to stop - 1."""
        grid, blocks = self.grid, slice(start, stop)
        some, every = self._tiles(self.mask, start, stop)
        singly = some & (~every | self.short)
        if self.own.apart is not None:
            singly = singly | some & self._tiles(self.own.apart, start, stop)[0]
        q = self.q[:, :, blocks]
        mass = q @ self.k.mT * grid.scale + self.counts
        if bool(singly.any()):
            mass = torch.where(singly, self._key_by_key(start, singly, mass), mass)
        mass = mass.masked_fill(~some, -math.inf)
        nothing = mass.isneginf().all(-1, keepdim=True)
        weights = mass.masked_fill(nothing, 0.0).softmax(-1)
        read = listed(index[:, :, blocks], grid.col_blocks)
        with torch.no_grad():
            stood = self.own.gate.opens(q, self.q_away[:, :, blocks], self.k, self.k_away)
        stood = stood & some & ~singly & ~read & ~nothing
        weights = weights.masked_fill(~stood, 0.0)
        return (1 - weights.sum(-1)).clamp(min=0), weights @ self.v

    def _tiles(self, mask: Mask | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of which blocks of keys a mask lets some and all be seen by blocks of queries."""
        grid = self.grid
        if mask is None:
            whole = self.short.new_ones(1, 1, stop - start, grid.col_blocks)
            return whole, whole
        found = looked_at(mask, grid, start, stop, self.q.device)
        return found.some, found.every & found.some

    def _key_by_key(self, start: int, singly: Tensor, like: Tensor) -> Tensor:
        """The log of the mass of some blocks, by the mean query and every key that its queries see.

        A key counts by the share of the block's queries that see it.
        """
        grid, device = self.grid, singly.device
        rows, cols = singly.flatten(0, 1).any(0).nonzero().unbind(1)
        size = max(1, _HELD // (grid.batch * grid.heads * max(grid.rows, self.q.shape[3]) * grid.cols))
        inside = torch.arange(grid.cols, device=device)
        b = torch.arange(grid.batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(grid.heads, device=device).view(-1, 1, 1)
        found = []
        for row, col in zip((rows + start).split(size), cols.split(size), strict=True):
            j = col[:, None] * grid.cols + inside
            there = (j < grid.keys)[None]
            at = j.clamp(max=grid.keys - 1)
            if grid.real is not None:
                there = there & grid.real[:, at]
            queries = self.q[:, :, row].unflatten(1, (grid.kv_heads, -1))
            logits = torch.einsum("bgrpd,bgpcd->bgrpc", queries, self.keys[:, :, at]).flatten(1, 2)
            logits = (logits * grid.scale).masked_fill(~there[:, None], -math.inf)
            if self.mask is not None:
                i = row[:, None] * grid.rows + torch.arange(grid.rows, device=device)
                held = (i < grid.queries)[..., None]
                i = i.clamp(max=grid.queries - 1) + grid.offset
                seen = self.mask.to(device).allowed(
                    b, h, i.view(-1, 1), at.repeat_interleave(grid.rows, 0)
                )  # every query of a pair of blocks has a row
                seen = seen.expand(*seen.shape[:-2], len(row) * grid.rows, grid.cols)
                seen = seen.unflatten(-2, (len(row), grid.rows)) & held
                share = seen.to(logits.dtype).sum(-2) / held.sum(-2)
                logits = logits + share.log()
            found.append(logits.logsumexp(-1))
        at = (rows * grid.col_blocks + cols).expand(grid.batch, grid.heads, -1)
        table = torch.zeros_like(like).flatten(2).scatter(2, at, torch.cat(found, 2))
        return table.view_as(like)


def rectified(selector: Selector, *, gate: PoolingGate | None = None, apart: Mask | None = None) -> Selector:
    """What `selector` reads, at its share of full attention; means of blocks stand for what it leaves out.

    Softmax over the keys that are read gives them all the weight. Here attention among means tells what each
    block of keys would have had, q̄ and k̄ the means of blocks of queries and keys and n_j its keys:

        P_ij = n_j exp(scale · q̄_i·k̄_j) / Σ_j'                of block j for the block i of queries
        E_i  = the blocks that are read, and those whose means the gate does not trust
        out  = R_i · out of what is read + Σ_{j not in E_i} P_ij v̄_j,          R_i = Σ_{j in E_i} P_ij

    So the weights still sum to 1, and what an unread block would have had goes to its mean value, or, where
    the gate is shut, to what is read. With everything read, or the gate shut everywhere, the output is that
    of `selector`. It works wherever selectors do, with plain softmax: no score maps, sinks, dropout or weight
    maps, and no log-sum-exp. O(M · N · D) more, M and N blocks, held band by band; gradients flow through the
    means, and not through the choice. In half precision the estimate is made in float32. Under
    `torch.compile` it breaks the graph.

    "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation" (paper 072, arXiv
    2511.19835), which is about video without masks. Its choice of blocks of 128, and its text of n tokens
    behind `video` others, always read and never taken by means:

        text = ~sink(video)
        some = select(mean_keys(), keep_mass(0.3), rows=128, cols=128, always=text)
        rectified(some | select(mean_keys(), keep_blocks(20), rows=128, cols=128), apart=text)

    Our readings: the paper has no causal form. Here a block that a mask hides in part from the queries of a
    block, one with fewer than `cols` keys, and one of `apart` is taken key by key, as the paper takes its
    text: its mass is Σ_j s_j exp(scale · q̄_i·k_j), s_j the share of the queries that see the key; and it is
    always in E, so that no query gets a value that lies behind what its mask allows. A query that reads
    nothing of what its block chose has only the means: let `always` hold its own block, `window(0)`. Then,
    with `rows=1`, a step of decoding is what the whole call is.

    Args:
        selector: what is read.
        gate: which unread blocks are stood for by their means: `gain_gate()` (the default), or `open_gate()`
            for all of them.
        apart: blocks of which this mask lets something be seen are taken key by key in the estimate, such as
            `sink(1) | window(63)`; None: only where they must.
    """
    return Rectified(selector, GainGate() if gate is None else gate, apart)
