"""A gate on every KV head: full attention, mixed with what a head sees that keeps sinks and a window only.

    o_h = α_h · Full_h + (1 - α_h) · Short_h,    Short_h sees j <= i iff j < sink or i - j < window

The query heads that read one KV head share its gate. `polyhead.cache.duo` trains the gates;
`polyhead.cache.gate_gradients` asks what each of them is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.attend.masks import sink as first_tokens
from polyhead.attend.masks import window as recent_tokens
from polyhead.errors import UnsupportedModel
from polyhead.hf import Attachment, Call
from polyhead.hf.layers import pretrained_parts

__all__ = ["Gates", "decoder"]


class Gates:
    """The gates of all layers with causal self-attention, and attention mixed by them.

    Args:
        attachment: of the model.
        sink, window: what a head without the context sees.
        initial: where the gates stand.
        like: the dtype and device of the gates.

    Attributes:
        alphas: by layer index, `(G,)`; gradients reach them.

    Raises:
        UnsupportedModel: the model has no such layer.
    """

    def __init__(
        self, attachment: Attachment, sink: int, window: int, initial: float, like: Tensor, name: str
    ) -> None:
        self.layers = attachment.layers
        self.short = recent_tokens(window - 1) | first_tokens(sink) if sink else recent_tokens(window - 1)
        self.alphas = {
            layer.index: torch.full_like(like, initial).expand(layer.kv_heads).clone().requires_grad_(True)
            for layer in attachment.layers
            if layer.kind == "decoder"
        }
        if not self.alphas:
            raise UnsupportedModel(f"{name} has no causal self-attention, so that nothing is gated")

    def mix(self, call: Call, full: Tensor) -> Tensor:
        """`full`, the call's output, mixed with attention to sinks and the window; without gates, `full`."""
        alpha = self.alphas.get(call.layer.index)
        if alpha is None:
            return full
        mask = self.short if call.mask is None else call.mask & self.short
        short = call.replace(mask=mask).proceed()
        alpha = alpha.clamp(0.0, 1.0).repeat_interleave(call.layer.heads // call.layer.kv_heads)
        alpha = alpha.view(1, -1, 1, 1).to(short.dtype)
        return alpha * full + (1 - alpha) * short

    def by_layer(self, values: Mapping[int, Tensor]) -> tuple[Any, ...]:
        """One array `(G,)` a layer, such as `HeadScores` takes; NaN in layers without gates."""
        found = (
            values.get(layer.index, torch.full((layer.kv_heads,), torch.nan)).detach().double()
            for layer in self.layers
        )
        return tuple(value.cpu().numpy() for value in found)


def decoder(model: nn.Module, what: str) -> Any:
    """The transformers model around `model`, if it reads one sequence.

    Raises:
        UnsupportedModel: it reads two.
    """
    whole = pretrained_parts(model)[0]
    if getattr(whole.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{what} are for decoders that read one sequence; {type(whole).__name__} reads two"
        )
    return whole
