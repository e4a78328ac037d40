"""`per_head`: a pretrained model's cache, with the whole context for some heads, a window for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from polyhead.cache.policy import full_heads, head_windows
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.head_scores import HeadScores
from polyhead.hf import LayerInfo, attach

if TYPE_CHECKING:
    from polyhead.cache.transformers_cache import PerHeadCache, PerHeadEncoderDecoderCache

__all__ = ["per_head"]


def per_head(
    model: nn.Module,
    *,
    full: Any,
    sink: int = 4,
    window: Any = 256,
    prefill: Literal["masked", "dense"] = "masked",
    compensate: bool = False,
    scores: HeadScores | None = None,
) -> PerHeadCache | PerHeadEncoderDecoderCache:
    """A KV cache in which chosen key/value heads keep the whole context, the others sinks and recent tokens.

    It is a transformers `Cache`: pass it as `past_key_values` to `generate` (greedy, sampling, beams, batches
    padded on the left, `prefill_chunk_size`) or to the model, under `torch.no_grad()`. One cache serves one
    sequence or batch; `reset()` empties it for the next.

    A head that forgets sees, at token i, the tokens j <= i with `j < sink` or `i - j < window`: exactly the
    mask `causal() & (window(window - 1) | sink(sink))`, with a window of its own where `window` gives one
    for each head, in addition to the model's own. In a padded batch the
    tokens of each item are counted from its first real one. Positions are not renumbered. What a head drops
    is freed layer by layer as a forward pass goes on: `nbytes()` says what is held. Layers with a sliding
    window of the model's own never keep more than that.

    The heads keep different numbers of tokens, so no tensor holds them all, and the model's attention must be
    Polyhead's: the model is attached for as long as the cache lives, or until `cache.detach()`.

    Args:
        model: a transformers decoder, or encoder-decoder, whose cross-attention is kept whole.
        full: which heads keep the whole context: `Heads` such as `scores.by_kv_head().top(0.2)`, pairs
            (layer, KV head), a bool for each KV head of each layer, a share or number of KV heads together
            with `scores`, `"all"` or `"none"`. Of chosen query heads, every KV head that one of them reads is
            kept in full, which can be many more: `scores.top(0.2)` is not a fifth of the KV heads.
        sink: first tokens that the other heads keep.
        window: recent tokens that they keep, the current one among them: a number for all, or one for each
            KV head of each layer (numbers of heads that are kept in full are not looked at), such as
            `polyhead.cache.spans` finds.
        prefill: "masked": every token sees what it would see if tokens came one by one, so that results do
            not depend on chunks. "dense": the tokens of one forward pass see all that is stored and one
            another, and rows are dropped afterwards, as in the published code of DuoAttention and as
            RazorAttention has it.
        compensate: whether one more token, the mean of all that a head dropped, stands in for them
            (`polyhead.cache.razor`).
        scores: what `full`, if it is a number, counts.

    Returns:
        A `PerHeadCache`, or for encoder-decoders a transformers `EncoderDecoderCache` around one.

    Raises:
        ConfigError: a value is not allowed, or `full` does not fit the model.
        UnsupportedModel: the model's attention cannot be replaced, or its cache is of another kind.
        MissingExtra: transformers is not installed.

    Papers: DuoAttention, arXiv 2410.10819; RazorAttention, arXiv 2407.15891; StreamingLLM, arXiv 2309.17453.
    """
    if isinstance(sink, bool) or not isinstance(sink, int) or sink < 0:
        raise ConfigError(f"sink must be a whole number of tokens, at least 0; got {sink!r}")
    if prefill not in ("masked", "dense"):
        raise ConfigError(f"prefill must be 'masked' or 'dense'; got {prefill!r}")
    attachment = attach(model)
    try:
        from polyhead.cache.transformers_cache import make

        layers = cached_layers(attachment.layers, model)
        windows = head_windows(window, layers)
        rows = full_heads(full, layers, scores)
        if compensate:
            _check_compensation(layers, rows, windows)
        return make(
            attachment,
            layers,
            rows,
            sink=sink,
            windows=windows,
            dense=prefill == "dense",
            compensate=bool(compensate),
        )
    except BaseException:
        attachment.detach()
        raise


def cached_layers(layers: list[LayerInfo], model: nn.Module) -> list[LayerInfo]:
    """The layers of causal self-attention, which keep a cache.

    Raises:
        UnsupportedModel: there are none.
    """
    found = [layer for layer in layers if layer.kind == "decoder" and layer.cache_index is not None]
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no layer of causal self-attention that keeps a cache; per-head "
            "caches are for models that generate"
        )
    return found


def _check_compensation(
    layers: list[LayerInfo], full: list[tuple[bool, ...]], windows: list[tuple[int, ...]]
) -> None:
    for layer, kept, sizes in zip(layers, full, windows, strict=True):
        window = min((size for whole, size in zip(kept, sizes, strict=True) if not whole), default=None)
        if layer.window is not None and window is not None and window < layer.window:
            raise ConfigError(
                f"compensate=True does not go with a window below the model's own: {layer.name!r} sees "
                f"{layer.window} tokens and window is {window}; use window={layer.window} or more, or "
                "compensate=False"
            )
