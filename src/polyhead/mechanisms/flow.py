"""What becomes of the inputs of a module, step by step, read off its parts.

    x ─ query ─ position ──────────────┐
    c ─ key, value ─ position ─ cache ─┴─ scores ─ mask ─ normaliser ─ values ─ output ─ y

Nothing here knows a mechanism. A part that is found on a module and is not one of those that
`MultiHeadAttention` has stands where its class says with `acts_on`, one of `STAGES`, and else among the
`others`, of which the picture says only that they are there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.attend.normalizers import softmax
from polyhead.attend.scores.base import Chain
from polyhead.attend.weight_maps import WeightChain
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.auxiliary import AuxiliaryLosses
from polyhead.nn.contract import AttentionModule
from polyhead.nn.part_module import PartModule
from polyhead.nn.projections import Projection

__all__ = ["STAGES", "Flow", "Step", "flow_of"]

# where a part may act: on the queries, on keys and values, on scores, on weights, on the outputs of the heads
STAGES = ("queries", "keys", "scores", "weights", "heads")


@dataclass(frozen=True)
class Step:
    """One step: what it is called, and what it does there, in one or more lines."""

    name: str
    what: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.what}" if self.what else self.name


@dataclass(frozen=True)
class Flow:
    """Steps in their order.

    Attributes:
        queries: from x to the queries.
        keys: from the context, or x, to keys and values.
        joined: from scores to the output.
        others: parts that the module has besides.
    """

    queries: tuple[Step, ...]
    keys: tuple[Step, ...]
    joined: tuple[Step, ...]
    others: tuple[Step, ...] = ()


def flow_of(module: AttentionModule) -> Flow:
    """The data flow of a module, with its sizes."""
    if isinstance(module, MultiHeadAttention):
        return _attention(module)
    dim = getattr(module.config, "dim", None) or "d"
    return Flow(
        (Step("x", f"(L, {dim})"),),
        (Step("c", "(S, d), the context, or x"), _cache(module)),
        (*_children(module, ()), Step("y", f"(L, {dim})")),
    )


_KNOWN = ("projection", "position", "score", "normalizer", "weight_map", "mask", "select", "output")
# what a subclass may do in its own way, in words
_OWN = {
    "forward": "the whole call",
    "_inputs": "what it takes for its inputs",
    "_queries": "how queries are made",
    "_rows": "what is kept of a token",
    "_attend": "how it attends",
    "_options": "what it asks of the operator",
    "_mix": "how its heads attend",
    "_join": "what is added to its heads",
}


def _attention(module: MultiHeadAttention) -> Flow:
    projection = module.projection
    at: dict[str, list[Step]] = {stage: [] for stage in (*STAGES, "others")}
    for name, part in _parts(projection):
        stage = getattr(part, "acts_on", None) or _lane(name)
        at[stage].append(Step(name, _does(part, _shape(projection, name))))
    made = {lane: [Step("projection", "\n".join(map(str, at.pop(lane))))] for lane in ("queries", "keys")}
    if type(projection) is not Projection:
        at["others"].append(Step("projection", _named(projection)))
    for name, part in _parts(module, _KNOWN):
        stage = getattr(part, "acts_on", "others")
        (made if stage in made else at)[stage].append(Step(name, _does(part)))
    own = [said for name, said in _OWN.items() if _overrides(module, name)]
    if own:
        at["others"].append(Step(_named(module), f"in its own way, {', '.join(own)}"))
    place = [Step("position", _brief(module.position.position))]
    added, turned = place * module.position.adds, place * module.position.turns
    source = Step("c", f"(S, {projection.context_dim}), the context, or x")
    return Flow(
        (Step("x", f"(L, {projection.dim})"), *added, *made["queries"], *turned),
        (source, *added, *made["keys"], *turned, _cache(module)),
        tuple(_joined(module, at)),
        tuple(at["others"]),
    )


def _joined(module: MultiHeadAttention, at: dict[str, list[Step]]) -> Iterator[Step]:
    scale = f"q·k / √{module.head_dim}" if module.scale is None else f"q·k × {module.scale:g}"
    shared = module.heads // module.kv_heads
    reads = "" if shared == 1 else f", k of head h // {shared}" if module.kv_heads > 1 else ", one k for all"
    yield Step("scores", f"{scale}{reads}: {module.heads} maps of L × S")
    for score in (*_terms(module.position.score), *_terms(_spec(module.score))):
        yield Step("score map", _brief(score))
    yield from at["scores"]
    fixed = "" if module.mask is None else f"{module.mask.spec!r}, "
    yield Step("mask", f"{fixed}that of the call, padding")
    if module.select is not None:
        yield Step("selector", _brief(module.select.spec))
    yield Step("normaliser", _brief(softmax() if module.normalizer is None else module.normalizer.spec))
    for weight_map in _terms(_spec(module.weight_map)):
        yield Step("weight map", _brief(weight_map))
    yield from at["weights"]
    yield Step("values", f"weights · v: {_heads(module.heads, module.value_dim)}")
    yield from at["heads"]
    yield Step("output", _output(module))
    yield Step("y", f"(L, {module.projection.dim})")


def _overrides(module: MultiHeadAttention, name: str) -> bool:
    return getattr(type(module), name, None) is not getattr(MultiHeadAttention, name, None)


def _spec(part: PartModule | None) -> Any:
    return None if part is None else part.spec


def _terms(part: Any) -> tuple[Any, ...]:
    if part is None:
        return ()
    if isinstance(part, Chain):
        return tuple(part.scores)
    return tuple(part.maps) if isinstance(part, WeightChain) else (part,)


def _parts(module: nn.Module, known: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """Submodules and parameters of `module` itself, but those that are known already."""
    for name, part in (*module.named_children(), *module.named_parameters(recurse=False)):
        if name not in known and not isinstance(part, AuxiliaryLosses):
            yield name, part


def _children(module: nn.Module, known: Iterable[str]) -> tuple[Step, ...]:
    return tuple(Step(name, _does(part)) for name, part in _parts(module, known))


def _lane(name: str) -> str:
    if name.startswith(("query", "q_")) or name == "q":
        return "queries"
    if name.startswith(("key", "value", "kv", "latent", "k_", "v_")) or name in ("k", "v"):
        return "keys"
    return "others"


def _shape(projection: Any, name: str) -> tuple[int, int] | None:
    """Heads and width of what the map called `name` makes, if it makes heads."""
    return {
        "query": (getattr(projection, "query_heads", projection.heads), projection.head_dim),
        "key": (projection.kv_heads, projection.head_dim),
        "value": (projection.kv_heads, projection.value_dim),
    }.get(name)


def _heads(count: int, width: int) -> str:
    return f"{count} head{'s' if count > 1 else ''} of {width}"


def _output(module: MultiHeadAttention) -> str:
    output, width = module.output, module.heads * module.value_dim
    if isinstance(output, nn.Linear) and output.in_features == width:
        return f"{_heads(module.heads, module.value_dim)} → {output.out_features}"
    return _does(output)


def _does(part: Any, shape: tuple[int, int] | None = None) -> str:
    """A part in a few words: sizes of a linear map, else its class and what that says of itself."""
    if isinstance(part, nn.Linear):
        made = str(part.out_features)
        if shape is not None and math.prod(shape) == part.out_features:
            made = _heads(*shape)
        return f"{part.in_features} → {made}"
    if isinstance(part, PartModule):
        return _brief(part.spec)
    if not isinstance(part, nn.Module):
        return f"learned, {' × '.join(map(str, part.shape)) or 'a number'}"
    if type(part).__module__.startswith("torch."):
        return repr(part).partition("\n")[0]
    return _named(part)


def _named(part: nn.Module) -> str:
    """The class of a part, and the first line of what it says of itself."""
    said = (inspect.getdoc(type(part)) or "").partition("\n")[0].rstrip(".")
    return f"{type(part).__name__} ({said})" if said else type(part).__name__


def _brief(part: Any) -> str:
    """A description in a few words: `Softmax()` is softmax, other parts as they print."""
    text = repr(part)
    return "softmax" if text in ("Softmax()", "Softmax(sink=None)") else text


def _cache(module: AttentionModule) -> Step:
    rows = " + ".join(
        f"{heads} × {width}" + " packed" * len(codec) for heads, width, *codec in module.streams
    )
    return Step("cache", f"{rows} numbers a token")
