"""Which heads an answer needs: the derivative of its log-probability by a gate on every KV head.

    scores = duo.gate_gradients(model, questions, sink=4, window=256)
    cache = per_head(model, full=scores.top(0.5), sink=4, window=256, prefill="dense")

With the gates of DuoAttention (`polyhead.cache.gating`) at α = 1, where the model is as it was,

    score_h = mean over questions of ∂ log p(answer | text, question) / ∂ α_h,

which to first order is by how much the answer loses when KV head h gives up what lies between its sinks and
its window. Gates stand on the tokens of question and answer only, which read the whole keys and values of the
text: what a cache does that forgets after the text was read. So a text costs one reading without gradients,
and all questions about it one forward and one backward pass over their few tokens.

Attention to a fact finds the heads that fetch it; this score can also find earlier ones, which hardly look at
the fact and on which its answer depends. It says nothing of what several heads do together.

It is a first step of the training of gates in DuoAttention: Efficient Long-Context LLM Inference with
Retrieval and Streaming Heads, arXiv 2410.10819, with the answer's log-probability in place of the distance of
hidden states, which has no gradient at α = 1. A head's importance is the same derivative by a factor on its
whole output in Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv 1905.10650, in absolute
value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyhead.cache.gating import Gates, decoder
from polyhead.errors import ConfigError, ShapeError
from polyhead.head_scores import HeadScores
from polyhead.hf import attach
from polyhead.tasks.reading import frozen

__all__ = ["Questions", "gate_gradients"]


class Questions(NamedTuple):
    """A text, and what is asked about it.

    Attributes:
        text: token ids `(S,)`.
        tails: token ids `(N, n)`: N continuations of the text, each a question with its answer. Shorter ones
            are filled up at the end, where nothing that counts can see it.
        answer: bool `(N, n)`: the tokens of the answers. The first token of a tail cannot be one.
    """

    text: Tensor
    tails: Tensor
    answer: Tensor


def gate_gradients(
    model: nn.Module,
    questions: Iterable[Questions],
    *,
    sink: int = 4,
    window: int = 256,
    progress: Callable[[int], None] | None = None,
) -> HeadScores:
    """What the answers lose, to first order, when a KV head keeps sinks and a window only.

    Nothing is drawn here, and the model is given back as it was.

    Args:
        model: a transformers decoder with a language-model head.
        questions: texts with their questions. A head shows only what lies before the window, so that texts
            have to be longer, and the facts asked for further back. Each answer counts alike.
        sink, window: what a head without the context sees, as in the cache that is to be made.
        progress: called as progress(done) after each text.

    Returns:
        For each KV head the mean over all answers of ∂ log p / ∂ α, in nats; NaN in layers without causal
        self-attention. Negative: the answers get better without the context.

    Raises:
        UnsupportedModel: the model is no decoder, or its attention cannot be replaced.
        ConfigError, ShapeError: a value or a shape is not allowed, there is no question, or the model gives
            no logits.
    """
    if sink < 0 or window < 1:
        raise ConfigError(f"gate_gradients needs sink >= 0 and window >= 1; got {sink} and {window}")
    whole = decoder(model, "gate_gradients")
    like = next(model.parameters()).new_zeros((), dtype=torch.float32)
    if next(model.parameters()).dtype == torch.float64:
        like = like.double()
    count = 0
    with frozen(model), attach(model) as attachment:
        gates = Gates(attachment, sink, window, 1.0, like, type(whole).__name__)
        for done, one in enumerate(questions, start=1):
            _check(one)
            cache = _read(whole, one.text.to(like.device)[None], len(one.tails))
            with torch.enable_grad(), attachment.handling(lambda call: gates.mix(call, call.proceed())):
                _log_probability(model, one, cache).backward()
            count += len(one.tails)
            if progress is not None:
                progress(done)
    if not count:
        raise ConfigError("gate_gradients needs at least one text with questions; questions is empty")
    # a layer that no answer depends on has no gradient
    found = {n: torch.zeros_like(a) if a.grad is None else a.grad / count for n, a in gates.alphas.items()}
    return HeadScores(
        gates.by_layer(found),
        name="gate_gradient",
        meaning=(
            "by how much the log-probability of the answers falls, to first order, when the KV head keeps "
            f"{sink} first and {window} recent tokens only"
        ),
        unit="nats",
        direction="higher: needs the whole context",
        level="kv",
    )


def _check(one: Questions) -> None:
    text, tails, answer = one
    if text.ndim != 1 or tails.ndim != 2 or not len(text) or not tails.numel():
        raise ShapeError(
            f"text must be token ids (S,) and tails (N, n), none empty; got {tuple(text.shape)} and "
            f"{tuple(tails.shape)}"
        )
    if answer.shape != tails.shape or answer.dtype != torch.bool:
        raise ShapeError(
            f"answer must be bool of the shape of tails, {tuple(tails.shape)}; got {answer.dtype} "
            f"{tuple(answer.shape)}"
        )
    if bool(answer[:, 0].any()) or not bool(answer.any(1).all()):
        raise ConfigError("every tail must have tokens of an answer, and must not begin with one")


@torch.no_grad()
def _read(whole: Any, text: Tensor, repeats: int) -> Any:
    """A cache with all keys and values of the text, as often as there are questions.

    Layers with a sliding window keep every row too: their mask says what is seen, first tokens stay first.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=whole.config)
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers
    ]
    whole.base_model(input_ids=text, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(repeats)
    return cache


def _log_probability(model: nn.Module, one: Questions, cache: Any) -> Tensor:
    """The sum of the log-probabilities of all answers."""
    rows, columns = one.answer.nonzero(as_tuple=True)
    device = next(model.parameters()).device
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = (columns - 1).unique() if accepts else torch.arange(one.tails.shape[1])
    only = {"logits_to_keep": kept.to(device)} if accepts else {}
    out = model(input_ids=one.tails.to(device), past_key_values=cache, use_cache=True, **only)
    logits = getattr(out, "logits", None)
    if logits is None:
        raise ConfigError(
            "gate_gradients needs a language-model head to tell how likely answers are; "
            f"{type(model).__name__} gives no logits"
        )
    place = torch.searchsorted(kept, columns - 1).to(device)
    said = logits[rows.to(device), place]
    said = said if said.dtype == torch.float64 else said.float()
    wanted = one.tails[rows, columns].to(device)
    return said.log_softmax(-1).gather(-1, wanted[:, None]).sum()
