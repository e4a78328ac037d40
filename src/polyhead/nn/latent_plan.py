"""The orders in which latent attention can be multiplied out, what each costs, and which is the cheapest.

For T new tokens and S keys, N of them new, of inner width p (the query latent, or d without one); factors of
two and the batch left out. All orders share T·p·H·dr for the rotary part of the queries, the
down-projections, and the output. What else they multiply:

    expanded            T·p·H·Dn + S·dc·G·(Dn + Dv)         core T·S·H·(Dn + dr + Dv)
    absorbed            T·H·(p·Dn + Dn·dc + dc·Dv)          core T·S·H·(2·dc + dr)
    absorbed_reuse      T·H·(p·dc + dc·Dv)                  core as absorbed
    absorbed_recompute  H·p·Dn·dc + T·H·(p·dc + dc·Dv)      core as absorbed

`expanded` makes keys and values of all latents, in every call. `absorbed` moves the up-projection of the keys
to the queries, q̃_h = q_h W_UK^h, and that of the values behind the mixing: attention of many query heads to
one key head, the latent itself. The other two multiply the latent of the query by W_UQ^h W_UK^hᵀ (p × dc),
which is kept (`reuse`: no step makes it, but H·p·dc numbers are read instead of H·Dn·(p + dc)) or made anew
in every call (`recompute`: the memory traffic of absorbed).

For many keys, expanded costs fewer operations than absorbed from T* = dc·(Dn + Dv) / (2·dc − Dn − Dv) queries
on (with G = H). DeepSeek-V3: about 171.

Paper 109: Hardware-Centric Analysis of DeepSeek's Multi-Head Latent Attention, arXiv 2506.02523. Its two
schemes are, as we read it, reuse and recompute; absorbed is what libraries run.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyhead.checks import whole
from polyhead.nn.hardware import Hardware, hardware

__all__ = ["SCHEMES", "LatentSizes", "SchemeCost", "SchemePlan"]

SCHEMES = ("expanded", "absorbed", "absorbed_reuse", "absorbed_recompute")


@dataclass(frozen=True)
class SchemeCost:
    """What one order costs in one call.

    Attributes:
        scheme: its name.
        projections, scores, values: operations, a multiply and an add counted as two.
        nbytes: bytes read or written: weights, inputs, outputs and cached rows once, and keys and values
            where they are made once each way.
        seconds: the least time on the hardware of the plan; None without one.
    """

    scheme: str
    projections: int
    scores: int
    values: int
    nbytes: int
    seconds: float | None = None

    @property
    def flops(self) -> int:
        """All operations of the call."""
        return self.projections + self.scores + self.values

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.nbytes


@dataclass(frozen=True)
class SchemePlan:
    """What every order costs, and the cheapest; prints as a table.

    Attributes:
        scheme: the cheapest: in time where a hardware was given, otherwise in operations.
        costs: of all orders, in the order of `SCHEMES`.
        hardware: what the times are for.
    """

    scheme: str
    costs: tuple[SchemeCost, ...]
    hardware: Hardware | None

    def __getitem__(self, scheme: str) -> SchemeCost:
        return next(cost for cost in self.costs if cost.scheme == scheme)

    def __str__(self) -> str:
        time = "" if self.hardware is None else f"  µs on {self.hardware.name}"
        lines = [f"  {'scheme':18}  {'GFLOP':>10}  {'MB':>10}  {'FLOP/byte':>10}{time}"]
        for cost in self.costs:
            mark = "*" if cost.scheme == self.scheme else " "
            last = "" if cost.seconds is None else f"  {cost.seconds * 1e6:.4g}"
            lines.append(
                f"{mark} {cost.scheme:18}  {cost.flops / 1e9:>10.4g}  {cost.nbytes / 1e6:>10.4g}"
                f"  {cost.intensity:>10.4g}{last}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class LatentSizes:
    """The widths of latent attention, and what follows from them.

    Attributes:
        dim, context_dim: widths of the inputs of queries and of keys.
        heads, kv_heads: H query heads, G heads of the up-projections.
        inner: what the queries are made of: their latent, or `dim`.
        latent, rope: widths dc of the latent and dr of the rotary key, which are cached.
        key, value: widths Dn and Dv of a head, without the rotary part.
        compressed: whether the queries have a latent.
        projected: whether the rows are made by a map; if not, they are the inputs themselves.
    """

    dim: int
    context_dim: int
    heads: int
    kv_heads: int
    inner: int
    latent: int
    rope: int
    key: int
    value: int
    compressed: bool
    projected: bool = True

    def cheaper(self, queries: int, keys: int) -> str:
        """ "expanded" or "absorbed", whichever has fewer operations."""
        wide = self.key + self.value
        each = self.heads * queries  # rows of queries
        expanded = keys * (self.latent * self.kv_heads * wide + each * (wide + self.rope))
        absorbed = each * (self.latent * wide + keys * (2 * self.latent + self.rope))
        return "absorbed" if absorbed < expanded else "expanded"

    def operations(self, scheme: str, queries: int, keys: int, fresh: int) -> tuple[int, int, int]:
        """Operations of projections, scores and values for one sequence, `fresh` keys being new."""
        down = fresh * self._down()
        if self.compressed:
            down += queries * self.dim * self.inner
        out = queries * self.heads * self.value * self.dim
        turned = queries * self.inner * self.heads * self.rope
        if scheme == "expanded":
            make = queries * self.inner * self.heads * self.key
            make += keys * self.latent * self.kv_heads * (self.key + self.value)
            widths = (self.key + self.rope, self.value)
        else:
            if scheme == "absorbed":
                make = queries * self.heads * self.key * (self.inner + self.latent)
            else:
                make = queries * self.heads * self.inner * self.latent
            if scheme == "absorbed_recompute":
                make += self._fold()
            make += queries * self.heads * self.latent * self.value
            widths = (self.latent + self.rope, self.latent)
        pairs = 2 * queries * keys * self.heads
        return 2 * (down + turned + make + out), pairs * widths[0], pairs * widths[1]

    def _down(self) -> int:
        return self.context_dim * (self.latent + self.rope) if self.projected else 0

    def _fold(self) -> int:
        return self.heads * self.inner * self.key * self.latent

    def cost(self, scheme: str, queries: int, keys: int, fresh: int, batch: int, itemsize: int) -> SchemeCost:
        """What one order costs; recomputed products are made once for the whole batch."""
        projections, scores, values = self.operations(scheme, queries, keys, fresh)
        projections *= batch
        if scheme == "absorbed_recompute":
            projections -= 2 * (batch - 1) * self._fold()
        weights = self._down() + self.inner * self.heads * self.rope
        weights += self.dim * self.inner if self.compressed else 0
        weights += self.kv_heads * self.latent * self.value + self.heads * self.value * self.dim
        if scheme == "absorbed_reuse":
            weights += self.heads * self.inner * self.latent
        else:
            weights += self.key * (self.heads * self.inner + self.kv_heads * self.latent)
        moved = weights + batch * (2 * queries * self.dim + keys * (self.latent + self.rope))
        if scheme == "expanded":  # keys and values of every head are written, and read
            moved += 2 * batch * keys * self.kv_heads * (self.key + self.rope + self.value)
        return SchemeCost(scheme, projections, batch * scores, batch * values, moved * itemsize)

    def plan(
        self,
        queries: int,
        cached: int = 0,
        batch: int = 1,
        *,
        itemsize: int,
        device: str | Hardware | None = None,
    ) -> SchemePlan:
        """What every order costs for `queries` new tokens after `cached` ones, and the cheapest."""
        whole("plan: queries", queries, 1)
        whole("plan: cached", cached, 0)
        whole("plan: batch", batch, 1)
        place = None if device is None else hardware(device)
        costs = []
        for scheme in SCHEMES:
            cost = self.cost(scheme, queries, cached + queries, queries, batch, itemsize)
            seconds = None if place is None else place.seconds(cost.flops, cost.nbytes)
            costs.append(SchemeCost(**{**vars(cost), "seconds": seconds}))
        # of equal times, the one with fewer operations
        best = min(costs, key=lambda cost: (cost.seconds or 0.0, cost.flops))
        return SchemePlan(best.scheme, tuple(costs), place)
