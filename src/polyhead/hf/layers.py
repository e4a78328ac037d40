"""Which modules of a model are attention layers that go through transformers' attention interface.

The interface is found in the code itself: a module counts when one of its methods reads a global that is
an `AttentionInterface`. Models that do not use it, or hand over more than an attention function can be
told, are refused here, before anything runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from polyhead.errors import UnsupportedModel
from polyhead.hf.call import Kind, LayerInfo

__all__ = ["QUERIES", "find_layers", "own_attention", "pretrained_parts"]

# arguments of an attention call that change its result and that a `Call` cannot carry
_UNREAD = {
    "indices": "a choice of keys beside the mask (DeepSeek's sparse attention)",
    "block_indices": "a choice of blocks of keys beside the mask",
    "sinks": "a sink logit for every query",
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
QUERIES = ("q_proj", "query", "q", "query_proj", "wq", "to_q", "Wq")
_KEYS = ("k_proj", "key", "k", "key_proj", "wk", "to_k", "Wk")
_CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)


def pretrained_parts(model: nn.Module) -> list[Any]:
    """The outermost transformers models in `model`: itself, or those that a wrapper (PEFT's) holds."""
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"model must be a transformers model, got {type(model).__name__}; polyhead.hf.load(...) makes "
            "one "
            "from a name or a path"
        )
    if isinstance(model, PreTrainedModel):
        return [model]
    found: list[Any] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            found.append(module)
            inside |= {id(m) for m in module.modules()}
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers model and holds none; for a model of your own, "
            "use "
            "polyhead.attend or the modules of polyhead.nn in it"
        )
    return found


def find_layers(model: nn.Module) -> list[tuple[nn.Module, LayerInfo]]:
    """Every attention module of `model` with its description, in forward order.

    Raises:
        UnsupportedModel: no module uses the attention interface, or one needs what it cannot carry.
    """
    found: list[tuple[nn.Module, LayerInfo]] = []
    for name, module in model.named_modules():
        cls: Any = type(module)
        if _uses_interface(cls):
            _refuse_hidden_arguments(cls)
            found.append((module, _describe(module, name, len(found))))
    if not found:
        raise UnsupportedModel(
            f"{_named(model)} does not go through transformers' attention interface: none of its modules "
            "looks "
            "up ALL_ATTENTION_FUNCTIONS, so its attention can be neither observed nor changed. Use an "
            "architecture that does (Llama, Qwen, Gemma, GPT-2, BERT, ViT, Whisper, T5, ...) or a newer "
            "version "
            "of the model's code"
        )
    return found


def own_attention(model: nn.Module) -> list[str]:
    """Names of modules that compute a softmax attention of their own, past the interface."""
    return [
        name
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and _computes_softmax(type(module))
    ]


def _computes_softmax(cls: Any) -> bool:
    own = [code for function in _functions(cls) for code in _codes(function.__code__)]
    return not _uses_interface(cls) and any("softmax" in code.co_names for code in own)


def _named(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model type {kind!r})" if kind else "")


def _functions(cls: type) -> Iterator[FunctionType]:
    """The methods that instances of `cls` have, without decoration, but not those of torch's base classes."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for value in vars(base).values():
            function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
            if isinstance(function, FunctionType):
                yield function


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A piece of code and the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@cache
def _uses_interface(cls: Any) -> bool:
    from transformers import AttentionInterface, PreTrainedModel

    if not issubclass(cls, nn.Module) or issubclass(cls, PreTrainedModel):
        return False
    return any(
        isinstance(function.__globals__.get(name), AttentionInterface)
        for function in _functions(cls)
        for code in _codes(function.__code__)
        for name in code.co_names
    )


def _refuse_hidden_arguments(cls: Any) -> None:
    for function in _functions(cls):
        for code in _codes(function.__code__):
            keywords = {w for c in code.co_consts if isinstance(c, tuple) for w in c if isinstance(w, str)}
            for name, meaning in _UNREAD.items():
                if name in keywords and {"scaling", "dropout"} <= keywords:  # of one attention call
                    raise UnsupportedModel(
                        f"{cls.__name__} passes {name!r} to the attention function, {meaning}, which only "
                        "transformers' own kernels know to read: this architecture cannot be attached"
                    )


def _describe(module: nn.Module, name: str, index: int) -> LayerInfo:
    heads, kv_heads, head_dim = _sizes(module, name)
    return LayerInfo(
        index=index,
        name=name,
        kind=_kind(module, name),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=_window(module),
        cache_index=_integer(module, "layer_idx"),
    )


def _integer(owner: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _width(module: nn.Module, *names: str) -> int | None:
    """Output width of the first projection that exists under one of `names`."""
    for name in names:
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if weight is not None and weight.ndim == 2:
            return int(getattr(projection, "out_features", weight.shape[0]))
    return None


def _sizes(module: nn.Module, name: str) -> tuple[int, int, int]:
    """H, G and D of an attention module, from its own attributes, then its projections, then its config."""
    config = getattr(module, "config", None)
    dim = _integer(
        module,
        "qk_head_dim",
        "head_dim",
        "attention_head_size",
        "head_size",
        "key_value_proj_dim",
        "dim_head",
    )
    heads = _integer(module, *_HEADS, "heads", "num_query_heads")
    kv_heads = _integer(module, "num_key_value_heads", "num_kv_heads", "n_kv_heads")
    groups = _integer(module, "num_key_value_groups", "num_kv_groups")
    wide, narrow = _width(module, *QUERIES), _width(module, *_KEYS)
    if kv_heads is None and heads and groups:
        kv_heads = heads // groups
    if kv_heads is None and dim and narrow and narrow % dim == 0:
        kv_heads = narrow // dim
    if heads is None and kv_heads and groups:
        heads = kv_heads * groups
    if heads is None and dim and wide and wide % dim == 0:
        heads = wide // dim
    heads = heads or _integer(config, *_HEADS, "encoder_attention_heads")
    if heads and not dim:
        hidden = _integer(config, "hidden_size", "d_model", "n_embd", "embed_dim") or 0
        dim = (wide or hidden) // heads
    if not heads or not dim:
        raise UnsupportedModel(
            f"cannot tell how many heads {name!r} ({type(module).__name__}) has and how wide they are: "
            "neither the module nor its config has num_heads, num_attention_heads, head_dim or the like"
        )
    return heads, kv_heads or heads, dim


def _kind(module: nn.Module, name: str) -> Kind:
    if getattr(module, "is_cross_attention", False) or _CROSS.search(name.rpartition(".")[2]):
        return "cross"
    if _CROSS.search(type(module).__name__):
        return "cross"
    causal = getattr(module, "is_causal", hasattr(module, "layer_idx"))  # few layers do not say
    return "decoder" if causal and getattr(getattr(module, "config", None), "is_causal", True) else "encoder"


def _window(module: nn.Module) -> int | None:
    if hasattr(module, "sliding_window"):
        return _integer(module, "sliding_window")
    config, index = getattr(module, "config", None), _integer(module, "layer_idx")
    if getattr(config, "use_sliding_window", True) is False:
        return None
    types = getattr(config, "layer_types", None)
    if types and index is not None and index < len(types) and types[index] != "sliding_attention":
        return None
    return _integer(config, "sliding_window")
