"""What the papers of shared and fewer heads say must hold: grouped, multi-query, sparse-query attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ConfigError, UnknownName

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str, seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def repeated(module: nn.Module, times: int, name: str = "mha") -> nn.Module:
    """Multi-head attention whose key and value heads are those of `module`, each `times` over."""
    plain = built(name, seed=9, heads=module.kv_heads * times, head_dim=module.head_dim)
    state = module.state_dict()
    for part in ("key", "value"):
        weight = state[f"projection.{part}.weight"].unflatten(0, (module.kv_heads, module.head_dim))
        state[f"projection.{part}.weight"] = weight.repeat_interleave(times, dim=0).flatten(0, 1)
    plain.load_state_dict(state)
    return plain


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


# ---- grouped-query attention, paper 074 ----


def test_as_many_groups_as_heads_is_multi_head_attention_bit_for_bit() -> None:
    grouped, plain = built("grouped_query", kv_heads=4), built("mha")
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(grouped.state_dict())
    assert torch.equal(grouped(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_one_group_is_multi_query_attention_bit_for_bit() -> None:
    grouped, one = built("grouped_query", kv_heads=1), built("multi_query")
    one.load_state_dict(grouped.state_dict())
    assert torch.equal(grouped(X, mask=ph.causal()), one(X, mask=ph.causal()))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (9, 3)])
def test_grouped_is_multi_head_with_every_key_head_repeated_in_a_row(heads: int, kv_heads: int) -> None:
    grouped = built("grouped_query", heads=heads, head_dim=8, kv_heads=kv_heads)
    close(grouped(X, mask=ph.causal()), repeated(grouped, heads // kv_heads)(X, mask=ph.causal()))


def test_score_operations_do_not_depend_on_the_groups_and_cache_bytes_do() -> None:
    costs = {g: built("grouped_query", kv_heads=g).cost(64, batch=3) for g in (1, 2, 4)}
    assert len({(c.scores, c.values) for c in costs.values()}) == 1
    for groups, cost in costs.items():
        assert cost.cache_bytes == 3 * 2 * groups * 8 * 64 * 8
        assert cost.parameters == 2 * 32 * 8 * (4 + groups)


def test_a_group_stays_the_same_when_its_query_heads_change_places() -> None:
    grouped = built("grouped_query", kv_heads=2)
    moved = built("grouped_query", kv_heads=2)
    state = grouped.state_dict()
    order = torch.tensor([1, 0, 3, 2])
    query = state["projection.query.weight"].unflatten(0, (4, 8))[order].flatten(0, 1)
    output = state["output.weight"].unflatten(1, (4, 8))[:, order].flatten(1, 2)
    moved.load_state_dict(state | {"projection.query.weight": query, "output.weight": output})
    close(moved(X), grouped(X))


def test_groups_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match="kv_heads must divide heads=4; got kv_heads=3; allowed are 1, 2, 4"
    ):
        built("grouped_query", kv_heads=3)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=8"):
        built("grouped_query", kv_heads=8)


# ---- multi-query attention, paper 059 ----


def test_multi_query_is_multi_head_with_tiled_keys_and_values() -> None:
    one = built("multi_query")
    close(one(X, mask=ph.causal()), repeated(one, 4)(X, mask=ph.causal()))


def test_one_head_is_single_head_attention() -> None:
    one, plain = built("multi_query", heads=1), built("mha", heads=1)
    plain.load_state_dict(one.state_dict())
    assert torch.equal(one(X), plain(X))


def test_the_cache_has_one_head_and_its_bytes_say_so() -> None:
    one, plain = built("multi_query"), built("mha")
    cache = one.new_cache(2, max_length=11)
    kept = one(X, mask=ph.causal(), cache=cache)
    assert kept.shape == X.shape
    assert cache.nbytes() == 2 * 2 * 11 * 8 * 8
    assert 4 * cache.nbytes() == plain.new_cache(2, max_length=11).nbytes()
    cost = one.cost(11, batch=2)
    assert cost.cache_bytes == cache.nbytes()
    assert cost.parameters == 32 * 32 + 2 * 32 * 8 + 32 * 32
    assert cost.scores == plain.cost(11, batch=2).scores


def test_keys_are_not_copied_for_every_query_head() -> None:
    one = ph.build("multi_query", dim=512, heads=32)
    x = torch.randn(1, 1, 512)
    held = tuple(torch.randn(1, 1, 65536, 16) for _ in range(2))
    cache = one.new_cache(1)
    with torch.no_grad():
        cache.append(*held)
        one(x, mask=ph.causal(), cache=cache)  # the cache has room now, the next step adds in place
        with torch.profiler.profile(profile_memory=True) as profile:
            one(x, mask=ph.causal(), cache=cache)
    peak = max(event.cpu_memory_usage for event in profile.events())
    assert peak < held[0].numel() * 4, f"{peak} bytes were taken at once"


def test_equal_query_heads_give_equal_outputs_of_heads() -> None:
    one = built("multi_query")
    with torch.no_grad():
        weight = one.projection.query.weight.unflatten(0, (4, 8))
        weight.copy_(weight[:1].expand_as(weight).clone())
    heads = []
    one.output.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    one(X, mask=ph.causal())
    close(heads[0], heads[0][:, :1].expand_as(heads[0]))


# ---- sparse-query attention, paper 008 ----


def test_all_query_heads_make_it_multi_head_or_grouped_or_multi_query() -> None:
    for kv_heads, name in ((4, "mha"), (2, "grouped_query"), (1, "multi_query")):
        sparse = built("sparse_query", query_heads=4, kv_heads=kv_heads)
        plain = built(name, **({"kv_heads": 2} if name == "grouped_query" else {}))
        plain.load_state_dict(sparse.state_dict())
        assert torch.equal(sparse(X, mask=ph.causal()), plain(X, mask=ph.causal()))


@pytest.mark.parametrize(
    ("form", "query_heads", "kv_heads"),
    [
        ("sparse", 8, 4),
        ("symmetric", 8, 8),
        ("extreme", 4, 4),
        ("extreme_multi_query", 4, 1),
        ("light", 12, 4),
        ("reverse", 4, 8),
    ],
)
def test_forms_of_sixteen_heads(form: str, query_heads: int, kv_heads: int) -> None:
    sparse = built("sparse_query", dim=64, heads=16, form=form)
    assert (sparse.config.query_heads, sparse.config.kv_heads) == (query_heads, kv_heads)
    assert sparse.head_dim == 4
    plain = built("mha", dim=64, heads=16).cost(64)
    cost = sparse.cost(64)
    maps = max(query_heads, kv_heads)  # the reverse form has as many maps as key heads
    assert cost.scores * 16 == plain.scores * maps
    assert cost.values * 16 == plain.values * maps
    assert cost.kv_bytes_per_token == 2 * kv_heads * 4 * 8
    assert cost.parameters == 64 * 4 * (query_heads + 2 * kv_heads + maps)


def test_sparse_is_grouped_attention_of_a_narrower_inside() -> None:
    sparse = built("sparse_query", query_heads=2, kv_heads=1)
    grouped = built("grouped_query", heads=2, head_dim=8, kv_heads=1)
    grouped.load_state_dict(sparse.state_dict())
    assert torch.equal(sparse(X), grouped(X))


def test_sparse_is_multi_head_with_the_output_rows_of_the_other_heads_zero() -> None:
    sparse, plain = built("sparse_query", form="symmetric"), built("mha", seed=3)
    state = plain.state_dict()
    for part in ("query", "key", "value"):
        state[f"projection.{part}.weight"][:16] = sparse.state_dict()[f"projection.{part}.weight"]
    state["output.weight"][:, :16] = sparse.state_dict()["output.weight"]
    state["output.weight"][:, 16:] = 0.0
    plain.load_state_dict(state)
    close(sparse(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_reverse_repeats_query_heads() -> None:
    sparse, plain = built("sparse_query", query_heads=1, kv_heads=2), built("mha", heads=2, head_dim=8)
    state = sparse.state_dict()
    state["projection.query.weight"] = state["projection.query.weight"].repeat(2, 1)
    plain.load_state_dict(state)
    close(sparse(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_sparse_refusals() -> None:
    with pytest.raises(UnknownName, match="did you mean 'light'"):
        built("sparse_query", form="ligth")
    with pytest.raises(ConfigError, match="query_heads must be at most heads=4"):
        built("sparse_query", query_heads=8)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4 or be a multiple of it"):
        built("sparse_query", query_heads=4, kv_heads=3)
    with pytest.raises(ConfigError, match="heads must divide dim when head_dim is not given"):
        built("sparse_query", dim=30)
