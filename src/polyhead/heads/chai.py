"""Clustered heads: in a layer, heads with like attention maps use one of them, each with its own values.

    maps = ph.heads.head_maps(model, tokenizer, texts)           # once: maps of the first tokens of texts
    with ph.heads.clustered(model, maps.counts()) as sharing:    # as many clusters a layer as the bend says
        model.generate(**inputs)
    sharing.saved()

In every layer, and for every sequence, the first n = 5 tokens are read with all heads. The maps of heads h,
F_h = softmax of the n × n causal scores, are clustered by average linkage of their cosine distances; and from
then on, in the rest of the prompt and in decoding, a cluster c with the representative r has

    A_c = softmax(scale · q_r Kᵀ_r + mask),        output of each of its heads h:  A_c V_h

Values are never shared. Nothing is trained.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference" (paper 066, arXiv 2403.08058).

Our readings: membership by average linkage, as the published code has it, where the text speaks of k-means;
the maps are causal. How many clusters a layer has, the paper reads off curves by eye; here it is the smallest
number after which one more saves less than `drop` of the error. Where query heads share keys and values,
query heads are clustered, and members that share values, too, have the same output.

What is saved: products of queries and keys, by the share of representatives, and their softmax. Keys of heads
that no representative reads need not be kept; transformers' caches keep all heads of a layer, so that this is
not saved here but counted, by `Sharing.saved`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from polyhead.attend import attend
from polyhead.attend.masks import some_of
from polyhead.attend.selectors.visible import real_keys
from polyhead.checks import given, is_integer_tensor, several, whole
from polyhead.errors import ConfigError, ShapeError, unknown_name
from polyhead.heads.clustering import average_linkage, cosine_distances, medoids
from polyhead.heads.head_maps import Counts, counts_of, maps_of
from polyhead.heads.shared_maps import shared_attention
from polyhead.hf import Call, LayerInfo, attach
from polyhead.hf.handles import keys_of

__all__ = ["Saved", "Sharing", "clustered"]


@dataclass(frozen=True)
class Saved:
    """What clusters save, as shares.

    Attributes:
        scores: of the products of queries and keys behind the first tokens.
        keys: of the cached keys, which nothing reads: what a cache that drops them would save of keys.
        cache: of cached keys and values together.
    """

    scores: float
    keys: float
    cache: float


class Sharing:
    """The handler of `clustered`, and what it knows of the sequences at hand.

    Args:
        layers: all attention layers of the model.
        counts: by layer the number of clusters; None for one that stays as it is.
        tokens: n, read with all heads before clusters are made.
        by: the head that stands for a cluster, "first" or "medoid".
        fixed: by layer clusters once for all, integers `(H,)`; None: each sequence has its own.

    Attributes:
        labels: by layer the cluster of every head, `(B, H)`; None before the first tokens are read.
        representatives: by layer the head whose map each head uses, `(B, H)`.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        counts: Sequence[int | None],
        tokens: int,
        by: str,
        fixed: Sequence[Tensor | None] | None,
    ) -> None:
        self.layers, self.counts, self.tokens, self.by = tuple(layers), tuple(counts), tokens, by
        self.fixed = fixed
        self.labels: list[Tensor | None] = [None] * len(layers)
        self.representatives: list[Tensor | None] = [None] * len(layers)
        # queries, keys and which are real, while the first tokens are not all there
        self._early: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def saved(self) -> Saved:
        """Means over sequences and all layers of causal self-attention, clustered or not."""
        scores, keys = [], []
        for layer, used in zip(self.layers, self.representatives, strict=True):
            if layer.kind != "decoder":
                continue
            if used is None:
                scores.append(0.0)
                keys.append(0.0)
                continue
            group = layer.heads // layer.kv_heads
            for row in used:
                scores.append(1 - len(row.unique()) / layer.heads)
                keys.append(1 - len((row // group).unique()) / layer.kv_heads)
        mean = sum(keys) / max(1, len(keys))
        return Saved(sum(scores) / max(1, len(scores)), mean, mean / 2)

    def __call__(self, call: Call) -> Tensor:
        index = call.layer.index
        count = self.counts[index]
        if count is None or count == call.layer.heads:
            return call.proceed()
        k, v = keys_of(call), call.v
        assert isinstance(v, Tensor)
        batch, heads, queries, _ = call.q.shape
        past = k.shape[2] - queries
        if self.fixed is not None:
            labels = self.fixed[index]
            assert labels is not None
            self._put(index, 0, batch, heads, labels, _firsts(labels))
            dense = torch.zeros(batch, dtype=torch.int64)
        else:
            dense = self._read(call, k, past)
        most = int(dense.max())
        if bool((dense == queries).all()):
            return call.proceed()
        out = call.q.new_zeros(batch, heads, queries, v.shape[-1])
        if most:
            early = slice(None, past + most)
            # of all items and heads: what has sizes of its own must not look for them in keys that are cut
            mask = None if call.mask is None else some_of(call.mask, batch=torch.arange(batch))
            out[:, :, :most] = attend(
                call.q[:, :, :most],
                k[:, :, early],
                v[:, :, early],
                mask=mask,
                score=call.score,
                normalizer=call.normalizer,
                scale=call.scale,
            )
        used = self.representatives[index]
        assert used is not None
        kinds: dict[tuple[int, ...], list[int]] = {}
        for item in range(batch):
            if int(dense[item]) < queries:
                kinds.setdefault((*used[item].tolist(), int(dense[item])), []).append(item)
        for (*chosen, first), items in kinds.items():
            at = torch.tensor(items, device=out.device)
            out[at, :, first:] = shared_attention(
                call.q[at][:, :, first:],
                k[at],
                v[at],
                chosen,
                mask=call.mask,
                items=items,
                score=call.score,
                normalizer=call.normalizer,
                scale=call.scale,
            )
        return out

    def _put(self, index: int, item: int, batch: int, heads: int, labels: Tensor, used: Tensor) -> None:
        """Note the clusters of an item; of all items if the labels are fixed."""
        own, chosen = self.labels[index], self.representatives[index]
        if own is None or chosen is None or len(own) != batch:
            own, chosen = (torch.zeros(batch, heads, dtype=torch.int64) for _ in range(2))
            self.labels[index], self.representatives[index] = own, chosen
        rows = slice(None) if self.fixed is not None else slice(item, item + 1)
        own[rows], chosen[rows] = labels, used[labels]

    def _read(self, call: Call, k: Tensor, past: int) -> Tensor:
        """How many of each item's queries come before its clusters are known, `(B,)`; and make them known."""
        index, count = call.layer.index, self.counts[call.layer.index]
        assert count is not None
        batch, heads, queries, _ = call.q.shape
        if past == 0 and call.start == 0:
            nobody = torch.zeros(batch, 0, dtype=torch.bool)
            self._early[index] = (call.q[:, :, :0].detach(), k[:, :, :0].detach(), nobody)
            self.labels[index] = self.representatives[index] = None
        if index not in self._early and self.labels[index] is None:
            raise ConfigError(
                f"layer {call.layer.name!r} goes on from {call.start + past} tokens of which the first were "
                "not seen; read the prompt within clustered(...) too"
            )
        early = self._early.get(index)
        if early is None:
            return torch.zeros(batch, dtype=torch.int64)
        if len(early[0]) != batch:
            raise ConfigError("the batch has changed before the first tokens of all its sequences were read")
        # kept here, as a layer with a sliding window may have dropped the first keys already
        seen = early[0].shape[2]
        real = real_keys(call.mask, torch.device("cpu"))
        real = torch.ones(1, queries, dtype=torch.bool) if real is None else real[:, past:]
        q = torch.cat([early[0], call.q.detach()], 2)
        k = torch.cat([early[1], k[:, :, past:].detach()], 2)
        real = torch.cat([early[2], real.expand(batch, -1)], 1)
        ranks = real.cumsum(1)
        dense = torch.full((batch,), queries)
        for item in range(batch):
            enough = (ranks[item] == self.tokens).nonzero().view(-1)
            if not len(enough):
                continue
            dense[item] = max(0, int(enough[0]) + 1 - seen)
            if int(enough[0]) < seen:
                continue  # known since an earlier call
            at = real[item].nonzero().view(-1)[: self.tokens].to(q.device)
            far = cosine_distances(maps_of(call, q[item : item + 1, :, at], k[item : item + 1, :, at])[0])
            labels = average_linkage(far, count)
            used = medoids(far, labels) if self.by == "medoid" else _firsts(labels)
            self._put(index, item, batch, heads, labels, used)
        if bool((ranks[:, -1] >= self.tokens).all()):
            del self._early[index]
        else:
            self._early[index] = (q, k, real)
        return dense


def _firsts(labels: Tensor) -> Tensor:
    """The first head of every cluster."""
    return torch.stack([(labels == n).nonzero()[0, 0] for n in range(int(labels.max()) + 1)])


@contextmanager
def clustered(
    model: nn.Module,
    counts: Counts,
    *,
    tokens: int = 5,
    representative: Literal["first", "medoid"] = "first",
    labels: Sequence[Tensor | None] | None = None,
) -> Iterator[Sharing]:
    """Within the block, heads with like maps use one of them.

    Clusters are made for each sequence when its first tokens have been read, and stay until the next sequence
    begins. Padding does not count. With as many clusters as heads a layer is as it was.

    Args:
        model: a transformers decoder. It is as it was after the block, also after an error.
        counts: clusters of each layer, 1 to H; a number for all layers of causal self-attention, or one a
            layer, such as `head_maps(...).counts()`, None for those that stay as they are. The paper keeps
            early layers whole.
        tokens: n, read with all heads.
        representative: the head of a cluster with the smallest number, as in the published code; or the one
            that is nearest to the others in the mean.
        labels: clusters once for all instead, `(H,)` by layer, such as `head_maps(...).labels(counts)`
            (CHAI-static); all tokens are read with them.

    Yields:
        The `Sharing`.

    Raises:
        ConfigError: the counts or labels do not fit the model; or, in a forward pass, the keys are in a cache
            that holds no tensors, or the first tokens were read outside of the block.
        UnsupportedModel: the model's attention cannot be replaced.
    """
    whole("clustered: tokens", tokens, 1)
    if representative not in ("first", "medoid"):
        raise unknown_name("clustered: representative", representative, ("first", "medoid"))
    with attach(model) as attachment:
        heads = [layer.heads if layer.kind == "decoder" else None for layer in attachment.layers]
        found = counts_of(counts, heads)
        fixed = None if labels is None else _labels(labels, found, heads)
        sharing = Sharing(attachment.layers, found, tokens, representative, fixed)
        with attachment.handling(sharing):
            yield sharing


def _labels(
    labels: Sequence[Tensor | None], counts: Sequence[int | None], heads: Sequence[int | None]
) -> list[Tensor | None]:
    if not several(labels) or len(labels) != len(heads):
        raise ConfigError(f"clustered: labels must be one tensor (H,) or None a layer; got {given(labels)}")
    found: list[Tensor | None] = []
    for layer, (own, count, most) in enumerate(zip(labels, counts, heads, strict=True)):
        if count is None or count == most:
            found.append(None)
            continue
        if own is None or not is_integer_tensor(own) or own.shape != (most,):
            raise ShapeError(
                f"clustered: labels of layer {layer} must be integers ({most},); got {given(own)}"
            )
        numbered = own.cpu().long().unique(return_inverse=True)[1]
        if int(numbered.max()) + 1 != count:
            raise ConfigError(
                f"clustered: layer {layer} has {int(numbered.max()) + 1} labels and a count of {count}"
            )
        found.append(numbered)
    return found
