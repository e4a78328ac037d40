"""What must hold of Combiner."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn import rope
from polyhead.reference.combiner import columns, combiner_weights, powers, segments

F64 = {"dtype": torch.float64}
X = torch.randn(2, 41, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()
SMALL: dict[str, dict[str, Any]] = {
    "combiner": {"segment": 6},
    "combiner_logsparse": {},
    "combiner_axial": {"row": 6},
}
PARTITIONS = {"combiner": segments(6), "combiner_logsparse": powers, "combiner_axial": columns(6)}


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **SMALL.get(name, {}), **options}, **F64).eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = built("grouped_query", kv_heads=module.kv_heads, **options)
    plain.load_state_dict(module.state_dict())
    return plain


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("combiner", {"segment": 3, "kv_heads": 2, "compiled": True}),
        ("combiner", {"segment": 4, "pool": "mean", "log_size": True, "value_dim": 5}),
        ("combiner_logsparse", {"kv_heads": 2}),
        ("combiner_logsparse", {"pool": "mean", "log_size": True, "value_dim": 5}),
        ("combiner_axial", {"row": 3, "kv_heads": 2, "log_size": True, "compiled": True}),
        ("combiner_axial", {"row": 5, "pool": "mean", "value_dim": 5, "bias": True}),
    ],
    ids=str,
)
def test_small_blocks_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    assert not broken_rules(name, **options)


def weights_in(module: Any, k: Tensor, mask: Any) -> Tensor:
    """The weights `(41, 41)` of the first item and head: what comes of the identity for values."""
    eye, found = torch.eye(41, **F64).expand(2, 1, -1, -1), {}

    def keep(heads: Tensor) -> Tensor:
        found["heads"] = heads
        return X

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_rows", lambda source, places: (k, eye))
        patched.setattr(module, "_join", keep)
        module(X, mask=mask)
    return found["heads"][0, 0]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_weights_are_a_distribution_over_all_that_is_past(name: str, pool: str) -> None:
    """Every row sums to 1, and no token that may be seen has weight 0."""
    module = built(name, heads=1, value_dim=41, pool=pool)
    with torch.no_grad():
        q, (_, k, _) = module._project(X, X, 0, 0, None)
        for mask in (CAUSAL, None) if name == "combiner" else (CAUSAL,):
            found = weights_in(module, k, mask)
            close(found.sum(1), torch.ones(41, **F64))
            seen = torch.ones(41, 41, dtype=torch.bool)
            assert torch.equal(found > 0, seen if mask is None else seen.tril())
            every = [True] * 41
            close(
                found,
                combiner_weights(q[0, 0], k[0, 0], PARTITIONS[name], pool, False, every, mask is not None),
            )


@pytest.mark.parametrize("length", [1, 2, 7, 12, 13])
def test_every_token_is_in_one_place(length: int) -> None:
    for (_, of), i in itertools.product(PARTITIONS.items(), range(length)):
        direct, parts = of(i, length, True)
        assert sorted(direct + [j for part in parts for j in part]) == list(range(i + 1))
    direct, parts = segments(5)(length - 1, length, False)
    assert sorted(direct + [j for part in parts for j in part]) == list(range(length))
    assert powers(13, 20, True) == ([13], [list(range(8)), list(range(8, 12)), [12]])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("combiner", {"segment": 41}),
        ("combiner", {"segment": 1}),
        ("combiner", {"segment": 64}),
        ("combiner_axial", {"row": 41}),
        ("combiner_axial", {"row": 1}),
    ],
    ids=str,
)
def test_one_block_and_blocks_of_one_are_softmax_attention(name: str, options: dict[str, Any]) -> None:
    module = built(name, kv_heads=2, position=rope(100.0), **options)
    plain = plain_of(module, position=rope(100.0))
    for mask in (CAUSAL, None) if name == "combiner" else (CAUSAL,):
        close(module(X, mask=mask), plain(X, mask=mask))
        fewer = built(name, kv_heads=2, position=rope(100.0))
        assert (fewer(X, mask=mask) - plain(X, mask=mask)).abs().max() > 1e-3


def test_two_tokens_need_no_block_of_two() -> None:
    module = built("combiner_logsparse")
    plain = plain_of(module)(X, mask=CAUSAL)
    close(module(X, mask=CAUSAL)[:, :2], plain[:, :2])
    assert (module(X, mask=CAUSAL) - plain)[:, 2].abs().max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_blocks_of_equal_keys_are_read_as_they_are_with_the_logarithm_of_their_size(name: str) -> None:
    """Keys and queries that are alike within blocks, and values that are not."""
    module, light = built(name, kv_heads=2, log_size=True), built(name, kv_heads=2)
    plain = plain_of(module)
    alike = X[:, :1].expand(-1, 41, -1)  # all tokens have one key and one query
    for one in (module, light, plain):
        v = one.projection.keys_values(X)[1]
        one._rows = lambda source, places, of=one, v=v: (of.projection.keys_values(source)[0], v)
    close(module(alike, mask=CAUSAL), plain(alike, mask=CAUSAL))
    assert (light(alike, mask=CAUSAL) - plain(alike, mask=CAUSAL)).abs().max() > 1e-2


@pytest.mark.parametrize("name", SMALL)
def test_steps_are_the_whole_call(name: str) -> None:
    module = built(name, kv_heads=2, position=rope(100.0), log_size=True)
    real = torch.ones(2, 41, dtype=torch.bool)
    real[1, :9] = False
    real[0, 12:18] = real[0, 22] = False
    with torch.no_grad():
        for padding in (None, real):
            rows = torch.ones_like(real) if padding is None else padding
            full = module(X, mask=CAUSAL, padding=padding)
            for chunks in ([1] * 41, [20, 1, 1, 19], [3, 30, 8]):
                cache, parts, at = module.new_cache(2), [], 0
                for size in chunks:
                    own = slice(at, at + size)
                    of = None if padding is None else padding[:, own]
                    parts.append(module(X[:, own], mask=CAUSAL, cache=cache, padding=of))
                    at += size
                close(torch.cat(parts, 1)[rows], full[rows])


def test_a_later_segment_is_in_no_summary() -> None:
    for name in SMALL:
        module, moved = built(name), X.clone()
        moved[:, 20:] = 100 * torch.randn_like(moved[:, 20:])
        with torch.no_grad():
            close(module(moved, mask=CAUSAL)[:, :20], module(X, mask=CAUSAL)[:, :20])


def test_what_is_computed_and_kept_grows_less_than_pairs_do() -> None:
    options: dict[str, Any] = {"dim": 64, "heads": 4, "device": "meta"}
    plain = ph.build("mha", **options)
    powers_of_two = ph.build("combiner_logsparse", **options)
    rows = ph.build("combiner_axial", row=256, **options)
    assert powers_of_two.cost(1 << 16).scores < plain.cost(1 << 16).scores / 1500
    assert rows.cost(1 << 16).scores < plain.cost(1 << 16).scores / 60
    segment = ph.build("combiner", segment=64, **options)
    grown = segment.cost(1 << 16).cache_bytes - segment.cost(1 << 15).cache_bytes
    assert grown == (1 << 15) // 64 * (4 * 32 + 1) * 4
    assert segment.step_cost(1 << 16).flops * 20 < plain.step_cost(1 << 16).flops


def test_what_it_does_not_do_is_said() -> None:
    for name, options, words in (
        ("combiner", {"segment": 0}, "segment must be at least 1; got 0"),
        ("combiner_axial", {"row": 0}, "row must be at least 1; got 0"),
        ("combiner_logsparse", {"pool": "sum"}, 'pool must be "max" or "mean"; got \'sum\''),
        ("combiner", {"log_size": 1}, "log_size"),
        ("combiner", {"position": ph.nn.alibi_position()}, "position must not be a bias of scores"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(name, **options)
    for name in SMALL:
        module = built(name)
        with pytest.raises(UnsupportedPattern, match=f"{name} does not support a mask other than causal"):
            module(X, mask=CAUSAL & ph.documents(torch.arange(41) // 20))
        with pytest.raises(UnsupportedPattern, match="does not support a context"):
            module.new_context_cache(X)
    with pytest.raises(UnsupportedPattern, match=r"combiner does not support a cache without a mask"):
        built("combiner")(X, cache=built("combiner").new_cache(2))
    for name in ("combiner_logsparse", "combiner_axial"):
        with pytest.raises(UnsupportedPattern, match=r"what comes later; pass mask=causal\(\)"):
            built(name)(X)
