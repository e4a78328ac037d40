"""Heads that receive relations between receiver and sender, beside heads that receive values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.attend.function import attend
from polyhead.attend.masks import Mask
from polyhead.attend.scores import Score
from polyhead.attend.weight_maps import WeightMap
from polyhead.errors import unknown_name
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.chosen_options import of_range
from polyhead.nn.cost import CallShape, Cost
from polyhead.nn.dual_projection import DualProjection
from polyhead.nn.kv_cache import Kept, Standing
from polyhead.nn.kv_cache.base import Streams
from polyhead.nn.relative_values import by_distance, table_flops, tabled
from polyhead.nn.symbols import RelativeSymbols, SymbolRetriever
from polyhead.nn.weight_strips import by_weights

__all__ = ["ACTIVATIONS", "DualAttention", "RelationMap"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "identity": None,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


class RelationMap(nn.Module):
    """W_r of every relational head, from its R mean relations to its width; uniform in ±1/√R at the start."""

    acts_on = "heads"

    def __init__(self, heads: int, width: int, relations: int, **kind: Any) -> None:
        super().__init__()
        bound = 1 / math.sqrt(relations)
        self.weight = nn.Parameter(torch.empty(heads, width, relations, **kind).uniform_(-bound, bound))

    def forward(self, means: Float[Tensor, "B H L R"]) -> Float[Tensor, "B H L Dv"]:
        return means @ self.weight.to(means.dtype).mT

    def flops(self, queries: int) -> int:
        """Operations for so many query tokens."""
        return 2 * queries * self.weight.numel()


class DualAttention(MultiHeadAttention):
    """`MultiHeadAttention` whose last heads are relational.

        head_i = Σ_j w_ij (W_r r(i, j) + s_j W_s),   r_l(i, j) = act(a_il · b_jl / √P), l = 1..R

    Without an activation Σ_j w_ij r_l(i, j) = a_il · (Σ_j w_ij b_jl) / √P: attention with values b_j, so
    that no relation is ever made. A single query has one relation with a key, which is a value of width 1.
    With an activation and several queries, or where s is s_ij, of relative positions, the relations and
    weights of all pairs are made, for some queries at a time.

    Args:
        args, options: those of `MultiHeadAttention`; the projection is a `DualProjection`.
        symbols: makes s, or holds one for every relative position; None where no head is relational.
        activation: act, one of `ACTIVATIONS`.
    """

    projection: DualProjection

    def __init__(
        self,
        *args: Any,
        symbols: SymbolRetriever | RelativeSymbols | None,
        activation: str = "identity",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.symbols = symbols
        made, weight = self.projection, self.projection.query.weight
        if made.relational_heads:
            kind = {"device": weight.device, "dtype": weight.dtype}
            self.relation_map = RelationMap(made.relational_heads, made.value_dim, made.relations, **kind)

    @property
    def streams(self) -> Streams:
        made = self.projection.streams
        return made[:-1] if isinstance(self.symbols, RelativeSymbols) else made

    def _queries(self, x: Tensor, where: int | Tensor) -> Tensor:
        """Queries of all heads and the receiver's side of relations, side by side: `(B, 1, L, H·D + R·P)`."""
        q = super()._queries(x, where)
        if not self.projection.relational_heads:
            return q
        receiver = self.projection.relation_query(x)
        return torch.cat([q.transpose(1, 2).flatten(2), receiver.to(q.dtype)], dim=-1)[:, None]

    def _parted(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `(B, H, L, D)`, and the receiver's side `(B, L, R, P)`."""
        made, width = self.projection, self.heads * self.head_dim
        queries = q[:, 0, :, :width].unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return queries, q[:, 0, :, width:].unflatten(-1, (made.relations, made.relation_dim))

    def _rows(self, source: Tensor, places: int | Tensor) -> tuple[Tensor, ...]:
        made = self.projection
        rows = [self.position.turn(made.keys(source), places)]
        if made.own_heads:
            rows.append(made.values(source))
        if made.relational_heads:
            rows.append(made.relation_key(source)[:, None])
            if isinstance(self.symbols, SymbolRetriever):
                rows.append(made.symbol_values(self.symbols(source, places)))
        return tuple(rows)

    def _attend(self, q: Tensor, kept: Kept, mask: Mask | None, at: Standing) -> Tensor:
        if isinstance(self.symbols, RelativeSymbols):
            # in the place of symbols: where the keys stand, counted from the first query
            count, places = kept.rows[0].shape[2], kept.positions
            keys = torch.arange(count, device=q.device) if places is None else places.to(q.device)
            kept = replace(kept, rows=(*kept.rows, (keys - at.first).view(1, 1, count, 1)))
        return super()._attend(q, kept, mask, at)

    def _mix(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> Tensor:
        made = self.projection
        if not made.relational_heads:
            return super()._mix(q, rows, **options)
        k, *values, sender, symbols = rows
        q, receiver = self._parted(q)
        asked = (receiver, sender, symbols)
        if _together(options.get("score"), options.get("weight_map")):
            own, related = self._one_call(q, k, values, *asked, options)
            return torch.cat([*own, self._received(related, receiver)], dim=1)
        n, keys = made.own_heads, made.own_kv_heads
        found = [attend(q[:, :n], k[:, :keys], v, **of_range(options, 0, n, self.heads)) for v in values]
        _, related = self._one_call(
            q[:, n:], k[:, keys:], [], *asked, of_range(options, n, self.heads, self.heads)
        )
        return torch.cat([*found, self._received(related, receiver)], dim=1)

    def _one_call(
        self,
        q: Tensor,
        k: Tensor,
        values: list[Tensor],
        receiver: Tensor,
        sender: Tensor,
        symbols: Tensor,
        options: dict[str, Any],
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs of the heads with values, if there are any, and what `_received` takes of the others."""
        if self._holds_pairs(receiver.shape[1]):
            return self._by_weights(q, k, values, receiver, sender, symbols, options)
        if receiver.shape[1] == 1:  # relations with every key are its values, B 1 S R
            sender = self._relations(receiver, sender).transpose(1, 3).squeeze(2)[:, None]
        sent = torch.cat([sender.to(symbols.dtype).expand(-1, symbols.shape[1], -1, -1), symbols], dim=-1)
        if not values:
            return [], attend(q, k, sent, **options)
        missing, n = sent.shape[-1] - self.projection.value_dim, self.projection.own_heads
        v = torch.cat([*(F.pad(v, (missing, 0)) for v in values), sent], dim=1)
        y = attend(q, k, v, **options)
        return [y[:, :n, :, missing:]], y[:, n:]

    def _holds_pairs(self, queries: int) -> bool:
        """Whether weights and relations are made, where what a pair gives is no value of its key."""
        several = ACTIVATIONS[self.activation] is not None and queries > 1
        return several or isinstance(self.symbols, RelativeSymbols)

    def _by_weights(
        self,
        q: Tensor,
        k: Tensor,
        values: list[Tensor],
        receiver: Tensor,
        sender: Tensor,
        symbols: Tensor,
        options: dict[str, Any],
    ) -> tuple[list[Tensor], Tensor]:
        """`_one_call` with the weights of some queries at a time."""
        made, relative = self.projection, self.symbols
        n = q.shape[1] - made.relational_heads

        def receive(weights: Tensor, first: int, receiver: Tensor) -> Tensor:
            seen = weights.shape[-1]
            own, related = weights.to(q.dtype).split([n, made.relational_heads], dim=1)
            receiver = receiver.unflatten(-1, (made.relations, made.relation_dim))
            relations = self._relations(receiver, sender[:, :, :seen]).permute(0, 2, 3, 1)  # B l s R
            means = (related.transpose(1, 2) @ relations).transpose(1, 2)  # B Hr l R
            if isinstance(relative, RelativeSymbols):
                received = by_distance(weights[:, n:], symbols.flatten()[:seen] - first, relative.reach)
            else:
                received = _spread(related, symbols)
            found = [*(_spread(own, v) for v in values), torch.cat([means, received.to(means.dtype)], dim=-1)]
            return torch.cat([heads.transpose(1, 2).flatten(2) for heads in found], dim=-1)  # B l -1

        lines = q.shape[1] + made.relations
        y = by_weights(receive, q, k, [receiver.flatten(2)], options=options, lines=lines)
        width = n * made.value_dim
        own, related = y.split([width, y.shape[-1] - width], dim=-1)
        return [_by_head(own, n)] if values else [], _by_head(related, made.relational_heads)

    def _received(self, y: Tensor, receiver: Tensor) -> Tensor:
        """What relational heads give `(B, Hr, L, Dv)`, from their weighted values."""
        made, relative = self.projection, self.symbols
        queries = receiver.shape[1]
        of_symbols = len(relative.library) if isinstance(relative, RelativeSymbols) else made.value_dim
        means, symbols = y.split([y.shape[-1] - of_symbols, of_symbols], dim=-1)
        if queries != 1 and not self._holds_pairs(queries):
            means = means.unflatten(-1, (made.relations, made.relation_dim))
            means = (means * receiver[:, None]).sum(-1) * made.relation_dim**-0.5
        if isinstance(relative, RelativeSymbols):
            symbols = tabled(symbols, relative.library, made.symbol, made.symbol_heads)
        return self.relation_map(means) + symbols

    def _relations(self, receiver: Tensor, sender: Tensor) -> Float[Tensor, "B R L S"]:
        """r of the receiver's side `(B, L, R, P)` and the sender's `(B, 1, S, R·P)`."""
        made = self.projection
        b = sender[:, 0].unflatten(-1, (made.relations, made.relation_dim)).transpose(1, 2)
        found = receiver.transpose(1, 2) @ b.mT * made.relation_dim**-0.5
        act = ACTIVATIONS[self.activation]
        return found if act is None else act(found)

    def _weights(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> Tensor:
        return super()._weights(
            self._parted(q)[0] if self.projection.relational_heads else q, rows, **options
        )

    def relations(
        self, x: Float[Tensor, "B L d"], context: Float[Tensor, "B S dc"] | None = None
    ) -> Float[Tensor, "B R L S"]:
        """r(i, j) of all pairs, to look at."""
        made = self.projection
        receiver = made.relation_query(x).unflatten(-1, (made.relations, made.relation_dim))
        return self._relations(receiver, made.relation_key(x if context is None else context)[:, None])

    def _cost(self, call: CallShape) -> Cost:
        found = super()._cost(call)
        made = self.projection
        if not made.relational_heads:
            return found
        pairs, width = 2 * call.pairs, made.relations * made.relation_dim
        scores, values, own = found.scores, found.values, call.batch * self.relation_map.flops(call.queries)
        if isinstance(self.symbols, RelativeSymbols):
            rows, table = call.batch * call.queries, self.symbols.library
            own += table_flops(rows, made.relational_heads, table, made.symbol, made.symbol_heads)
            values -= pairs * made.relational_heads * made.value_dim
        elif self.symbols is not None:
            each = self.symbols.flops(call.keys) + 2 * call.keys * made.symbol.weight.numel()
            own += call.batch * each
        if call.queries == 1 or self._holds_pairs(call.queries):
            scores, width = scores + pairs * width, made.relations
        together = _together(self._score(), self._weight_map()) and not self._holds_pairs(call.queries)
        values += pairs * width * (self.heads if together else made.relational_heads)
        return replace(found, projections=found.projections + own, scores=scores, values=values)


def _together(score: Score | None, weight_map: WeightMap | None) -> bool:
    """Whether both kinds of heads have to be in one call: maps may reach across them."""
    return weight_map is not None or (score is not None and score.whole_heads)


def _spread(
    weights: Float[Tensor, "B H L s"], values: Float[Tensor, "B G S Dv"]
) -> Float[Tensor, "B H L Dv"]:
    """weights · values of the first keys, where H / G heads share values."""
    batch, heads, queries, keys = weights.shape
    groups = values.shape[1]
    rows = weights.reshape(batch, groups, heads // groups * queries, keys)
    return (rows @ values[:, :, :keys]).view(batch, heads, queries, values.shape[-1])


def _by_head(x: Float[Tensor, "B L n"], heads: int) -> Float[Tensor, "B H L Dv"]:
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)
