"""What must hold of core context attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError, ShapeError, UnsupportedPattern
from polyhead.nn import rope
from polyhead.nn.block_masks import BlocksBehind, OtherBlocks, SinceBlock

F64 = {"dtype": torch.float64}
NAME = "core_context_attention"
X = torch.randn(2, 41, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()


def built(name: str = NAME, **options: Any) -> Any:
    small = {"group": 4, "window": 6} if name == NAME else {}
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **small, **options}, **F64).eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = built("grouped_query", kv_heads=module.kv_heads, **options)
    plain.load_state_dict(module.state_dict())
    return plain


@pytest.mark.parametrize(
    "options",
    [
        {"group": 3, "window": 2, "kv_heads": 2, "compiled": True},
        {"group": 4, "window": 5, "pool": "mean", "log_size": True, "value_dim": 5, "bias": True},
        {"group": 2, "window": 1, "pool": "max", "qk_norm": True},
    ],
    ids=str,
)
def test_small_groups_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules(NAME, **options)


@pytest.mark.parametrize("options", [{"window": 41}, {"window": 99}, {"group": 1, "window": 3}], ids=str)
def test_a_wide_window_and_groups_of_one_are_causal_attention(options: dict[str, Any]) -> None:
    module = built(kv_heads=2, position=rope(100.0), **options)
    close(module(X, mask=CAUSAL), plain_of(module, position=rope(100.0))(X, mask=CAUSAL))
    fewer = built(kv_heads=2, position=rope(100.0))
    assert (fewer(X, mask=CAUSAL) - module(X, mask=CAUSAL)).abs().max() > 1e-3


@pytest.mark.parametrize(("group", "window"), [(4, 6), (4, 8), (1, 1), (7, 3), (16, 1)])
def test_every_past_token_is_read_once(group: int, window: int) -> None:
    near = densify(SinceBlock(group, window), batch=1, heads=1, queries=41, keys=41)[0, 0]
    place = torch.arange(41).view(-1, 1)
    far = BlocksBehind(group, window).allowed(place, place, place, torch.arange(41 // group))
    tokens = far.repeat_interleave(group, 1)
    tokens = torch.cat([tokens, torch.zeros(41, 41 - tokens.shape[1], dtype=torch.bool)], 1)
    assert torch.equal(near ^ tokens, torch.ones(41, 41, dtype=torch.bool).tril())
    assert not (near & tokens).any()
    assert (near.sum(1) >= torch.arange(1, 42).clamp(max=window)).all()
    assert (near.sum(1) < window + group).all()


@pytest.mark.parametrize(
    "mask", [SinceBlock(4, 6), BlocksBehind(4, 6), SinceBlock(3, 1), OtherBlocks(5)], ids=str
)
def test_masks_know_their_tiles(mask: Any) -> None:
    i, j = torch.arange(40), torch.arange(40)
    allowed = mask.allowed(i[0], i[0], i.view(-1, 1), j)
    for i0, i1, j0, j1 in torch.randint(40, (300, 4), generator=torch.Generator().manual_seed(0)).tolist():
        (i0, i1), (j0, j1) = sorted((i0, i1)), sorted((j0, j1))
        some, every = mask.bounds(i[0], i[0], i[i0], i[i1], j[j0], j[j1])
        tile = allowed[i0 : i1 + 1, j0 : j1 + 1]
        assert bool(some) == bool(tile.any())
        assert bool(every) == bool(tile.all()) or not every


def test_a_group_is_read_once_it_is_far_enough_back() -> None:
    """With windows of 6 the first core token, of tokens 0 to 3, is read from token 4 - 1 + 6 = 9 on."""
    module = built()
    assert [module._blocks_read(t + 1, True) for t in (0, 8, 9, 12, 13)] == [0, 0, 1, 1, 2]
    plain = plain_of(module)
    with torch.no_grad():
        other = (module(X, mask=CAUSAL) - plain(X, mask=CAUSAL)).abs().amax((0, 2))
    assert other[:9].max() <= 1e-12
    assert other[9:].min() > 1e-6


def test_groups_of_equal_tokens_are_read_as_their_number_with_its_logarithm() -> None:
    """Without it a group of four alike counts once; with it attention is full attention."""
    x = X[:, ::4].repeat_interleave(4, 1)[:, :41]
    plain = plain_of(built(kv_heads=2))(x, mask=CAUSAL)
    close(built(kv_heads=2, log_size=True)(x, mask=CAUSAL), plain)
    assert (built(kv_heads=2)(x, mask=CAUSAL) - plain).abs().max() > 1e-2
    module = built(heads=1)
    q, (_, k, v) = module._project(x, x, 0, 0, None)
    t = 40
    scores = (k @ q[:, :, t, :, None])[..., 0] / math.sqrt(32)
    once = torch.ones(41, **F64)
    once[:32] = 0.25  # eight groups
    want = ((scores + once.log()).softmax(-1)[..., None, :] @ v)[:, :, 0].flatten(1)
    close(module(x, mask=CAUSAL)[:, t], module.output(want[:, None, None].transpose(1, 2))[:, 0])


@pytest.mark.parametrize("options", [{}, {"pool": "max", "window": 8}, {"group": 9, "window": 1}], ids=str)
def test_steps_are_the_whole_call(options: dict[str, Any]) -> None:
    module = built(kv_heads=2, position=rope(100.0), log_size=True, **options)
    real = torch.ones(2, 41, dtype=torch.bool)
    real[1, :9] = False
    real[0, 13:16] = False
    with torch.no_grad():
        for padding in (None, real):
            full = module(X, mask=CAUSAL, padding=padding)
            for chunks in ([1] * 41, [20, 1, 1, 19], [3, 30, 8], [41]):
                cache, parts, at = module.new_cache(2), [], 0
                for size in chunks:
                    own = slice(at, at + size)
                    of = None if padding is None else padding[:, own]
                    parts.append(module(X[:, own], mask=CAUSAL, cache=cache, padding=of))
                    at += size
                found = torch.cat(parts, 1)
                close(found if padding is None else found[real], full if padding is None else full[real])


def test_gradients_flow_through_a_cache() -> None:
    module = built(kv_heads=2)
    flows = []
    for chunks in ([41], [20, 1, 1, 19]):
        x, cache = X.clone().requires_grad_(), module.new_cache(2)
        y = torch.cat([module(one, mask=CAUSAL, cache=cache) for one in x.split(chunks, 1)], 1)
        flows.append(torch.autograd.grad(y.sin().sum(), x)[0])
    close(flows[0], flows[1])


def test_a_cache_forgets_tokens_that_are_summed_up() -> None:
    module = built()
    x = torch.randn(1, 900, 32, generator=torch.Generator().manual_seed(2), **F64)
    with torch.no_grad():
        full = module(x, mask=CAUSAL)
        cache = module.new_cache(1, max_length=900)
        fixed = cache.nbytes()
        found = [module(one, mask=CAUSAL, cache=cache) for one in x.split([300, *[1] * 100, 450, 50], 1)]
        close(torch.cat(found, 1), full)
        assert cache.nbytes() == fixed == module.cost(900).cache_bytes
        assert fixed * 3 < plain_of(module).cost(900).cache_bytes
        with pytest.raises(ShapeError, match="1 more tokens do not fit, it holds 900 of max_length=900"):
            module(x[:, :1], mask=CAUSAL, cache=cache)
        cache.crop(890)
        close(module(x[:, 890:], mask=CAUSAL, cache=cache), full[:, 890:])
        with pytest.raises(
            ConfigError, match="crop: the rows that 100 tokens' next query reads were dropped"
        ):
            cache.crop(100)
        with pytest.raises(ConfigError, match=r"crop: length must lie in 0\.\.900"):
            cache.crop(901)


def test_what_is_kept_grows_by_one_core_token_a_group() -> None:
    few = ph.build(NAME, dim=64, heads=4, window=64, device="meta")
    all_ = ph.build("mha", dim=64, heads=4, device="meta")
    grown = few.cost(1 << 16).cache_bytes - few.cost(1 << 15).cache_bytes
    assert grown == (1 << 11) * (4 * 32 + 1) * 4
    assert few.step_cost(1 << 16).flops * 8 < all_.step_cost(1 << 16).flops


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"group": 0}, "group must be at least 1; got 0"),
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"pool": "sum"}, 'pool must be "query", "mean" or "max"; got \'sum\''),
        ({"log_size": 1}, "log_size"),
        ({"position": ph.nn.alibi_position()}, "position must not be a bias of scores"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    module = built()
    with pytest.raises(UnsupportedPattern, match="does not support a mask other than causal"):
        module(X, mask=CAUSAL & ph.documents(torch.arange(41) // 20))
    with pytest.raises(UnsupportedPattern, match=r"what comes later; pass mask=causal\(\)"):
        module(X)
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        module.new_context_cache(X)
