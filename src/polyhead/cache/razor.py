"""RazorAttention: retrieval heads found by repeated random tokens, and a token for all that the rest drop.

    heads = razor.retrieval_heads(model, tokenizer)
    cache = per_head(model, full=heads, sink=4, window=256, prefill="dense", compensate=True)

Two kinds of heads carry what lies far back: echo heads look at earlier occurrences of the current token,
induction heads at the token that followed one. They keep the whole context. Every other head keeps the
first tokens, a local window, and one compensation token: the mean key and value of the N tokens that it
dropped, with log N added to its logit (`polyhead.cache.dropped`). Where those N tokens are alike nothing is
lost, and nothing is lost before the first is dropped.

The paper compresses after an exact prefill, `prefill="dense"`; with `prefill="masked"` every token of the
prompt sees its own compensation token as well, so that the result does not depend on how the prompt is cut.
Its windows are max(4000, N / 5) tokens long; the published code has 256. The paper's rule for models with
ALiBi, which needs no probe, is not here.

Paper: RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv 2407.15891.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from polyhead.errors import ConfigError
from polyhead.head_scores import Heads, HeadScores
from polyhead.heads import profile
from polyhead.heads.inputs import Repeats
from polyhead.heads.measurements.repeats import DuplicateToken, Induction
from polyhead.tasks.reading import context_length

__all__ = ["Probe", "probe", "retrieval_heads"]


class Probe(NamedTuple):
    """What the probe says of each KV head, the maximum over the query heads that read it.

    Attributes:
        echo: mean attention to earlier occurrences of the current token.
        induction: mean attention to the tokens that followed them.
    """

    echo: HeadScores
    induction: HeadScores


def probe(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    length: int | None = None,
    repeats: int = 4,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Probe:
    """Have the model read random tokens, repeated, and measure echo and induction of every KV head.

    Args:
        model: a transformers model of one sequence of tokens.
        tokenizer: its tokenizer, which says what stands at the beginning of a text.
        length: tokens before they repeat. Default: 2500 as in the paper, or as many as fit the model.
        repeats: how often they stand there.
        seed: of the random tokens.
        progress: called as progress(what, done, total) after each layer.

    Raises:
        ConfigError: the repeats do not fit the model.
    """
    limit = context_length(model)
    if length is None:
        known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        length = min([2500, known // 4] + ([] if limit is None else [(limit - 2) // max(repeats, 1)]))
    elif limit is not None and length * repeats > limit:
        raise ConfigError(
            f"length={length} tokens {repeats} times are more than the {limit} that the model can read; use "
            f"length={limit // repeats - 1} or less"
        )
    source = Repeats(length, repeats, 1)
    echo, induction = DuplicateToken(source), Induction(source)
    nothing = torch.arange(2)  # no measurement asks for a text
    found = profile(model, tokenizer, nothing, measurements=[echo, induction], seed=seed, progress=progress)
    return Probe(found[echo.name].by_kv_head("max"), found[induction.name].by_kv_head("max"))


def retrieval_heads(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    echo: float = 0.01,
    induction: float = 0.14,
    probed: Probe | None = None,
    length: int | None = None,
    repeats: int = 4,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Heads:
    """The KV heads that keep the whole context: the best by induction, and the best by echo.

    Args:
        model, tokenizer, length, repeats, seed, progress: as for `probe`.
        echo, induction: the share of all KV heads that is taken by each; at least one head unless it is 0.
        probed: what `probe` found, to choose again without reading again.
    """
    for name, share in (("echo", echo), ("induction", induction)):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"{name} must be a share of the heads between 0 and 1; got {share!r}")
    if probed is None:
        probed = probe(model, tokenizer, length=length, repeats=repeats, seed=seed, progress=progress)
    return _best(probed.induction, induction) | _best(probed.echo, echo)  # type: ignore[return-value]


def _best(scores: HeadScores, share: float) -> Heads:
    return scores.top(max(1, round(share * len(scores))) if share else 0)
