"""Which attention a model's configs name: switched to Polyhead while attached, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.errors import UnsupportedModel

__all__ = ["NAME", "adds_masks", "restore", "switch"]

NAME = "polyhead"


@dataclass
class _Switched:
    """A config that names Polyhead now.

    Attributes:
        config: the config, held so that its id stays its own.
        before: what it named before.
        users: how many attachments need it so.
        adds_masks: whether some model with this config only knows masks that are added to the logits.
    """

    config: Any
    before: str | None
    users: int
    adds_masks: bool


_switched: dict[int, _Switched] = {}


def adds_masks(config: Any) -> bool:
    """Whether the code of a model with this config takes a mask for numbers to add to the logits."""
    entry = _switched.get(id(config))
    return entry is not None and entry.adds_masks


def switch(parts: list[Any], modules: list[nn.Module]) -> list[Any]:
    """Make every config of the models name Polyhead; what they named before is kept for `restore`.

    Args:
        parts: transformers models.
        modules: their attention modules, which must follow.

    Returns:
        The configs, for `restore`.

    Raises:
        UnsupportedModel: an attention module did not follow; everything is as it was.
    """
    configs = _configs(parts)
    before = {id(config): config._attn_implementation for config in configs}
    try:
        for part in parts:
            part.set_attn_implementation(NAME)
        for module in modules:
            config: Any = getattr(module, "config", None)
            if not hasattr(config, "_attn_implementation"):
                raise UnsupportedModel(
                    f"{type(module).__name__} looks up an attention function but has no config to name it; "
                    "use a version of the model's code that keeps its config as module.config"
                )
            if config._attn_implementation != NAME:  # a copy of a config, or code from before 5.0
                config._attn_implementation = NAME
    except BaseException:
        _set_back([(config, before[id(config)]) for config in configs])
        raise
    additive = _with_additive_masks(parts)
    for config in configs:
        entry = _switched.setdefault(
            id(config), _Switched(config, before[id(config)], 0, id(config) in additive)
        )
        entry.users += 1
    return configs


def restore(configs: list[Any]) -> None:
    """Undo one `switch`: configs that no other attachment needs name again what they named before."""
    ready = []
    for config in configs:
        entry = _switched[id(config)]
        entry.users -= 1
        if entry.users == 0:
            del _switched[id(config)]
            ready.append((config, entry.before))
    _set_back(ready)


def _set_back(former: list[tuple[Any, str | None]]) -> None:
    # outer configs come first: setting one also sets those inside it, which follow in their turn
    for config, before in former:
        config._attn_implementation = before


def _configs(parts: list[Any]) -> list[Any]:
    """The configs of the models and of everything inside them, each once, outer ones first."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
            return
        found[id(config)] = config
        for key in getattr(config, "sub_configs", {}):
            add(getattr(config, key, None))

    for part in parts:
        for module in part.modules():
            add(getattr(module, "config", None))
    return list(found.values())


def _with_additive_masks(parts: list[Any]) -> set[int]:
    """Ids of the configs of models that do not know transformers' `sdpa`, and so no masks of bools."""
    from transformers import PreTrainedModel

    return {
        id(module.config)
        for part in parts
        for module in part.modules()
        if isinstance(module, PreTrainedModel) and not getattr(module, "_supports_sdpa", False)
    }
