"""What the paper of optimised, efficient and super attention says must hold, paper 050."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, ShapeError, UnknownName, UnsupportedPattern

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "super_attention", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def test_efficient_is_attention_with_identities_and_optimised_with_identity_values() -> None:
    for name, parts in (("efficient_attention", ("key", "value")), ("optimised_attention", ("value",))):
        module, plain = built(name), built("mha")
        state = module.state_dict() | {f"projection.{part}.weight": torch.eye(32, **F64) for part in parts}
        plain.load_state_dict(state)
        close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_one_head_of_full_width_loses_nothing_by_it() -> None:
    plain, module = built("mha", heads=1), built("efficient_attention", heads=1)
    query, key, value = (getattr(plain.projection, n).weight for n in ("query", "key", "value"))
    module.load_state_dict(
        {"projection.query.weight": key.T @ query, "output.weight": plain.output.weight @ value}
    )
    close(module(X), plain(X))


def test_several_heads_do_lose_by_it() -> None:
    # two heads that say opposite things of the same columns: what they say cancels where they look alike
    plain, optimised = built("mha", heads=2), built("optimised_attention", heads=2)
    with torch.no_grad():
        plain.projection.value.weight[16:] = plain.projection.value.weight[:16]
        plain.output.weight[:, 16:] = -plain.output.weight[:, :16]
    alone = torch.eye(32, **F64)[:, None]  # sequences of one token: there optimised attention is W_O
    close(optimised(alone)[:, 0], optimised.output.weight.T)
    close(plain(alone), torch.zeros_like(alone))  # to agree, W_O has to be zero, and then all it says is
    assert plain(X).abs().max() > 0.1


def test_the_weights_of_a_row_sum_to_one() -> None:
    module = built(bias=True)
    with torch.no_grad():
        module.kernel.zero_()
        module.kernel_bias.fill_(1.0)  # all values are ones
        module.output.weight.copy_(torch.eye(32))
        module.output.bias.zero_()
    close(module(X), torch.ones_like(X))


def test_the_identity_kernel_is_efficient_attention() -> None:
    module, efficient = built(start="identity"), built("efficient_attention")
    efficient.load_state_dict({k: v for k, v in module.state_dict().items() if k != "kernel"})
    close(module(X), efficient(X))


def test_super_attention_knows_positions_and_efficient_attention_does_not() -> None:
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    module, efficient = built(), built("efficient_attention")
    close(efficient(X[:, order]), efficient(X)[:, order])
    assert (module(X[:, order]) - module(X)[:, order]).abs().max() > 0.1


def test_the_triangular_kernel_lets_nothing_later_through() -> None:
    module, changed = built(causal=True, start="uniform"), X.clone()
    changed[:, 6:] += 1.0
    close(module(changed, mask=ph.causal())[:, :6], module(X, mask=ph.causal())[:, :6])
    assert (module(changed, mask=ph.causal())[:, 6:] - module(X, mask=ph.causal())[:, 6:]).abs().min() > 0


def test_parameters_and_cache() -> None:
    length, d = 16, 32
    costs = {
        name: built(name, **({"length": length} if name == "super_attention" else {})).cost(11)
        for name in ("optimised_attention", "efficient_attention", "super_attention")
    }
    assert costs["optimised_attention"].parameters == 3 * d * d
    assert costs["efficient_attention"].parameters == 2 * d * d
    assert costs["super_attention"].parameters == 2 * d * d + length * length
    assert costs["optimised_attention"].kv_bytes_per_token == 2 * d * 8
    assert costs["efficient_attention"].kv_bytes_per_token == d * 8
    turned = built("efficient_attention", position=ph.nn.rope())
    assert turned.cost(11).kv_bytes_per_token == 2 * d * 8
    assert len(turned.new_cache().append(*(torch.zeros(1, 4, 1, 8, **F64),) * 2).rows) == 2


@pytest.mark.parametrize("name", ["optimised_attention", "efficient_attention", "super_attention"])
def test_biases_and_norms_keep_the_contract(name: str) -> None:
    rules = "decode decode_padded cache_edits gradients" if name == "super_attention" else "gradients"
    assert broken_rules(name, without=rules, bias=True, qk_norm=True) == {}


def test_rotary_positions_keep_the_contract() -> None:
    rules = "equals_twin equals_twin_masked"
    assert broken_rules("efficient_attention", without=rules, position=ph.nn.rope()) == {}


def test_decoding_under_autocast() -> None:
    module, x = built("efficient_attention").float(), X.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache, full = module.new_cache(2, max_length=11), module(x, mask=ph.causal())
        parts = [module(part, mask=ph.causal(), cache=cache) for part in x.split([5, 1, 5], dim=1)]
    assert cache.nbytes() == 2 * 11 * 32 * 2
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=0.02)


def test_refusals() -> None:
    module = built(length=10)
    with pytest.raises(
        ShapeError, match="kernel for 10 tokens, and the call has 11; build it with length=11"
    ):
        module(X)
    for mask in (ph.causal(), ph.causal() & ph.window(3), ph.window(3)):
        with pytest.raises(UnsupportedPattern, match="build it with causal=True, or use efficient_attention"):
            module(X[:, :9], mask=mask)
    with pytest.raises(UnsupportedPattern, match="super_attention cannot decode with a cache"):
        module.new_cache()
    with pytest.raises(ConfigError, match="heads must divide the width 32 .* got heads=3"):
        built(heads=3)
    with pytest.raises(ConfigError, match="value_dim must be 8, the width of a slice of the inputs"):
        built("optimised_attention", value_dim=5)
    with pytest.raises(ConfigError, match="head_dim must be 8, the width of a slice of the inputs"):
        built("efficient_attention", head_dim=16)
    with pytest.raises(UnknownName, match="did you mean 'identity'"):
        built(start="identify")
