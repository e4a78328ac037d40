"""What nobody may hand in: every public factory refuses it with an error of ours that says what came."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import polyhead as ph
from polyhead import nn
from polyhead.attend.entmax import entmax as entmax_of
from polyhead.attend.masks import And, Not, band, densify, span, tile_map
from polyhead.attend.scores import SoftCap, alibi_slopes, chain, t5_bucket
from polyhead.errors import ConfigError
from polyhead.head_scores import Heads
from polyhead.mechanisms import Registry
from polyhead.papers import paper

ODD = (
    None, "a", "8", b"x", [1.0], ["a"], [], (), {}, {"a": 1}, object(), len, lambda *a: a, ph.causal,
    True, math.nan, math.inf, -math.inf, -1, -1.5, 0, 0.0, 1.5, 3, 10**30, 10**400, 1 + 2j,
    np.float32(2.0), np.int64(3), np.ones(3),
    torch.tensor(2), torch.tensor(2.0), torch.ones(3), torch.ones(3, 3), torch.ones(2, 2, 2),
    torch.ones(3, dtype=torch.long), torch.ones(3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool),
    torch.ones(3, dtype=torch.complex64), torch.tensor([math.nan]), torch.zeros(0), torch.zeros(0, 0),
    ph.causal(), ph.softmax(), ph.soft_cap(3.0),
)  # fmt: skip

X = torch.ones(1, 2, 3, 8)
SIZE = {"queries": 4, "keys": 4}
TILES = SIZE | {"rows": 2, "cols": 2}
BIAS = torch.ones(32, 2)
PAIRS = ((2, 8),)
SCORES = ph.HeadScores((np.ones(4),))


class Recorder:
    needs_logits = False

    def visit(self, *_: Any) -> None:
        """Nothing."""


def with_each(function: Callable[..., Any], options: dict[str, Any], names: str) -> dict[str, Any]:
    """The function of each argument alone, the others as in `options`."""
    label = getattr(function, "__qualname__", str(function))
    return {
        f"{label}({name})": lambda value, name=name: function(**options | {name: value})
        for name in names.split()
    }


def module(**options: Any) -> nn.MultiHeadAttention:
    return nn.MultiHeadAttention(nn.Projection(16, 2), **options)


def build(mechanism: str = "mha", **options: Any) -> Any:
    return ph.build(mechanism, **{"dim": 16, "heads": 4} | options)


def call(**inputs: Any) -> Any:
    return module(position=nn.rope())(**{"x": torch.ones(1, 3, 16)} | inputs)


PLACES: dict[str, Callable[[Any], Any]] = {
    "softmax(sink)": lambda v: ph.softmax(sink=v),
    "sigmoid(bias)": lambda v: ph.sigmoid(bias=v),
    "entmax(alpha)": ph.entmax,
    "entmax of scores": entmax_of,
    "entmax of scores (alpha)": lambda v: entmax_of(X, v),
    "entmax of scores (dim)": lambda v: entmax_of(X, 1.5, v),
    "soft_cap": ph.soft_cap,
    "SoftCap": SoftCap,
    "temperature": ph.temperature,
    "score_function": ph.score_function,
    "alibi": ph.alibi,
    "alibi_slopes": alibi_slopes,
    "relative_bias": ph.relative_bias,
    "chain": chain,
    **with_each(ph.t5_bias, {"weight": BIAS}, "weight bidirectional max_distance"),
    **with_each(
        t5_bucket,
        {"ahead": torch.arange(4), "buckets": 32, "bidirectional": True, "max_distance": 128},
        "ahead buckets bidirectional max_distance",
    ),
    **with_each(ph.window, {"left": 3}, "left right"),
    "sink": ph.sink,
    "prefix": ph.prefix,
    **with_each(ph.dilated, {"window": 2, "dilation": 2}, "window dilation right"),
    "strided": ph.strided,
    **with_each(ph.blocks, {"size": 2}, "size start"),
    "documents": ph.documents,
    "padding": ph.padding,
    "per_head": ph.per_head,
    "where": ph.where,
    **with_each(ph.shard, {"size": 2, "stride": 2}, "size stride first"),
    **with_each(ph.halo, {"grid": (4, 4), "block": 2}, "grid block halo"),
    **with_each(ph.lattice, {"grid": (4, 4), "step": 2}, "grid step"),
    **with_each(ph.neighborhood, {"grid": (4, 4), "window": 2}, "grid window dilation causal stride"),
    "mask & it": lambda v: ph.causal() & v,
    "mask | it": lambda v: ph.causal() | v,
    "And": And,
    "Not": Not,
    **with_each(tile_map, TILES | {"mask": ph.causal()}, "mask batch heads queries keys offset rows cols"),
    **with_each(densify, SIZE | {"mask": ph.causal()}, "mask batch heads queries keys offset"),
    "band": band,
    "span": span,
    **with_each(ph.attend, {"q": X, "k": X, "v": X}, "q k v mask score normalizer scale dropout return_lse"),
    **with_each(ph.explain, {"q": X, "k": X, "v": X}, "q k v mask score normalizer scale dropout backend"),
    **with_each(ph.observe, {"q": X, "k": X, "v": X, "consumers": [Recorder()]}, "q mask scale consumers"),
    "observe(one consumer)": lambda v: ph.observe(X, X, X, [v]),
    "reference": ph.reference,
    "entry": ph.entry,
    "paper": paper,
    "auxiliary_losses": ph.auxiliary_losses,
    **with_each(
        build,
        {},
        "mechanism dim heads head_dim value_dim context_dim bias qk_norm position score normalizer mask "
        "dropout device dtype",
    ),
    **with_each(build, {"mechanism": "gqa"}, "kv_heads"),
    **with_each(build, {"mechanism": "sqa"}, "form query_heads kv_heads head_dim"),
    "register(supports)": lambda v: Registry().register(
        "x", title="", family="", summary="", equation="", supports=v
    ),
    **with_each(
        nn.Projection,
        {"dim": 16, "heads": 2},
        "dim heads kv_heads head_dim value_dim context_dim bias qk_norm device dtype",
    ),
    **with_each(
        nn.OutputProjection, {"dim": 16, "heads": 2, "value_dim": 8}, "dim heads value_dim bias device"
    ),
    "MultiHeadAttention(projection)": nn.MultiHeadAttention,
    **with_each(module, {}, "output position score normalizer mask scale dropout"),
    **with_each(call, {}, "x context mask padding positions cache"),
    **with_each(module().new_cache, {}, "batch max_length window device dtype"),
    **with_each(module().new_cache, {"window": 4}, "sinks"),
    **with_each(module().new_context_cache, {"context": torch.ones(1, 3, 16)}, "context padding queries"),
    **with_each(module().cost, {"length": 3}, "length batch context_length dtype"),
    **with_each(nn.GrowingCache, {"batch": 1, "streams": PAIRS}, "batch streams capacity device dtype"),
    **with_each(nn.FixedCache, {"batch": 1, "streams": PAIRS, "max_length": 3}, "batch streams max_length"),
    **with_each(nn.WindowCache, {"batch": 1, "streams": PAIRS, "size": 3}, "batch streams size sinks"),
    **with_each(nn.ContextCache, {"rows": (X,)}, "rows padding start"),
    "append": lambda v: nn.GrowingCache(1, PAIRS).append(v),
    "append(padding)": lambda v: nn.GrowingCache(1, PAIRS).append(X, padding=v),
    "append(positions)": lambda v: nn.GrowingCache(1, PAIRS).append(X, positions=v),
    "crop": lambda v: nn.GrowingCache(1, PAIRS).crop(v),
    "crop a window": lambda v: nn.WindowCache(1, PAIRS, 4).crop(v),
    "reorder": lambda v: nn.GrowingCache(3, PAIRS).reorder(v),
    "PartModule": nn.PartModule,
    "PositionModule": lambda v: nn.PositionModule(v, dim=16, head_dim=8, heads=2),
    "record": lambda v: nn.AuxiliaryLosses().record("x", v),
    "sinusoidal": nn.sinusoidal,
    **with_each(nn.rope, {}, "base fraction interleaved scaling"),
    "rope_from_parameters": nn.rope_from_parameters,
    **{
        f"rope_from_parameters({name})": lambda v, name=name: nn.rope_from_parameters(
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64} | {name: v},
            max_position_embeddings=128,
        )
        for name in ("rope_type", "rope_theta", "partial_rotary_factor", "factor", "truncate")
    },
    "rope_from_parameters(length)": lambda v: nn.rope_from_parameters(
        {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=v
    ),
    "LinearScaling": nn.LinearScaling,
    **with_each(nn.DynamicNtk, {"factor": 2.0, "max_length": 64}, "factor max_length"),
    **with_each(
        nn.Yarn,
        {"factor": 2.0, "original_length": 64},
        "factor original_length beta_fast beta_slow attention_factor mscale mscale_all_dim truncate",
    ),
    **with_each(
        nn.LongRope,
        {"short_factor": (1.0,), "long_factor": (1.0,), "original_length": 64},
        "short_factor long_factor original_length factor attention_factor",
    ),
    **with_each(nn.Llama3Scaling, {"factor": 2.0}, "factor original_length low_freq_factor high_freq_factor"),
    "ProportionalScaling": nn.ProportionalScaling,
    **with_each(Heads, {}, "pairs level kv_groups"),
    "Heads(one pair)": lambda v: Heads((v,)),
    **with_each(
        ph.HeadScores, {"values": (np.ones(2),)}, "values name meaning unit direction level kv_groups"
    ),
    "HeadScores(one layer)": lambda v: ph.HeadScores((v,)),
    "HeadScores.from_json": ph.HeadScores.from_json,
    "HeadScores.mean": ph.HeadScores.mean,
    "top": SCORES.top,
    "above": SCORES.above,
    "below": SCORES.below,
    "correlation": SCORES.correlation,
    "from_json": ph.from_json,
    **{
        f"from_json({key})": lambda v, key=key: ph.from_json({key: v})
        for key in ("part", "tensor", "dtype", "function", "number")
    },
    "from_json(tensor of float32)": lambda v: ph.from_json({"tensor": v, "dtype": "float32"}),
    "from_json(a field)": lambda v: ph.from_json({"part": "SoftCap", "cap": v}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
def test_odd_values_are_served_or_refused_in_our_words(place: str) -> None:
    refusals = []
    for value in ODD:
        try:
            PLACES[place](value)
        except ph.PolyheadError as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(f"{place} with {value!r} raised {type(error).__name__}: {error}") from error
    assert len(refusals) > len(ODD) / 3, f"{place} took {len(ODD) - len(refusals)} of {len(ODD)} odd values"
    assert min(map(len, refusals)) > 20, f"{place} says too little: {min(refusals, key=len)}"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("softmax(sink)", "a", r"sink must be a number or a floating-point tensor \(H,\), got 'a' \(str\)"),
        ("sigmoid(bias)", [1.0], r"bias must be a number or .*, got \[1.0\] \(list\)"),
        ("entmax(alpha)", "x", r"alpha must be a number or a floating-point tensor, got 'x' \(str\)"),
        ("entmax(alpha)", 2.5, r"alpha must lie in \(1, 2\], got 2.5"),
        ("soft_cap", "x", r"cap must be a finite number above 0, got 'x' \(str\)"),
        ("soft_cap", True, r"cap must be a finite number above 0, got True \(bool\)"),
        ("soft_cap", torch.tensor(2.0), r"cap must be .*, got a tensor \(\) of torch.float32"),
        ("temperature", [1.0], r"t must be a number or a floating-point tensor \(H,\), got \[1.0\] \(list\)"),
        ("temperature", -1, r"t must be a finite number above 0, got -1 \(int\)"),
        ("score_function", 3, r"must be callable as f\(score, b, h, i, j\), got 3 \(int\)"),
        (
            "score_function",
            lambda s, b: s,
            r"callable as f\(score, b, h, i, j\), but <lambda>\(s, b\): too many",
        ),
        ("alibi", "8", r"heads must be an integer, at least 1; got '8' \(str\)"),
        ("alibi", 2.5, r"heads must be an integer, at least 1; got 2.5 \(float\)"),
        ("alibi", 10**9, "heads must be at most 65536; got 1000000000"),
        ("relative_bias", [[1.0]], r"table must be a floating-point tensor \(H, 2 R \+ 1\).* \(list\)"),
        (
            "t5_bias(weight)",
            [[1.0]],
            r"weight must be a floating-point tensor \(buckets, H\), got .* \(list\)",
        ),
        ("t5_bias(max_distance)", 128.5, r"max_distance must be an integer, at least 1; got 128.5"),
        ("t5_bias(bidirectional)", 1, r"bidirectional must be True or False; got 1 \(int\)"),
        (
            "documents",
            ["a"],
            r"documents: ids must be an integer tensor .* or lists that make one; got \['a'\]",
        ),
        ("window(left)", "a", r"window: left must be an integer, at least 0; got 'a' \(str\)"),
        ("window(left)", 1.5, r"window: left must be an integer, at least 0; got 1.5 \(float\)"),
        ("window(left)", 2**62, f"window: left must be at most {2**60}; got {2**62}"),
        (
            "padding",
            [1],
            r"padding: mask must be a bool tensor \(B, S\), True at real tokens; got \[1\] \(list\)",
        ),
        ("per_head", 3, r"per_head: masks must be a list of masks, one for each head; got 3 \(int\)"),
        ("blocks(size)", "a", r"blocks: size must be an integer, at least 1; got 'a' \(str\)"),
        ("blocks(start)", 1.5, r"blocks: start must be an integer, at least 0; got 1.5"),
        ("where", 3, r"where: function must be callable as f\(b, h, i, j\), got 3 \(int\)"),
        (
            "where",
            lambda i, j: i >= j,
            r"callable as f\(b, h, i, j\), but <lambda>\(i, j\): too many positional",
        ),
        ("neighborhood(grid)", "ab", r"neighborhood: grid\[0\] must be an integer, at least 1; got 'ab'"),
        ("neighborhood(causal)", 1, r"neighborhood: causal must be True or False on every axis; got 1"),
        ("build(dim)", "a", r"MultiHead: dim must be an integer, at least 1; got 'a' \(str\)"),
        ("build(mechanism)", 3, "no mechanism is called 3; known: .*mha"),
        ("build(device)", "gpu0", r"mha: device must be one such as 'cpu' or 'cuda:0', got 'gpu0' \(str\): "),
        ("build(dtype)", "float32", r"dtype must be a floating-point torch.dtype .*, got 'float32' \(str\)"),
        ("build(dtype)", torch.int64, r"dtype must be a floating-point torch.dtype .*, got torch.int64"),
        ("build(position)", ph.causal(), r"position must be a Position; got causal\(\) \(Window\)"),
        ("Heads(pairs)", 3, r"pairs must be pairs \(layer, head\) of integers counted from 0, got 3"),
        (
            "Heads(one pair)",
            (0, 1.5),
            r"pairs must be pairs \(layer, head\) of integers .*, got \(\(0, 1.5\),\)",
        ),
        ("Heads(level)", "keys", r"level must be 'query' or 'kv', got 'keys' \(str\)"),
        (
            "HeadScores(values)",
            "a",
            r"values must be a sequence with one array \(H,\) for each layer, got 'a'",
        ),
        (
            "HeadScores(one layer)",
            ["a"],
            r"the scores of layer 0 must be one number a head \(H,\), got \['a'\]",
        ),
        ("HeadScores(kv_groups)", [1.5], r"kv_groups\[0\] must be an integer, at least 1; got 1.5"),
        ("HeadScores.mean", SCORES, "the mean is taken over a sequence of HeadScores, got HeadScores"),
        ("call(x)", torch.ones(1, 3, 16).long(), r"x must be a floating-point tensor .*; got .*torch.int64"),
        (
            "call(positions)",
            torch.ones(3),
            r"positions must be an integer tensor \(\d+,\) or \(\d+, \d+\), one for each token; got a tensor",
        ),
        ("call(cache)", {}, r"cache must be what new_cache or new_context_cache gives; got \{\} \(dict\)"),
        (
            "GrowingCache(streams)",
            (2, 8),
            r"streams must be pairs \(heads, width\), .*; got \(2, 8\) \(tuple\)",
        ),
        ("reorder", [0, 1, 2], r"beam_index must be an integer tensor \(B,\), .*; got \[0, 1, 2\] \(list\)"),
        ("rope(base)", "8", r"rope: base must be a finite number above 1, got '8' \(str\)"),
        ("rope(interleaved)", 1, r"rope: interleaved must be True or False; got 1 \(int\)"),
        (
            "LongRope(long_factor)",
            [1.0, "a"],
            r"LongRope: long_factor\[1\] must be a finite number above 0, got 'a'",
        ),
        ("paper", 59, r"papers are called by number or name, .*; got 59 \(int\)"),
    ],
)
def test_the_message_names_the_argument_and_what_came(place: str, value: Any, message: str) -> None:
    with pytest.raises(ph.PolyheadError, match=message):
        PLACES[place](value)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ConfigError) as caught:
        ph.soft_cap(list(range(10**4)))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_numbers_of_numpy_are_numbers() -> None:
    assert ph.soft_cap(np.float32(1.5)) == ph.soft_cap(1.5)  # type: ignore[arg-type]
    assert ph.window(np.int64(3)) == ph.window(3)  # type: ignore[arg-type]
    assert ph.softmax(sink=np.float64(0.5)) == ph.softmax(sink=0.5)
    assert type(ph.temperature(2).t) is float


def test_descriptions_are_made_inside_compiled_functions() -> None:
    """The checks can be traced, and a changed number does not compile anything anew."""

    def described(x: torch.Tensor, n: int, t: float, slopes: torch.Tensor) -> torch.Tensor:
        mask = ph.window(n, 1) & (ph.sink(n) | ph.prefix(n)) | ph.blocks(n) | ph.dilated(n, 2) | ph.strided(n)
        mask = mask & ph.where(lambda b, h, i, j: (i - j) % 3 == 0)
        zero = torch.zeros(1, dtype=torch.int64)
        i = torch.arange(x.shape[0])
        parts = (ph.soft_cap(t).cap, ph.temperature(t).t, ph.softmax(sink=t).sink, ph.sigmoid(bias=t).bias)
        for value in parts:
            x = x * value  # type: ignore[operator]
        return x + mask.allowed(zero, zero, i[:, None], i).sum() + ph.alibi(slopes).slopes.sum()

    graphs = itertools.count()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        next(graphs)
        return graph.forward

    compiled = torch.compile(described, fullgraph=True, dynamic=True, backend=backend)
    for n in (3, 4, 6):
        arguments = (torch.ones(2 + n), n, n + 0.5, torch.ones(3))
        torch.testing.assert_close(compiled(*arguments), described(*arguments))
    assert next(graphs) == 1
