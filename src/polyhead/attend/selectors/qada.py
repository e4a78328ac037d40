"""Near or all: every query of every head reads everything only where much of its mass lies far away."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.budgets import heads_fit, per_head
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.selector import Kept, Selector
from polyhead.checks import floating, given, whole
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = ["ExactFar", "FarMass", "KeyGaussian", "NearGaussian", "NearOrAll", "qada"]

_HELD = 1 << 22  # products that are held at a time
_STRIP = 128  # queries that are asked together: their near keys are next to one another


class Strip:
    """Some neighbouring queries, and their products with the keys near any of them.

    Attributes:
        q: `(B, H, r, D)`.
        logits: `(B, H, r, c)`, -inf at keys that are not near the query, or that it may not see.
        far: how many real keys of the past are not near, `(B or 1, 1, r)`.
        scale: factor of q·k.
    """

    def __init__(self, q: Tensor, logits: Tensor, far: Tensor, scale: float) -> None:
        self.q, self.logits, self.far, self.scale = q, logits, far, scale


class FarMass(Part):
    """What is taken for the log of the mass of the keys that are not near a query."""

    def prepare(self, k: Tensor, grid: Grid) -> Callable[[Strip, Tensor, Tensor], Tensor]:
        """What does not depend on the queries, worked out once.

        Returns:
            A function of a strip, its positions `(r,)` and which pairs `(B or 1, 1, r, S)` are far, or None
            unless `reads_far`, that gives log Σ_far exp(scale · q·k), `(B, H, r)`.
        """
        raise NotImplementedError

    @property
    def reads_far(self) -> bool:
        """Whether the far keys are looked at, so that nothing is saved by the decision."""
        return False


class NearGaussian(FarMass):
    """Far keys are taken to be like the near ones: log n + mean + variance / 2 of the near logits.

    The logits of keys with mean μ and covariance Σ have the mean scale · q·μ and the variance
    scale² · qᵀΣq, so that of near keys no covariance has to be made.
    """

    def prepare(self, k: Tensor, grid: Grid) -> Callable[[Strip, Tensor, Tensor], Tensor]:
        def log_mass(strip: Strip, at: Tensor, far: Tensor) -> Tensor:
            seen = ~strip.logits.isneginf()
            count = seen.sum(-1).clamp(min=1)
            mean = strip.logits.masked_fill(~seen, 0.0).sum(-1) / count
            away = (strip.logits - mean[..., None]).masked_fill(~seen, 0.0)
            return strip.far.log() + mean + away.square().sum(-1) / count / 2

        return log_mass


class KeyGaussian(FarMass):
    """Far keys are taken to be drawn from normal ones: log n + scale · q·μ + scale² · qᵀΣq / 2.

    Attributes:
        mean: μ of each key/value head, `(G, D)`.
        covariance: Σ, `(G, D, D)`.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        floating("KeyGaussian: mean", self.mean, 2, "(G, D)")
        floating("KeyGaussian: covariance", self.covariance, 3, "(G, D, D)")
        if self.covariance.shape != (*self.mean.shape, self.mean.shape[1]):
            raise ShapeError(
                f"KeyGaussian: covariance must be (G, D, D) where mean is (G, D), {tuple(self.mean.shape)}; "
                f"got {tuple(self.covariance.shape)}"
            )

    def prepare(self, k: Tensor, grid: Grid) -> Callable[[Strip, Tensor, Tensor], Tensor]:
        if self.mean.shape != (grid.kv_heads, k.shape[-1]):
            raise ShapeError(
                f"KeyGaussian: mean is {tuple(self.mean.shape)}, but the call has {grid.kv_heads} key/value "
                f"heads {k.shape[-1]} wide"
            )
        wide = torch.promote_types(k.dtype, torch.float32)
        mean, covariance = (x.to(k.device, wide) for x in (self.mean, self.covariance))

        def log_mass(strip: Strip, at: Tensor, far: Tensor) -> Tensor:
            q = strip.q.unflatten(1, (grid.kv_heads, -1)) * strip.scale
            centre = (q * mean[:, None, None]).sum(-1)
            spread = ((q @ covariance[:, None]) * q).sum(-1)
            return strip.far.log() + (centre + spread / 2).flatten(1, 2)

        return log_mass


class ExactFar(FarMass):
    """The true mass, for comparison: it costs the products of dense attention."""

    @property
    def reads_far(self) -> bool:
        return True

    def prepare(self, k: Tensor, grid: Grid) -> Callable[[Strip, Tensor, Tensor], Tensor]:
        wide = torch.promote_types(k.dtype, torch.float32)
        keys = k.to(wide).mT[:, :, None]

        def log_mass(strip: Strip, at: Tensor, far: Tensor) -> Tensor:
            end = int(at[-1]) + 1
            q = strip.q.unflatten(1, (grid.kv_heads, -1)) * strip.scale
            logits = (q @ keys[..., :end]).flatten(1, 2)
            return logits.masked_fill(~far[..., :end], -math.inf).logsumexp(-1)

        return log_mass


class NearOrAll(Selector):
    """The first keys and the nearest, or all. See `qada`."""

    tau: float | Tensor
    far: FarMass
    first: int = 16
    nearest: int = 1024
    rows: int = 1
    cols: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", per_head("qada: tau", self.tau, 0.0, None, False))
        if not isinstance(self.far, FarMass):
            raise ConfigError(f"qada: far must be such as NearGaussian(); got {given(self.far)}")
        whole("qada: first", self.first, 0)
        for name in ("nearest", "rows", "cols"):
            whole(f"qada: {name}", getattr(self, name), 1)

    def check(self, heads: int) -> None:
        heads_fit("qada: tau", self.tau, heads)

    def prepare(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Kept:
        shares = self.shares(q, k, mask, grid)
        tau = torch.as_tensor(self.tau, device=q.device, dtype=torch.float64).view(-1, 1)
        block = torch.arange(grid.col_blocks, device=q.device)

        def kept(start: int, stop: int, visible: Tensor) -> Tensor:
            first, last = start * grid.rows, min(stop * grid.rows, grid.queries)
            more = torch.zeros(grid.batch, grid.heads, (stop - start) * grid.rows, device=q.device)
            more[..., : last - first] = (shares(first, last).double() < tau).float()
            every = more.bool().unflatten(2, (-1, grid.rows)).any(-1, keepdim=True)
            row = torch.arange(start, stop, device=q.device)[:, None] * grid.rows + grid.offset
            near = block >= (row - self.nearest + 1).div(grid.cols, rounding_mode="floor")
            near = near & (block <= (row + grid.rows - 1).div(grid.cols, rounding_mode="floor"))
            return visible & (near | (block < -(-self.first // grid.cols)) | every)

        return kept

    def shares(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Callable[[int, int], Tensor]:
        """The share of the mass that is taken to lie near, `(B, H, n)`, of the n queries start..stop-1."""
        wide = torch.promote_types(k.dtype, torch.float32)
        estimate = self.far.prepare(k, grid)
        j = torch.arange(grid.keys, device=q.device)
        real = torch.ones(1, grid.keys, dtype=torch.bool, device=q.device) if grid.real is None else grid.real
        before = real.cumsum(1)
        sinks = min(-(-self.first // grid.cols) * grid.cols, grid.keys)
        b = torch.arange(grid.batch, device=q.device).view(-1, 1, 1, 1)
        h = torch.arange(grid.heads, device=q.device).view(-1, 1, 1)

        def strip(start: int, stop: int) -> Tensor:
            at = torch.arange(start, stop, device=q.device) + grid.offset
            low = (at - self.nearest + 1).div(grid.cols, rounding_mode="floor") * grid.cols
            end = max(stop + grid.offset, 0)
            left = max((start + grid.offset - self.nearest + 1) // grid.cols * grid.cols, 0)
            own = torch.cat([j[: min(sinks, end, left)], j[left:end]])
            near = (own <= at[:, None]) & ((own >= low[:, None]) | (own < sinks)) & real[:, None, None, own]
            asked = q[:, :, start:stop].to(wide)
            logits = asked.unflatten(1, (grid.kv_heads, -1)) @ k[:, :, own].to(wide).mT[:, :, None]
            logits = (logits.flatten(1, 2) * grid.scale).masked_fill(~near, -math.inf)
            if mask is not None:
                logits = logits.masked_fill(~mask.allowed(b, h, at[:, None], own), -math.inf)
            past = torch.where(at >= 0, before[:, at.clamp(min=0)], 0)
            far = past[:, None] - near.sum(-1)
            away = real[:, None, None]
            if self.far.reads_far:
                hidden = (j > at[:, None]) | (j >= low[:, None]) | (j < sinks)
                away = away & ~hidden
                if mask is not None:
                    away = away & mask.allowed(b, h, at[:, None], j)
            found = estimate(Strip(asked, logits, far.to(wide), grid.scale), at, away)
            share = (logits.logsumexp(-1) - found).sigmoid()
            return torch.where(far > 0, share, 1.0)

        def all_of(start: int, stop: int) -> Tensor:
            width = grid.keys if self.far.reads_far else self.nearest + _STRIP + sinks + grid.cols
            held = max(1, min(_STRIP, _HELD // max(1, grid.batch * grid.heads * width)))
            return torch.cat([strip(n, min(n + held, stop)) for n in range(start, stop, held)], 2)

        return all_of


def qada(
    tau: float | Tensor,
    far: FarMass | None = None,
    *,
    first: int = 16,
    nearest: int = 1024,
    rows: int = 1,
    cols: int = 64,
) -> Selector:
    """A query reads the first keys and the nearest, or all keys where too much of its mass would be missed.

        A = Σ over first and nearest keys j of exp(scale · q·k_j)
        Â = n · exp(scale · q·μ + scale² · qᵀΣq / 2)          for the n other keys of the past
        near only    if  A / (A + Â) >= tau,   else all

    Â is the mass that n normal keys with mean μ and covariance Σ have in the mean: nothing is read of the far
    keys to decide. It is taken too large where few of them matter, which errs on the side of reading. First
    and nearest keys are the blocks that hold any of them. A block of queries reads everything if one of its
    queries would.

    With tau 0 it is `a_shape(first, nearest)`, above 1 it reads everything. A tensor of zeros and twos is the
    choice of heads once for all queries. Keys are counted over the causal past; other masks than
    padding hide keys from A, and not from n. The whole cache has to be kept. Half precision is decided in
    float32.

    "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification" (paper 085, arXiv
    2502.09647).

    Our readings: the paper has 16 first keys; the number of nearest ones and where μ and Σ come from are not
    certain. Both sources that it speaks of are here.

    Args:
        tau: least share of the mass that near keys must be taken to hold, from 0 on; or a tensor `(H,)`.
        far: `NearGaussian()` (the default) takes μ and Σ from the near keys of the query itself,
            `KeyGaussian(mean, covariance)` from elsewhere, such as `polyhead.heads.key_gaussians` of a
            text; `ExactFar()` knows the true mass, to compare with.
        first: keys at the start that are always read; 0 for none.
        nearest: keys up to and with the query's own that are always read.
        rows, cols: length of a block of queries and of keys.
    """
    return NearOrAll(tau, NearGaussian() if far is None else far, first, nearest, rows, cols)
