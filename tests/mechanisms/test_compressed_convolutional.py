"""What must hold of compressed convolutional attention."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.compressed_attention import CompressedAttention

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(seed: int = 0, **config: object) -> CompressedAttention:
    torch.manual_seed(seed)
    return ph.build("compressed_convolutional", **{"dim": 32, "heads": 4, **config}, **F64).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2, "kernels": (4, 3)},
        {"kv_heads": 1, "head_dim": 3, "qk_mean": False},
        {"kernels": (1, 1), "value_shift": False},
        {"qk_norm": False, "bias": True},
    ],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, object]) -> None:
    assert broken_rules("compressed_convolutional", without="decode_cross", **options) == {}


def test_with_nothing_of_its_own_it_is_grouped_query_attention() -> None:
    module = built(kv_heads=2, head_dim=8, qk_norm=False, qk_mean=False, value_shift=False)
    plain = ph.build("grouped_query", dim=32, heads=4, kv_heads=2, **F64)
    mixing = module.projection
    with torch.no_grad():
        for conv in (mixing.channels, mixing.within):
            conv.weight.zero_()
            conv.bias.zero_()
        mixing.channels.weight[:, 0, -1] = 1.0
        mixing.within.weight[..., -1] = torch.eye(8, **F64).repeat(6, 1)
    state = module.state_dict().items()
    plain.load_state_dict({n: t for n, t in state if n.split(".")[1] not in ("channels", "within")})
    for mask in (None, ph.causal()):
        torch.testing.assert_close(module(X, mask=mask), plain(X, mask=mask))


def test_queries_and_keys_have_one_length() -> None:
    module = built(kv_heads=2)
    with torch.no_grad():
        module.projection.temperature.copy_(torch.tensor([0.3, -1.0]))
        q, k, _ = module.projection(X)
    torch.testing.assert_close(q.norm(dim=-1), torch.full((2, 4, 11), 2.0, **F64))
    want = 2.0 * module.projection.temperature.exp().detach()[:, None].expand(2, 2, 11)
    torch.testing.assert_close(k.norm(dim=-1), want)


def test_a_factor_of_queries_and_keys_together_changes_nothing() -> None:
    module = built()
    with torch.no_grad():
        for conv in (module.projection.channels, module.projection.within):
            conv.bias.zero_()
        before = module(X)
        module.projection.query.weight.mul_(3.0)
        module.projection.key.weight.mul_(3.0)
        torch.testing.assert_close(module(X), before)
        module.projection.key.weight.mul_(3.0)  # one of them alone does
        assert (module(X) - before).abs().max().item() > 1e-4


def test_half_of_the_values_is_that_of_the_token_before() -> None:
    module = built(kv_heads=2)
    with torch.no_grad():
        _, _, v = module.projection(X)
        _, _, later = module.projection(X[:, 1:])
    assert v[:, 1, 0].abs().max().item() == 0.0  # nothing stands before the first
    torch.testing.assert_close(v[:, 0, 1:], later[:, 0])
    torch.testing.assert_close(v[:, 1, 2:], later[:, 1, 1:])
    changed = X.clone()
    changed[:, 4] += 1.0
    with torch.no_grad():
        moved = (module.projection(changed)[2] - v).abs().amax((0, 3))
    assert moved[0].nonzero().flatten().tolist() == [4]
    assert moved[1].nonzero().flatten().tolist() == [5]


def test_means_are_the_same_for_one_query_head_a_key_head() -> None:
    module = built(kv_heads=4, qk_norm=False)
    with torch.no_grad():
        for conv in (module.projection.channels, module.projection.within):
            conv.weight.zero_()
            conv.bias.zero_()
        q, k, _ = module.projection(X)
    torch.testing.assert_close(q, k)


def test_what_it_costs() -> None:
    module = built(dim=64, heads=8, kv_heads=2, head_dim=4, kernels=(3, 2))
    widths, heads = 8 * 4 + 2 * 4, 10
    expected = 64 * 32 * 2 + 2 * 64 * 8 + widths * 3 + heads * 16 * 2 + 2 * widths + 2
    assert sum(p.numel() for p in module.parameters()) == expected
    cost = module.cost(100, dtype=torch.float16)
    assert cost.kv_bytes_per_token == 2 * 2 * 4 * 2
    assert cost.cache_bytes == 100 * cost.kv_bytes_per_token + cost.state_bytes


def test_tokens_can_be_taken_back_and_turned() -> None:
    module = built(position=ph.nn.rope(), kernels=(3, 2))
    with torch.no_grad():
        full = module(X, mask=ph.causal())
        cache = module.new_cache(2)
        module(X[:, :9], mask=ph.causal(), cache=cache)
        cache.crop(5)
        torch.testing.assert_close(module(X[:, 5:], mask=ph.causal(), cache=cache), full[:, 5:])


def test_what_is_not_allowed() -> None:
    for options, message in (
        ({"kernels": 3}, r"kernels must be \(t0, t1\)"),
        ({"kernels": (0, 2)}, "kernels"),
        ({"kv_heads": 3}, "allowed are 1, 2, 4"),
        ({"value_dim": 8}, "value_dim is not an option here"),
        ({"context_dim": 8}, "context_dim is not an option here"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(**options)
    module = built()
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        module(X, X)
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        module.new_context_cache(X)
    with pytest.raises(ConfigError, match="make it with new_cache of this module"):
        module(X, cache=ph.build("mha", dim=32, heads=4, **F64).new_cache(2))
