"""The attention maps of the first tokens of texts, head by head: which heads are like which.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference" (paper 066, arXiv 2403.08058).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.function import weights_of
from polyhead.attend.masks import causal
from polyhead.checks import number, several, whole
from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores
from polyhead.heads.clustering import average_linkage, cosine_distances, error_of, first_flat
from polyhead.heads.inputs import run, text_model
from polyhead.hf import Call, attach
from polyhead.hf.handles import keys_of
from polyhead.tasks.reading import evaluating, texts

__all__ = ["Counts", "HeadMaps", "counts_of", "head_maps", "maps_of"]

Counts = int | Sequence[int | None]


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """The maps of the first tokens of some texts.

    Attributes:
        layers: for each attention layer `(N, H, n · n)`, text by text; None without causal self-attention.
        tokens: n.
    """

    layers: tuple[Tensor | None, ...]
    tokens: int

    def similarity(self) -> HeadScores:
        """How like each head's map is to the likest other one: cosine, mean over texts; NaN if alone."""
        found: list[Any] = []
        for maps in self.layers:
            if maps is None or maps.shape[1] == 1:
                found.append(torch.full((1 if maps is None else maps.shape[1],), torch.nan))
                continue
            mean = torch.stack([1 - cosine_distances(one) for one in maps]).mean(0)
            found.append(mean.fill_diagonal_(-1.0).amax(1).numpy())
        return HeadScores(
            tuple(found),
            name="map_similarity",
            meaning=f"cosine of the maps of {self.tokens} tokens of the head and of the one most like it",
            direction="higher: more alike",
        )

    def errors(self) -> tuple[Tensor | None, ...]:
        """Per layer `(H,)`: the error of k-means with 1..H clusters, summed over texts."""
        return tuple(
            None
            if maps is None
            else torch.tensor([sum(error_of(one, c) for one in maps) for c in range(1, maps.shape[1] + 1)])
            for maps in self.layers
        )

    def counts(self, drop: float = 0.05) -> list[int | None]:
        """Clusters for each layer: the fewest after which one more saves less than `drop` of one's error."""
        drop = number("counts: drop", drop, above=0, most=1)
        return [None if errors is None else first_flat(errors, drop) for errors in self.errors()]

    def labels(self, counts: Counts) -> list[Tensor | None]:
        """Clusters once for all texts, by mean maps: per layer `(H,)`, for `clustered(labels=)`."""
        heads = [None if maps is None else maps.shape[1] for maps in self.layers]
        return [
            None if maps is None or c is None else average_linkage(cosine_distances(maps.mean(0)), c)
            for maps, c in zip(self.layers, counts_of(counts, heads), strict=True)
        ]


def head_maps(
    model: nn.Module,
    tokenizer: Any = None,
    text: str | Sequence[str] | Tensor | None = None,
    *,
    tokens: int = 5,
) -> HeadMaps:
    """The attention maps of the first tokens of texts, of every head: what `clustered` goes by.

    Args:
        model: a transformers decoder; it is given back as it was.
        tokenizer, text: what the model reads, as for `polyhead.profile`: several texts, or ids `(N, S)`, to
            know of more than one. No more than their first `tokens` tokens are read.
        tokens: n.
    """
    whole("head_maps: tokens", tokens, 2)
    if text is None:
        from polyhead.tasks import sample_text

        text = sample_text()
    read = [
        ids[:tokens] for ids in texts(model, tokenizer, text, None if isinstance(text, Tensor) else tokens)
    ]
    if any(len(ids) < tokens for ids in read):
        raise ConfigError(f"head_maps: every text must have at least {tokens} tokens")
    found: dict[int, list[Tensor]] = {}

    def look(call: Call) -> Tensor:
        if call.layer.kind == "decoder":
            found.setdefault(call.layer.index, []).append(maps_of(call, call.q, keys_of(call)))
        return call.proceed()

    with evaluating(model), attach(model) as attachment, attachment.handling(look):
        device = next(model.parameters()).device
        for ids in read:
            run(text_model(model), {"input_ids": ids[None].to(device)})
        count = len(attachment.layers)
    return HeadMaps(tuple(torch.cat(found[n]) if n in found else None for n in range(count)), tokens)


def maps_of(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """Causal weights `(B, H, n, n)` in rows `(B, H, n · n)`."""
    how: dict[str, Any] = {"score": call.score, "normalizer": call.normalizer, "scale": call.scale}
    return weights_of(q, k, mask=causal(), **how).detach().double().cpu().flatten(2)


def counts_of(counts: Counts, heads: Sequence[int | None]) -> list[int | None]:
    """As many clusters as are wanted of each layer; an error if a layer has fewer heads."""
    if several(counts):
        found = list(counts)  # type: ignore[arg-type]
        if len(found) != len(heads):
            raise ConfigError(
                f"clustered: the model has {len(heads)} attention layers, but {len(found)} counts are given"
            )
    else:
        whole("clustered: counts", counts, 1)
        found = [None if n is None else counts for n in heads]  # type: ignore[misc]
    for layer, (count, most) in enumerate(zip(found, heads, strict=True)):
        if count is None:
            continue
        if most is None:
            raise ConfigError(f"clustered: layer {layer} is no causal self-attention; give None for it")
        whole(f"clustered: the count of layer {layer}", count, 1, most)
    return found
