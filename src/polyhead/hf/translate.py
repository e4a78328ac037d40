"""What a model passes to its attention function, as one `Call`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from polyhead.attend.masks import Mask, causal
from polyhead.attend.normalizers import Normalizer, softmax
from polyhead.attend.scores import Score, chain, soft_cap
from polyhead.errors import UnsupportedModel
from polyhead.hf.call import Call, Entry, LayerInfo
from polyhead.hf.handles import KVHandle
from polyhead.hf.mask_tensor import MaskTensor
from polyhead.hf.written import Bias, WrittenMasks

__all__ = ["attention_call"]

# arguments that change the result and cannot be carried: passing over them would give wrong numbers
_REFUSED = ("indices", "block_indices", "sinks", "cache")
_plain: Normalizer = softmax()


def attention_call(
    layer: LayerInfo,
    below: tuple[Entry, ...],
    memory: WrittenMasks,
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> Call:
    """One attention call of a transformers model.

    Without a mask, a layer that says it is causal is causal, as under transformers' own `sdpa`. The
    sliding window that some models pass as well is in their masks already.

    Raises:
        UnsupportedModel: the model passes something that an attention function must not pass over.
    """
    for name in _REFUSED:
        if more.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} passes {name!r} to the attention function, which only "
                "transformers' own kernels know to read; detach the model to run it so"
            )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores: list[Score] = [] if softcap is None else [soft_cap(softcap)]
    if position_bias is not None and memory.matters(position_bias):
        scores.append(Bias(position_bias))
    queries, keys, start = query.shape[2], key.shape[2], 0
    mask: Mask | None = None
    if type(attention_mask) is MaskTensor and attention_mask.touched is None:
        mask, start, visible = attention_mask.mask, attention_mask.start, attention_mask.visible
        if visible < keys and not isinstance(key, KVHandle):
            key, value = key[:, :, :visible], value[:, :, :visible]
    elif attention_mask is not None:
        start = getattr(attention_mask, "start", 0)
        attention_mask = attention_mask.dense() if type(attention_mask) is MaskTensor else attention_mask
        mask, written = memory.read(attention_mask, queries, keys)
        if written is not None:
            scores.append(written)
    elif queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = causal()
        if keys > queries and not isinstance(key, KVHandle):  # the unfilled end of a static cache
            key, value = key[:, :, :queries], value[:, :, :queries]
    return Call(
        layer=layer,
        q=query,
        k=key,
        v=value,
        mask=mask,
        score=chain(scores) if scores else None,
        normalizer=_plain if s_aux is None else softmax(sink=s_aux),
        scale=float(scaling),
        dropout=dropout,
        start=start,
        below=below,
    )
