"""Attention whose maps come from a sequence that is always the same, so that they do not depend on the input.

    q, k = e W_Q, e W_K,   v = x W_V,   head_h = softmax(q_h k_gᵀ / √D) v_g

with e: (n, d) noise, `random_embeddings`, or the embeddings of a text, `fixed_sequence`. It is kept in the
module's state and not trained; W_Q and W_K are. Token t of any input looks where token t of that sequence
would look. Two of the paper's probes of what attention needs: the layer still mixes tokens, and learns how,
but what they say has no part in it.

By itself a module reads e as it stands. In an `AttentionStack` e goes through the layers beside the input,
once for the whole batch, and layer n reads what has become of it there, behind the norm of the layer. The
stack takes another sequence with `sequence=`, such as the embeddings of a real model, with gradients; a
module with `embeddings=`.

Cost: as grouped-query attention, in a stack once more for e as one item of a batch. The keys are kept with
the values, though they are the same for every input. Self-attention only; n = 2048 tokens by default.

Paper 010: Deconstructing Attention, Investigating Design Principles for Effective Language Modeling, arXiv
2510.11602, its RndEmbQK and FixedSeqQK. Noise of deviation 1, and that a layer reads e behind its norm, are
our readings. The module has no embeddings of tokens: by default the text is the first n bytes of the English
sample that comes with Polyhead, each kind of byte with a vector drawn once.
"""

from __future__ import annotations

from functools import partial
from importlib import resources
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.checks import given, number
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.mechanisms.config import without_context
from polyhead.mechanisms.registry import register
from polyhead.mechanisms.static_embeddings import StaticAttention, StaticEmbeddings
from polyhead.nn.inputs import check_inputs
from polyhead.nn.kv_cache import ContextCache, KeyValueCache
from polyhead.nn.projections import at_least_one
from polyhead.nn.stack import rows_of

__all__ = ["FixedMapAttention", "FixedSequence", "RandomEmbeddings"]

_TITLE = "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling"


class FixedMapAttention(StaticAttention):
    """Static attention whose embeddings are a sequence of its own.

    Args:
        sequence: e `(n, d)`; kept as a buffer.
        called: what messages call the mechanism.
        parts, options: as of `MultiHeadAttention`.
    """

    takes_embeddings = "sequence"
    sequence: Tensor

    def __init__(self, *parts: Any, sequence: Tensor, called: str, **options: Any) -> None:
        super().__init__(*parts, **options)
        weight = self.projection.query.weight
        self.register_buffer("sequence", sequence.to(device=weight.device, dtype=weight.dtype))
        self.called = called

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        context: Float[Tensor, "B S dc"] | None = None,
        *,
        embeddings: Float[Tensor, "B L d"] | None = None,
        cache: KeyValueCache | None = None,
        **call: Any,
    ) -> Float[Tensor, "B L d"]:
        """Attend; see `MultiHeadAttention.forward`.

        Args:
            x, context, cache, call: as there; context None.
            embeddings: of the tokens of x in the sequence, `(B, L, d)` or `(1, L, d)`; default those of the
                module, by the index of a token in its input. Positions that are given turn queries and keys,
                and change nothing here.
        """
        if context is not None:
            raise self._without_context()
        check_inputs("x", x, self.projection.query.in_features)
        if embeddings is None:
            first = cache.length if isinstance(cache, KeyValueCache) else 0
            embeddings = rows_of(self.sequence, first, x.shape[1])
        if isinstance(embeddings, Tensor) and embeddings.ndim == 3 and len(embeddings) == 1:
            embeddings = embeddings.expand(len(x), -1, -1)
        return super().forward(x, embeddings=embeddings, cache=cache, **call)

    def new_context_cache(self, *args: Any, **options: Any) -> ContextCache:
        """There is none.

        Raises:
            UnsupportedPattern: always.
        """
        raise self._without_context()

    def _without_context(self) -> UnsupportedPattern:
        return UnsupportedPattern(
            f"{self.called} looks at places of its own sequence and cannot look at a context; "
            "allowed are calls with x alone"
        )


class _FixedMaps(StaticEmbeddings):
    """What the two share.

    Attributes:
        length: n, the most tokens that there can be.
        seed: what the sequence is drawn from.
    """

    length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(type(self).__name__, length=self.length)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an integer; got {given(self.seed)}")
        without_context(self)
        super().__post_init__()

    def _drawn(self, count: int, device: Any) -> Tensor:
        if torch.device("cpu" if device is None else device).type == "meta":
            return torch.empty(count, self.dim, device="meta")
        return torch.randn(count, self.dim, generator=torch.Generator().manual_seed(self.seed))

    def _sequence(self, device: Any) -> Tensor:
        raise NotImplementedError

    def _fixed(self, called: str, device: Any, dtype: Any) -> FixedMapAttention:
        module = partial(FixedMapAttention, sequence=self._sequence(device), called=called)
        return self._static(module, device, dtype)


@register(
    "random_embeddings",
    aliases=("rnd_emb_qk",),
    paper="010",
    title=_TITLE,
    family="ablation",
    summary="queries and keys of fixed noise: where a token looks is learned, and the same for every input",
    equation="head_h = softmax(q_h k_gᵀ / √D) v_g,  q, k = e W_Q, e W_K with e fixed noise,  v = x W_V",
    supports=frozenset({"self", "causal_self"}),
)
class RandomEmbeddings(_FixedMaps):
    """Attention with the maps of noise.

    Attributes:
        deviation: σ of the noise.
    """

    deviation: float = 1.0

    def __post_init__(self) -> None:
        number("deviation", self.deviation, above=0, most=1e15)
        super().__post_init__()

    def _sequence(self, device: Any) -> Tensor:
        return self.deviation * self._drawn(self.length, device)

    def build(self, *, device: Any = None, dtype: Any = None) -> FixedMapAttention:
        """The module."""
        return self._fixed("random_embeddings", device, dtype)


@register(
    "fixed_sequence",
    aliases=("fixed_seq_qk",),
    paper="010",
    title=_TITLE,
    family="ablation",
    summary="queries and keys of a fixed text: where a token looks is learned, and the same for every input",
    equation="head_h = softmax(q_h k_gᵀ / √D) v_g,  q, k = e W_Q, e W_K with e a fixed text,  v = x W_V",
    supports=frozenset({"self", "causal_self"}),
)
class FixedSequence(_FixedMaps):
    """Attention with the maps of a text."""

    def _sequence(self, device: Any) -> Tensor:
        table = self._drawn(256, device)
        text = resources.files("polyhead").joinpath("data", "sample.txt").read_bytes()
        if self.length > len(text):
            raise ConfigError(f"length must be at most {len(text)}, the bytes of the text; got {self.length}")
        return table[torch.tensor(list(text[: self.length]), device=table.device)]

    def build(self, *, device: Any = None, dtype: Any = None) -> FixedMapAttention:
        """The module."""
        return self._fixed("fixed_sequence", device, dtype)
