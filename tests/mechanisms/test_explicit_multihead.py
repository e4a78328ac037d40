"""What the paper of explicit multi-head attention says must hold, paper 042."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName
from polyhead.mechanisms.explicit_multihead import merged, virtual
from polyhead.nn.mixed_projection import HeadNormOutput

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "explicit_multihead", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def stirred(**config: object) -> nn.Module:
    module = built(**config)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "_mix" in name or p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("stored", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 11])
def test_without_norm_it_starts_as_grouped_query_attention(stored: int, length: int) -> None:
    mixed, plain = built(stored_heads=stored, norm_at=None), built("gqa", kv_heads=stored)
    plain.load_state_dict({k: v for k, v in mixed.state_dict().items() if "_mix" not in k})
    close(mixed(X[:, -length:], X, mask=ph.causal()), plain(X[:, -length:], X, mask=ph.causal()))


def test_mixing_commutes_with_positions() -> None:
    mixed = stirred(stored_heads=3, position=ph.nn.rope())
    k, _ = mixed.projection.keys_values(X)
    by = mixed.projection.key_mix
    turned, later = mixed.position.turn(k, 5), torch.einsum("bnsd,nh->bhsd", k, by)
    close(torch.einsum("bnsd,nh->bhsd", turned, by), mixed.position.turn(later, 5))


@pytest.mark.parametrize(
    "options", [{}, {"stored_heads": 3, "bias": True, "value_dim": 5}, {"norm_at": None}]
)
def test_merged_it_is_multi_head_attention_that_gives_the_same(options: dict[str, object]) -> None:
    mixed = stirred(position=ph.nn.rope(), score=ph.alibi(4), **options)
    plain = merged(mixed)
    assert type(plain) is ph.nn.MultiHeadAttention
    assert type(plain.projection) is ph.nn.Projection
    close(plain(X, mask=ph.causal()), mixed(X, mask=ph.causal()))


def test_one_query_reads_the_stored_heads_in_place_and_gets_the_same() -> None:
    mixed = stirred(stored_heads=3).eval()
    for query in range(11):
        several = mixed(X[:, : query + 1], mask=ph.causal())
        close(mixed(X[:, query : query + 1], X[:, : query + 1], mask=ph.causal()), several[:, -1:])


def test_normalised_heads_have_mean_zero_and_variance_one_whatever_their_size() -> None:
    torch.manual_seed(0)
    heads = 100 * torch.randn(2, 4, 11, 8, **F64)
    output = HeadNormOutput(32, 4, 8, **F64)
    with torch.no_grad():
        output.weight.copy_(torch.eye(32))
    normed = output(heads).unflatten(-1, (4, 8))
    close(normed.mean(-1), torch.zeros(2, 11, 4, **F64))
    close(normed.var(-1, correction=0), torch.ones(2, 11, 4, **F64), atol=1e-7)
    scaled = heads * torch.tensor([2.0, 1.0, 50.0, 0.5])[:, None, None]
    close(output(scaled), output(heads), atol=1e-6)


def test_a_larger_value_head_changes_nothing() -> None:
    mixed, larger = built(), built()
    with torch.no_grad():
        for module in (mixed, larger):
            module.projection.value.weight.mul_(1e3)  # far above epsilon
        larger.projection.value_mix[2, 2] = 7.0
    close(larger(X), mixed(X), atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_virtual_heads_lose_the_singular_values_that_are_cut_off(bias: bool) -> None:
    plain = built("mha", bias=bias, position=ph.nn.rope())
    if bias:
        nn.init.normal_(plain.projection.key.bias)
        nn.init.normal_(plain.projection.value.bias)
    close(virtual(plain, 4)(X, mask=ph.causal()), plain(X, mask=ph.causal()), atol=1e-10)
    lean = virtual(plain, 2)
    assert lean.config == built(stored_heads=2, norm_at=None, bias=bias, position=ph.nn.rope()).config
    assert lean.cost(9).kv_bytes_per_token == plain.cost(9).kv_bytes_per_token // 2
    back = merged(lean).projection

    def rows(linear: nn.Linear) -> Tensor:
        parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
        return torch.cat(parts, 1).detach().unflatten(0, (4, -1)).flatten(1)

    for name in ("key", "value"):
        old, new = rows(getattr(plain.projection, name)), rows(getattr(back, name))
        close((old - new).norm(), torch.linalg.svdvals(old)[2:].norm(), atol=1e-10)


def test_cost_counts_stored_heads_and_what_mixing_adds() -> None:
    mixed, plain = built(stored_heads=2), built("gqa", kv_heads=2)
    assert mixed.cost(64).parameters == plain.cost(64).parameters + 2 * 2 * 4 + 2 * 4 * 8
    assert mixed.cost(64).kv_bytes_per_token == plain.cost(64).kv_bytes_per_token
    assert mixed.cost(64).flops == plain.cost(64).flops + 4 * 64 * 2 * 4 * 8
    step, other = mixed.step_cost(63), plain.step_cost(63)
    assert (step.scores, step.values) == (2 * other.scores, 2 * other.values)


@pytest.mark.parametrize("options", [{"stored_heads": 3, "norm_at": None}, {"stored_heads": 1}], ids=str)
def test_every_variant_keeps_the_contract(options: dict[str, object]) -> None:
    assert broken_rules("explicit_multihead", **options) == {}


@pytest.mark.parametrize(
    "options", [{"norm_at": "kv"}, {"norm_at": "kv", "stored_heads": 2, "position": ph.nn.rope()}], ids=str
)
def test_normalised_keys_and_values_keep_the_contract(options: dict[str, object]) -> None:
    without = "equals_twin equals_twin_masked" if "position" in options else ""
    assert broken_rules("explicit_multihead", without=without, **options) == {}


def test_keys_and_values_are_normalised_whatever_their_size() -> None:
    module = built(norm_at="kv", stored_heads=3)
    k, v = module.projection.keys_values(X)
    for z in (k, v):
        torch.testing.assert_close(z.mean(-1), torch.zeros_like(z[..., 0]), rtol=0, atol=1e-12)
        torch.testing.assert_close(z.var(-1, correction=0), torch.ones_like(z[..., 0]), rtol=0, atol=1e-2)
    before = module(X)
    with torch.no_grad():
        module.projection.key.weight.mul_(1000)
    once = module(X)
    with torch.no_grad():
        module.projection.key.weight.mul_(1000)
    torch.testing.assert_close(module(X), once, rtol=0, atol=1e-6)
    assert before.shape == once.shape


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="stored_heads must be an integer, at least 1; got 0"):
        built(stored_heads=0)
    with pytest.raises(UnknownName, match="norm_at"):
        built(norm_at="key")
    with pytest.raises(ConfigError, match="norm_at"):
        merged(built(norm_at="kv"))
    with pytest.raises(ConfigError, match="attention must be explicit multi-head attention"):
        merged(built("mha"))
    with pytest.raises(ConfigError, match="they cannot be merged"):
        merged(built(qk_norm=True))
    with pytest.raises(ConfigError, match="attention must be multi-head attention made by its name"):
        virtual(built(), 2)
    with pytest.raises(ConfigError, match="attention must be multi-head attention made by its name"):
        virtual(built("moba", block_size=2, top_k=2), 2)
    with pytest.raises(ConfigError, match="stored_heads must be at most heads=4; got 5"):
        virtual(built("mha"), 5)
    with pytest.raises(ConfigError, match="qk_norm normalises every key head by itself"):
        virtual(built("mha", qk_norm=True), 2)
