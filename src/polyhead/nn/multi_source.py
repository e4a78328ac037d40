"""Attention to several sources, whose contexts are put together in one of three ways.

A sentinel is one more of what is found: a context of its own, or heads and the log-sum-exp of one logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.function import attend
from polyhead.attend.masks import Mask, causal
from polyhead.attend.precision import wide
from polyhead.checks import given, several
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.contract import AttentionModule
from polyhead.nn.cost import CallShape, Cost
from polyhead.nn.kv_cache import ContextCache, Kept, KeyValueCache
from polyhead.nn.kv_cache.base import Streams
from polyhead.nn.projections import OutputProjection, Projection
from polyhead.nn.sentinel import Sentinel, SentinelContext, SentinelKey
from polyhead.nn.stack import StackCache

__all__ = ["Concatenated", "Flat", "Hierarchical", "MultiSourceAttention", "SourceAttention", "SourceHeads"]

# the heads of a source or what became of them, and the log-sum-exp of its logits where it is wanted
Sourced = tuple[Tensor, Tensor | None]


class SourceHeads(nn.Module):
    """Hands on the heads of a source as they are."""

    def forward(self, found: Sourced) -> Sourced:
        return found

    def flops(self, queries: int) -> int:
        """None."""
        return 0


class SourceOutput(OutputProjection):
    """The output projection of a source."""

    def forward(self, found: Sourced) -> Sourced:  # type: ignore[override]
        return super().forward(found[0]), found[1]


class SourceAttention(MultiHeadAttention):
    """Attention to one of several sources; it gives the log-sum-exp `(B, H, L)` of its logits besides.

    Attributes:
        always: whether it gives that always, and not only where a row may see nothing.
    """

    always = False
    _seen: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def _weights(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> Tensor:
        return super()._weights(q, rows, **options)

    def _lose(self, q: Tensor, kept: Kept, real: Tensor | None, **options: Any) -> None:
        if not self.always:
            super()._lose(q, kept, real, **options)
        elif self.training:  # a part of rows that go over all sources
            self._seen = self._weights(q, kept.rows, **options), real, kept.padding

    def seen(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weights of the call just made, and which queries and keys are real; they are not held on to."""
        assert self._seen is not None
        found, self._seen = self._seen, None
        return found

    def _mix(self, q: Tensor, rows: tuple[Tensor, ...], **options: Any) -> Sourced:  # type: ignore[override]
        k, v = rows
        q, mask = self.projection.spread(q), options["mask"]
        sees = mask is None or (mask == causal() and k.shape[2] >= q.shape[2])
        if sees and k.shape[2] and not self.always:
            return attend(q, k, v, **options), None
        if self.always or "normalizer" not in options:
            return attend(q, k, v, **options, return_lse=True)
        # whether a row sees a key does not hang on how its logits become weights
        alone = {"mask": mask, "return_lse": True}
        return attend(q, k, v, **options), attend(q[..., :1], k[..., :1], v[..., :1], **alone)[1]

    def _regularized(self, heads: Sourced) -> Sourced:  # type: ignore[override]
        return super()._regularized(heads[0]), heads[1]


class SourceCaches(StackCache, KeyValueCache):  # type: ignore[override]
    """One cache for every source."""


class Flat(nn.Module):
    """One softmax over the tokens of all sources: Σ_k P(k) head^k, P(k) = softmax_k(log-sum-exp of k).

    Args:
        output: brings the heads back.

    Attributes:
        takes: the kind of sentinel that may be among them; None: it has no place there.
    """

    takes = SentinelKey

    def __init__(self, output: OutputProjection) -> None:
        super().__init__()
        self.output = output

    def shares(self, x: Tensor, found: Sequence[Sourced]) -> Tensor:
        """P, `(B, H, L, K)`: the weight of all tokens of a source; zeros where none shows any."""
        lse = torch.stack([one[1] for one in found if one[1] is not None], dim=-1)
        top = lse.detach().amax(-1, keepdim=True)
        powers = (lse - top.masked_fill(top == -torch.inf, 0.0)).exp()
        total = powers.sum(-1, keepdim=True)
        return powers / total.masked_fill(total == 0, 1.0)

    def forward(self, x: Tensor, found: Sequence[Sourced]) -> Tensor:
        shares = self.shares(x, found)
        heads = torch.stack([one[0] for one in found], dim=-1)  # B H L Dv K
        return self.output((heads * shares[..., None, :].to(heads.dtype)).sum(-1))

    def flops(self, length: int, batch: int, sources: int) -> tuple[int, int, int]:
        """Operations of projections, scores and values, beyond those of the sources."""
        return batch * self.output.flops(length), 0, 0


class Concatenated(nn.Module):
    """The contexts side by side, mapped back by one matrix: Σ_k concat_h(head^k_h) W_k."""

    takes = None

    def __init__(self, outputs: Sequence[OutputProjection]) -> None:
        super().__init__()
        self.outputs = nn.ModuleList(outputs)

    def forward(self, x: Tensor, found: Sequence[Sourced]) -> Tensor:
        return torch.stack([out(one[0]) for out, one in zip(self.outputs, found, strict=True)]).sum(0)

    def flops(self, length: int, batch: int, sources: int) -> tuple[int, int, int]:
        """See `Flat.flops`."""
        return batch * sum(out.flops(length) for out in self.outputs), 0, 0  # type: ignore[operator]


class Hierarchical(nn.Module):
    """A second attention, from a token to its K contexts; sources that it sees nothing of drop out.

    Args:
        projection: of its queries, keys and values.
        output: brings its heads back.
    """

    takes = SentinelContext

    def __init__(self, projection: Projection, output: OutputProjection) -> None:
        super().__init__()
        self.projection = projection
        self.output = output

    def _attended(self, x: Tensor, found: Sequence[Sourced]) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        contexts = torch.stack([one[0] for one in found], dim=2)  # B L K d
        q = self.projection.queries(x).transpose(1, 2)  # B L H D
        k, v = self.projection.keys_values(contexts.flatten(1, 2))
        k, v = (t.unflatten(2, (length, len(found))).permute(0, 2, 1, 3, 4) for t in (k, v))  # B L H K D
        logits = (k @ q[..., None])[..., 0]
        logits = logits.to(wide(logits.dtype)) * self.projection.head_dim**-0.5
        if any(one[1] is not None for one in found):
            every = torch.ones(batch, length, dtype=torch.bool, device=x.device)
            seen = [every if one[1] is None else (one[1] > -torch.inf).any(1) for one in found]
            hidden = ~torch.stack(seen, dim=-1)[:, :, None]
            nothing = hidden.all(-1, keepdim=True)
            logits = logits.masked_fill(hidden & ~nothing, -torch.inf)
            return logits.softmax(-1).masked_fill(nothing, 0.0), v
        return logits.softmax(-1), v

    def shares(self, x: Tensor, found: Sequence[Sourced]) -> Tensor:
        """β, `(B, H, L, K)`."""
        return self._attended(x, found)[0].transpose(1, 2)

    def forward(self, x: Tensor, found: Sequence[Sourced]) -> Tensor:
        weights, v = self._attended(x, found)
        heads = (weights[..., None, :].to(v.dtype) @ v)[..., 0, :]  # B L H Dv
        return self.output(heads.transpose(1, 2))

    def flops(self, length: int, batch: int, sources: int) -> tuple[int, int, int]:
        """See `Flat.flops`."""
        made = self.projection
        pairs = 2 * batch * length * made.heads * sources
        own = batch * (made.flops(length, length * sources) + self.output.flops(length))
        return own, pairs * made.head_dim, pairs * made.value_dim


class MultiSourceAttention(AttentionModule):
    """Attention from `x` to K sources.

    A context may be a sequence of K tensors `(B, S_k, ·)`, and its padding one of K; one tensor stands for
    all sources, and none for `x`. Masks count positions in every source by itself.

    Args:
        sources: a `SourceAttention` for every source.
        combine: `Flat`, `Hierarchical` or `Concatenated`.
        sentinel: what a token always sees besides, of the kind that `combine` takes: a `SentinelKey` for
            `Flat`, a `SentinelContext` for `Hierarchical`. Default none.
    """

    def __init__(
        self,
        sources: Sequence[SourceAttention],
        combine: Flat | Hierarchical | Concatenated,
        sentinel: Sentinel | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise ConfigError("sources must have at least one module; got none")
        if sentinel is not None and (combine.takes is None or not isinstance(sentinel, combine.takes)):
            wanted = "None" if combine.takes is None else f"a {combine.takes.__name__}, or None,"
            raise ConfigError(
                f"sentinel must be {wanted} for {type(combine).__name__}; got {given(sentinel)}"
            )
        self.sources: Any = nn.ModuleList(sources)
        self.combine = combine
        self.sentinel = sentinel
        for source in sources:
            source.always = isinstance(combine, Flat)

    @property
    def streams(self) -> Streams:
        return tuple(stream for source in self.sources for stream in source.streams)

    def _each(self, name: str, value: Any) -> tuple[Any, ...]:
        if value is None or isinstance(value, Tensor):
            return (value,) * len(self.sources)
        if not several(value) or len(tuple(value)) != len(self.sources):
            raise ShapeError(
                f"{name} must be a tensor, or a sequence of {len(self.sources)}, one for each source; got "
                f"{given(value)}"
            )
        return tuple(value)

    def _found(
        self,
        x: Tensor,
        context: Any = None,
        *,
        mask: Mask | None = None,
        padding: Any = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, list[Sourced]]:
        """The inputs, zero at padding, and what is found in every source, and in the sentinel."""
        held: tuple[Any, ...] = (cache,) * len(self.sources)
        if isinstance(cache, SourceCaches) and len(cache.layers) == len(self.sources):
            held = cache.layers
        elif cache is not None:
            raise ConfigError(
                f"cache must be what new_cache or new_context_cache of this module gives; got {given(cache)}"
            )
        paddings = self._each("padding", padding)
        calls = zip(self.sources, self._each("context", context), paddings, held, strict=True)
        found: list[Sourced] = [
            source(x, own, mask=mask, padding=real, positions=positions, cache=kept)
            for source, own, real, kept in calls
        ]
        if context is None and all(real is not None for real in paddings):
            x = x.masked_fill(~torch.stack(paddings).any(0)[..., None], 0.0)
        if self.sentinel is not None:
            found.append(self.sentinel(x))
        return x, found

    def forward(self, x: Tensor, context: Any = None, **call: Any) -> Tensor:
        x, found = self._found(x, context, **call)
        if self.training and self.sources[0].loses and isinstance(self.combine, Flat):
            self._lose(self.combine.shares(x, found)[..., : len(self.sources)])
        return self.combine(x, found)

    def _lose(self, shares: Tensor) -> None:
        """Leave with the first source what the regularizers lose by the weights of all sources together.

        The rows are without the weight of a sentinel, which is no token that others could look at too.
        """
        seen = [source.seen() for source in self.sources]
        parts = [one[0] * share[..., None] for one, share in zip(seen, shares.unbind(-1), strict=True)]
        weights, keys = torch.cat(parts, dim=-1), None
        if any(one[2] is not None for one in seen):
            every = (one[0].new_ones(len(one[0]), one[0].shape[-1], dtype=torch.bool) for one in seen)
            pairs = zip(seen, every, strict=True)
            keys = torch.cat([whole if one[2] is None else one[2] for one, whole in pairs], dim=1)
        first = self.sources[0]
        for part in first.regularizers:
            for name, loss in part.losses(weights, queries=seen[0][1], keys=keys).items():
                first.auxiliary.record(name, loss)

    def source_shares(self, x: Tensor, context: Any = None, **call: Any) -> Tensor:
        """How much every head of every token takes from each source, `(B, H, L, K)`, for a call as `forward`.

        Flat: the sum of its weights over the source's tokens. Hierarchical: the weights of the second
        attention. With a sentinel it is `(B, H, L, K + 1)`, and the last is the sentinel's.
        """
        if isinstance(self.combine, Concatenated):
            raise ConfigError("contexts that are put side by side have no shares; combine is Concatenated")
        return self.combine.shares(*self._found(x, context, **call))

    def new_cache(self, batch: int = 1, **options: Any) -> SourceCaches:
        return SourceCaches([source.new_cache(batch, **options) for source in self.sources])

    def new_context_cache(  # type: ignore[override]
        self, context: Any, *, padding: Any = None, queries: int | None = None
    ) -> SourceCaches:
        calls = zip(self.sources, self._each("context", context), self._each("padding", padding), strict=True)
        caches: list[ContextCache] = [
            source.new_context_cache(own, padding=real, queries=queries) for source, own, real in calls
        ]
        return SourceCaches(caches)

    def _cost(self, call: CallShape) -> Cost:
        """With all sources `context_length` tokens long; one that is shorter costs less by its share.

        Hierarchical with a normaliser of its own asks besides, under a mask, which tokens see anything of a
        source, by scores of width 1: that is not counted. A sentinel is made anew in every call, and no cache
        holds any of it.
        """
        each = [source._cost(call) for source in self.sources]
        own = self.combine.flops(call.queries, call.batch, len(each) + (self.sentinel is not None))
        if self.sentinel is not None:
            beside = self.sentinel.flops(call.queries, call.batch)
            own = own[0] + beside[0], own[1] + beside[1], own[2] + beside[2]
        return replace(
            each[0],
            parameters=sum(p.numel() for p in self.parameters()),
            projections=sum(one.projections for one in each) + own[0],
            scores=sum(one.scores for one in each) + own[1],
            values=sum(one.values for one in each) + own[2],
            kv_bytes_per_token=sum(one.kv_bytes_per_token for one in each),
            cache_bytes=sum(one.cache_bytes for one in each),
        )
