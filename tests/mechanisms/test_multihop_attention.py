"""What must hold of attention over several hops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from close import close
from conformance import contract
from conformance.contract import failing
from flops import counting
from mechanisms.variants import broken_rules, variant
from polyhead.attend.masks import Mask, densify
from polyhead.errors import ConfigError, UnsupportedPattern

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "multihop_attention", **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def heads_of(linear: nn.Linear, x: Tensor, heads: int = 4) -> Tensor:
    """`(B, 4, L, width)`, heads that are shared repeated."""
    return linear(x).unflatten(-1, (heads, -1)).transpose(1, 2).repeat_interleave(4 // heads, 1)


def edges(module: nn.Module, x: Tensor, mask: Mask | None, kv_heads: int = 4) -> Tensor:
    """A `(B, 4, L, L)`, rows that see nothing zero."""
    own = module.projection
    logits = heads_of(own.query, x) @ heads_of(own.key, x, kv_heads).mT / own.head_dim**0.5
    length = x.shape[1]
    if mask is not None:
        seen = densify(mask, batch=len(x), heads=4, queries=length, keys=length)
        logits = logits.masked_fill(~seen, -math.inf)
    return logits.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "bias": True, "position": ph.nn.rope()}], ids=str)
def test_one_hop_is_multi_head_attention(options: dict[str, Any]) -> None:
    plain = built("grouped_query" if options else "mha", **options)
    module = built(hops=1, **options)
    assert plain.state_dict().keys() == module.state_dict().keys()
    calls: list[tuple[tuple[Tensor, ...], Mask | None]] = [
        ((X,), None), ((X,), ph.causal()), ((X, X[:, :7]), None), ((X[:, 4:], X), ph.causal())
    ]  # fmt: skip
    for given, mask in calls:
        close(module(*given, mask=mask), plain(*given, mask=mask), 0)
    close(module(X, cache=module.new_context_cache(X)), plain(X, X))
    assert module.cost(9) == plain.cost(9)


def test_hops_without_values_are_multi_head_attention() -> None:
    module, plain = built(hops=3), built("mha")
    with torch.no_grad():
        for name in ("value_2", "value_3"):
            getattr(module.projection, name).weight.zero_()
    module.output.load_state_dict(plain.output.state_dict())
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "mask", [None, ph.causal(), ph.window(2, 3) & ~ph.window(0, 0), ph.window(1) | ph.sink(1)], ids=str
)
def test_hops_are_powers_of_the_weights(mask: Mask | None, kv_heads: int) -> None:
    module = built(hops=3, kv_heads=kv_heads)
    own, a = module.projection, edges(module, X, mask, kv_heads)
    v1, v2, v3 = (heads_of(v, X, kv_heads) for v in (own.value, own.value_2, own.value_3))
    want = a @ v1 + a @ (a @ v2) + a @ a @ a @ v3
    close(module(X, mask=mask), want.transpose(1, 2).flatten(2) @ module.output.weight.T)


def walks(a: Tensor, values: list[Tensor], *, own: bool) -> Tensor:
    """The mean of Σ_m values_m at the end of m edges, over all choices of edges of all tokens.

    Args:
        a: `(L, L)`, the probability of each edge; a row of zeros for a token that has none.
        values: `(L, n)` of every hop.
        own: whether every hop has edges of its own, drawn independently; else one edge a token serves all.
    """
    length, sets = len(a), len(values) if own else 1
    ends = [[j for j in range(length) if a[i, j] > 0] or [None] for i in range(length)]
    chosen = [list(itertools.product(*ends))] * sets
    total = torch.zeros_like(values[0])
    for phi in itertools.product(*chosen):
        p = math.prod(float(a[i, j]) for one in phi for i, j in enumerate(one) if j is not None)
        for i in range(length):
            at: int | None = i
            for m, v in enumerate(values):
                at = None if at is None else phi[m % sets][at]
                if at is not None:
                    total[i] += p * v[at]
    return total


def enumerated(mask: Mask | None, *, hops: int, length: int, own: bool) -> tuple[Tensor, Tensor]:
    """What a module with one head gives, and the mean over all choices of edges."""
    module = built(heads=1, hops=hops)
    own_maps, x = module.projection, X[:1, :length]
    k, q = own_maps.key(x)[0], own_maps.query(x)[0]
    logits = q @ k.T / 32**0.5
    if mask is not None:
        seen = densify(mask, batch=1, heads=1, queries=length, keys=length)[0, 0]
        logits = logits.masked_fill(~seen, -math.inf)
    a = logits.softmax(-1).nan_to_num(0.0)
    names = ["value", *(f"value_{n}" for n in range(2, hops + 1))]
    values = [getattr(own_maps, name)(x)[0] for name in names]
    return module(x, mask=mask)[0], walks(a, values, own=own) @ module.output.weight.T


@pytest.mark.parametrize(("hops", "length"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("mask", [None, ph.causal(), ph.causal() & ~ph.window(0)], ids=str)
def test_the_closed_form_is_the_mean_over_all_choices_of_edges(
    mask: Mask | None, hops: int, length: int
) -> None:
    with torch.no_grad():
        close(*enumerated(mask, hops=hops, length=length, own=True))


def test_one_edge_a_token_is_the_same_where_no_walk_comes_back() -> None:
    with torch.no_grad():
        close(*enumerated(ph.causal() & ~ph.window(0), hops=3, length=5, own=False))
        found, want = enumerated(ph.causal(), hops=2, length=4, own=False)
    assert (found - want).abs().max() > 1e-3


def test_two_hops_follow_a_pointer_to_a_pointer() -> None:
    to = torch.tensor([3, 0, 4, 1, 2])
    module = built(dim=10, heads=1)
    codes = torch.eye(5, **F64)
    x = torch.cat([codes, codes[to]], dim=-1)[None]  # who a token is, and whom it points to
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.projection.query.weight[:5, 5:] = 100 * codes
        module.projection.key.weight[:5, :5] = codes
        module.projection.value_2.weight[:5, :5] = codes
        module.output.weight[:5, :5] = codes
        close(module(x)[0, :, :5], codes[to[to]], 1e-9)


def test_packed_sequences_hop_within_themselves() -> None:
    module = built(hops=3, kv_heads=2)
    packed = module(X, mask=ph.causal() & ph.documents(torch.tensor([0] * 4 + [1] * 7)))
    alone = [module(part, mask=ph.causal()) for part in X.split([4, 7], dim=1)]
    close(packed, torch.cat(alone, dim=1))


VARIANTS = [{"hops": 1}, {"hops": 3, "kv_heads": 2}, {"kv_heads": 1, "value_dim": 5, "bias": True}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_keep_the_contract(options: dict[str, Any]) -> None:
    assert broken_rules("multihop_attention", compiled=True, **options) == {}
    assert failing(variant("multihop_attention", **options), [contract.decode_window]) == {}


DECODED: list[tuple[Mask, dict[str, Any]]] = [
    (ph.causal() & (ph.window(3) | ph.sink(2)), {"position": ph.nn.rope(), "score": ph.alibi(4)}),
    (ph.causal() & ph.blocks(4), {"normalizer": ph.softmax(sink=0.3), "kv_heads": 2}),
    (ph.causal() & ~ph.window(0), {"normalizer": ph.entmax(1.5)}),
    (ph.per_head([ph.causal(), ph.window(2)] * 2), {"normalizer": ph.sigmoid(), "kv_heads": 2}),
    (ph.causal(), {"weight_map": ph.head_mix(torch.randn(4, 4, **F64) / 2), "kv_heads": 2}),
    (ph.window(2) & ph.documents(torch.tensor([0] * 5 + [-1] + [1] * 5)), {"position": ph.nn.sinusoidal()}),
]


@pytest.mark.parametrize(("mask", "options"), DECODED, ids=str)
@pytest.mark.parametrize("window", [None, (4, 2)], ids=str)
def test_decoding_is_the_full_pass(
    mask: Mask, options: dict[str, Any], window: tuple[int, int] | None
) -> None:
    module = built(hops=3, **options)
    real = torch.arange(11) >= torch.tensor([[3], [0]])
    visible, kind = mask, {}
    if window is not None:
        visible = mask & ph.causal() & (ph.window(window[0] - 1) | ph.sink(window[1]))
        kind = {"window": window[0], "sinks": window[1]}
    with torch.no_grad():
        full = module(X, mask=visible, padding=real)
        for sizes in ([1] * 11, [5, 1, 1, 4]):
            cache = module.new_cache(2, **kind)
            parts = [
                module(x, mask=mask, padding=own, cache=cache)
                for x, own in zip(X.split(sizes, 1), real.split(sizes, 1), strict=True)
            ]
            close(torch.cat(parts, dim=1)[real], full[real], 1e-11)


def test_without_a_causal_mask_later_tokens_change_no_earlier_sum() -> None:
    module = built(hops=3)
    ends = torch.tensor([4] * 4 + [9] * 5 + [11] * 2)  # where the chunk of every token ends
    with torch.no_grad():
        cache = module.new_cache(2)
        parts = [module(x, cache=cache) for x in X.split([4, 5, 2], dim=1)]
        close(torch.cat(parts, dim=1), module(X, mask=ph.where(lambda b, h, i, j: j < ends[i])))


def test_what_it_costs() -> None:
    plain, module = built("grouped_query", kv_heads=2), built(hops=3, kv_heads=2)
    one, said = plain.cost(16, batch=2), module.cost(16, batch=2)
    assert (said.scores, said.values) == (3 * one.scores, 3 * one.values)
    assert said.parameters == one.parameters + 2 * 32 * 2 * 8
    assert said.kv_bytes_per_token == 8 * (2 * 8 + 2 * 8 + 2 * 4 * 8)  # keys, values, two sums of all heads
    with torch.no_grad(), counting() as counter:
        module(torch.randn(2, 16, 32, **F64))
    assert counter.get_total_flops() == said.flops
    cache = module.new_cache(2, max_length=16)
    with torch.no_grad():
        module(torch.randn(2, 15, 32, **F64), mask=ph.causal(), cache=cache)
        with counting() as counter:
            module(torch.randn(2, 1, 32, **F64), mask=ph.causal(), cache=cache)
    assert counter.get_total_flops() == module.step_cost(15, batch=2).flops
    assert cache.nbytes() == said.cache_bytes


def test_losses_of_weights_are_of_one_hop() -> None:
    module = built(kv_heads=2)
    q, rows = module._queries(X, 0), module._rows(X, 0)
    close(module._weights(q, rows, mask=ph.causal()), edges(module, X, ph.causal(), 2))


def test_refusals() -> None:
    module = built()
    message = "multihop_attention .* does not support a context; leave context out, and take hops=1 for cross"
    context = built("mha").new_context_cache(X)
    for call in (lambda: module(X, X), lambda: module.new_context_cache(X), lambda: module(X, cache=context)):
        with pytest.raises(UnsupportedPattern, match=message):
            call()
    for bad in (0, 65, 1.5, True):
        with pytest.raises(ConfigError, match="hops must be"):
            built(hops=bad)
    with pytest.raises(ConfigError, match="context_dim must be left out"):
        built(context_dim=16)
    assert built(hops=1, context_dim=16)(X, X[..., :16]).shape == X.shape
    with pytest.raises(ConfigError, match="select must be None"):
        built(select=ph.select(ph.mean_keys(), ph.keep_share(0.5)))
    for other in (built("mha"), built("nexus_higher_order"), built(hops=3)):
        with pytest.raises(ConfigError, match="cache must hold the sums of 2 hops: make it with new_cache"):
            module(X, cache=other.new_cache(2))
