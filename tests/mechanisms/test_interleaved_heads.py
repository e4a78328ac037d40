"""What the paper of interleaved heads says must hold of the module, paper 058."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify, tile_map
from polyhead.errors import ConfigError, UnknownName
from polyhead.nn.pseudo_tokens import pseudo_mask

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()


def built(name: str = "interleaved_heads", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def disturbed(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"pseudo": 1, "order": "flat", "position": ph.nn.rope()},
        {"pseudo": 3},
        {"pseudo": 3, "collapse": "all", "position": ph.nn.rope(), "virtual_positions": False},
        {"pseudo": 2, "position": ph.nn.alibi_position(), "score": ph.soft_cap(5.0)},
        {"pseudo": 2, "position": ph.nn.sinusoidal(), "mask": ph.window(3)},
    ],
)
def test_mixtures_that_are_the_heads_themselves_are_grouped_query_attention(
    kv_heads: int, options: dict
) -> None:
    module = built(noise=0.0, kv_heads=kv_heads, **options)
    for name in ("pseudo", "order", "collapse", "virtual_positions"):
        options = {k: v for k, v in options.items() if k != name}
    plain = built("grouped_query", kv_heads=kv_heads, **options)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k in plain.state_dict()})
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, 8:] = False
    for mask, padding in itertools.product((None, CAUSAL, CAUSAL & ph.window(2)), (None, real)):
        close(module(X, mask=mask, padding=padding), plain(X, mask=mask, padding=padding))


@pytest.mark.parametrize(
    "options",
    [
        {"order": "flat", "kv_heads": 2, "pseudo": 2},
        {"pseudo": 3, "collapse": "all"},
        {"pseudo": 2, "order": "flat", "collapse": "all", "head_dim": 6, "value_dim": 5},
    ],
)
def test_other_options_keep_the_contract(options: dict) -> None:
    without = "equals_twin gradients" if "head_dim" in options else ""  # these choose widths themselves
    assert not broken_rules(
        "interleaved_heads",
        compiled="head_dim" not in options,
        without=without,
        **{name: value for name, value in options.items() if name != "head_dim"},
    )


@pytest.mark.parametrize("order", ["token", "flat"])
def test_a_head_can_pair_the_queries_and_keys_of_all_heads(order: str) -> None:
    module = built(order=order)
    swap = torch.eye(4, **F64)[:, None, :].expand(4, 4, 4)  # pseudo-token p of every head is head p
    with torch.no_grad():
        for mix in (module.query_mix, module.key_mix, module.value_mix):
            mix.weight.copy_(swap)
    q, (k, v) = module.projection.queries(X), module.projection.keys_values(X)
    logits = torch.einsum("baid,bcjd->biajc", q, k) / math.sqrt(8)  # query head a, key head c: 16 patterns
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    heads = torch.einsum("biajc,bcjd->baid", weights, v)  # what every head's pseudo-token a gives
    expected = module.output(heads.mean(1, keepdim=True).expand(-1, 4, -1, -1))
    found = module(X)
    if order == "token":
        close(found, expected)
    else:
        assert (found - expected).abs().max() > 1e-3


def test_flat_causal_is_a_causal_mask_of_the_virtual_sequence() -> None:
    assert pseudo_mask(CAUSAL, 3, ordered=True, queries=5) == CAUSAL
    assert pseudo_mask(None, 3, ordered=True, queries=1) == CAUSAL
    for mask in (CAUSAL & ph.window(2), ph.window(3, 0), None):
        found = pseudo_mask(mask, 3, ordered=True, queries=6)
        dense = densify(found, batch=1, heads=1, queries=18, keys=24)[0, 0]
        for i, j in itertools.product(range(6), range(8)):
            i += 2
            seen = mask is None or densify(mask, batch=1, heads=1, queries=6, keys=8)[0, 0, i - 2, j]
            block = dense[3 * (i - 2) : 3 * (i - 1), 3 * j : 3 * j + 3]
            full = torch.ones(3, 3, dtype=torch.bool)
            assert torch.equal(block, (full.tril() if i == j else full) & seen), (mask, i, j)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("mask", [None, CAUSAL, CAUSAL & (ph.window(3) | ph.sink(1)), ph.blocks(3)])
def test_bounds_of_tiles_are_true(mask: ph.Mask | None, ordered: bool, shift: int) -> None:
    found = pseudo_mask(mask, 3, ordered=ordered, queries=8, shift=shift)
    if found is None:
        return
    dense = densify(found, batch=1, heads=1, queries=24, keys=36)[0, 0]
    for rows, cols in ((4, 5), (3, 3), (1, 7)):
        tiles = tile_map(
            found, batch=1, heads=1, queries=24, keys=36, offset=12, rows=rows, cols=cols, device="cpu"
        )
        for n, m in itertools.product(range(tiles.some.shape[-2]), range(tiles.some.shape[-1])):
            tile = dense[n * rows : (n + 1) * rows, m * cols : (m + 1) * cols]
            assert tiles.some[0, 0, n, m] or not tile.any()
            assert tile.all() or not tiles.every[0, 0, n, m]


@pytest.mark.parametrize("order", ["token", "flat"])
@pytest.mark.parametrize("virtual", [True, False])
def test_a_cache_holds_plain_heads_and_gives_the_full_call_with_rotary_positions(
    order: str, virtual: bool
) -> None:
    module = disturbed(
        built(pseudo=3, kv_heads=2, order=order, virtual_positions=virtual, position=ph.nn.rope())
    )
    positions = torch.tensor([0, 1, 2, 5, 6, 7, 9, 10, 11, 20, 21])
    for where in (None, positions):
        full = module(X, mask=CAUSAL, positions=where)
        cache, steps, at = module.new_cache(2, max_length=11), [], 0
        for part in X.split([4, 1, 1, 5], dim=1):
            own = None if where is None else where[at : at + part.shape[1]]
            steps.append(module(part, mask=CAUSAL, positions=own, cache=cache))
            at += part.shape[1]
        close(torch.cat(steps, dim=1), full)
    assert module.cost(11).kv_bytes_per_token == 2 * 2 * 8 * 8
    assert not torch.allclose(module(X, mask=CAUSAL, positions=positions), module(X, mask=CAUSAL))


def test_virtual_positions_are_those_of_the_virtual_sequence() -> None:
    module = disturbed(built(pseudo=3, position=ph.nn.rope()))
    q = module._mixed(module.query_mix, module._queries(X, 4))
    expected = module.position.turn(module.query_mix(module.projection.queries(X)), 12)
    close(q, expected)


def test_biases_and_maps_go_by_tokens_and_decode_with_a_context() -> None:
    module = disturbed(
        built(pseudo=2, order="flat", score=(ph.alibi(4), ph.head_mix(torch.eye(4) + 0.1)), dropout=0.0)
    )
    context = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5), **F64)
    full = module(X, context, mask=ph.window(4))
    cache = module.new_context_cache(context, queries=11)
    close(torch.cat([module(x, mask=ph.window(4), cache=cache) for x in X.split([1, 5, 5], 1)], 1), full)


def test_flat_order_and_plain_calls_run_on_fused_kernels_and_nothing_is_dense() -> None:
    module = built(order="flat", pseudo=2)
    x = torch.randn(1, 600, 32, **F64)
    with ph.strict():
        module(x, mask=CAUSAL & ph.window(50))
        built()(x[:, :200], mask=CAUSAL)


def test_losses_of_the_weights_see_pairs_of_tokens() -> None:
    module = built(
        order="flat", pseudo=2, regularizers=(ph.nn.attention_diversification(weight=0.1),)
    ).train()
    plain = built("mha", regularizers=(ph.nn.attention_diversification(weight=0.1),)).train()
    module(X, mask=CAUSAL)
    plain(X, mask=CAUSAL)
    found, expected = ph.nn.auxiliary_losses(module), ph.nn.auxiliary_losses(plain)
    assert found.keys() == expected.keys()
    q, rows = module.projection.queries(X), module.projection.keys_values(X)
    mask = pseudo_mask(CAUSAL, 2, ordered=True, queries=11)
    weights = module._weights(q, rows, mask=mask)
    assert weights.shape == (2, 4, 11, 11)
    close(weights.sum(-1), torch.ones(2, 4, 11, **F64))
    close(weights.triu(1), torch.zeros_like(weights))


def test_steps_with_a_cache_count_the_mixing_of_what_is_cached() -> None:
    module = built(pseudo=2)
    mixing = 2 * 2 * 16 * 8 * 2  # keys and values, 2·P·H²·D each
    assert module.step_cost(100).projections == module.cost(1).projections + 100 * mixing
    assert module.cost(5).scores == 4 * built("mha").cost(5).scores


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="turns do not add up"):
        built(position=ph.nn.rope(scaling=ph.nn.DynamicNtk(2.0, 64)))
    with pytest.raises(UnknownName, match="'tokn'; did you mean 'token'"):
        built(order="tokn")
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=3"):
        built(kv_heads=3)
    with pytest.raises(ConfigError, match="pseudo must be an integer, at least 1"):
        built(pseudo=0)
