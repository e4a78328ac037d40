"""What the paper of the dual-stream transformer says must hold, paper 026."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName
from polyhead.heads import amplified
from polyhead.mechanisms.dual_stream import dual_streams
from polyhead.nn.channel_maps import ChannelNorm, IndependentMap, KroneckerMap

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()
INDEPENDENT = dict.fromkeys(("query_map", "key_map", "value_map", "output_map"), "independent")
DENSE = dict.fromkeys(("query_map", "key_map", "value_map", "output_map"), "dense")


def built(name: str = "dual_stream", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def streams(layers: int = 2, **config: object) -> nn.Module:
    torch.manual_seed(0)
    return dual_streams(layers, **{"dim": 32, "heads": 4, "mlp": 48, **config}, **F64).eval()


@pytest.mark.parametrize(
    "options",
    [
        INDEPENDENT,
        {"query_map": "kronecker", "key_map": "independent", "output_map": "dense", "kv_heads": 2},
    ],
)
def test_other_options_keep_the_contract(options: dict) -> None:
    assert not broken_rules("dual_stream", **options)


def test_a_kronecker_map_is_the_written_out_product() -> None:
    part = KroneckerMap(8, 32, 16, bias=True, **F64)
    nn.init.normal_(part.bias)
    close(part(X), F.linear(X, torch.kron(part.weight, torch.eye(8, **F64)), part.bias))
    assert torch.allclose(part.weight, torch.eye(4, **F64)[[0, 2]], atol=0.2)


def test_with_the_identity_heads_pass_through() -> None:
    module = built()
    for part in (module.projection.value, module.output.map):
        nn.init.eye_(part.weight)
    q = module.projection.queries(X)
    k, v = module.projection.keys_values(X)
    close(v, X.unflatten(-1, (4, 8)).transpose(1, 2))
    close(module(X, mask=CAUSAL), ph.attend(q, k, v, mask=CAUSAL).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("channel", range(4))
def test_an_independent_map_keeps_channels_apart(channel: int) -> None:
    part = IndependentMap(4, 32, 16, **F64)
    changed = X.clone()
    changed[..., channel * 8 : channel * 8 + 8] += 1.0
    moved = (part(changed) - part(X)).abs().amax((0, 1)).view(4, 4).amax(-1) > 1e-9
    assert moved.tolist() == [m == channel for m in range(4)]
    assert part.weight.numel() == 32 * 16 // 4


def test_with_sums_one_channel_and_dense_maps_it_is_the_ordinary_transformer() -> None:
    module = streams(values="sum", channels=1, **DENSE)
    stack = ph.build_stack(
        ["mha", "mha"], dim=32, heads=4, mlp=48, norm="layer", final_norm=True, dtype=torch.float64
    )
    for block, layer in zip(module.blocks, stack.layers, strict=True):
        state = {
            name.replace("output.map.", "output."): t for name, t in block.attention.state_dict().items()
        }
        layer.attention.load_state_dict(state)
        for name in ("norm", "mlp_norm", "mlp"):
            getattr(layer, name).load_state_dict(getattr(block, name).state_dict())
    close(module(X, mask=CAUSAL), stack(X, mask=CAUSAL))
    assert module.cost(11) == stack.cost(11)


def test_each_stream_has_one_writer() -> None:
    module = streams(1)
    token, context = module.streams(X, mask=CAUSAL)
    block = module.blocks[0]
    with torch.no_grad():
        block.mlp.down.weight.mul_(2.0)
        after = module.streams(X, mask=CAUSAL)
        close(after[0], token)
        assert (after[1] - context).abs().max() > 1e-3
    normed, own = block.norm(X), block.value_norm(X)
    close(token, X + block.attention(torch.cat([normed, own], -1), mask=CAUSAL))


def test_values_come_of_the_token_stream_alone() -> None:
    module = streams(1)
    attention, u = module.blocks[0].attention, torch.randn(2, 11, 32, **F64)
    k, v = attention.projection.keys_values(torch.cat([u, X], -1))
    other_k, other_v = attention.projection.keys_values(torch.cat([X, X], -1))
    close(v, other_v)
    assert (k - other_k).abs().max() > 0.1


def test_a_frozen_token_stream_stays_the_input() -> None:
    module = streams(frozen=True)
    token, context = module.streams(X, mask=CAUSAL)
    assert torch.equal(token, X)
    assert (context - streams().streams(X, mask=CAUSAL)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("values", ["token", "sum"])
def test_decoding_equals_the_full_call(values: str) -> None:
    module = streams(values=values, position=ph.nn.rope())
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :3] = False
    with torch.no_grad():
        full = module(X, mask=CAUSAL, padding=real)
        cache, parts = module.new_cache(2), []
        for x, own in zip(X.split([5, 1, 5], dim=1), real.split([5, 1, 5], dim=1), strict=True):
            parts.append(module(x, mask=CAUSAL, padding=own, cache=cache))
    close(torch.cat(parts, 1)[real], full[real])


def test_streams_can_be_ablated_where_they_are_read() -> None:
    module = streams()
    token, context = module.streams(X, mask=CAUSAL)
    whole = module(X, mask=CAUSAL)
    with module.sharing(token=0.0):
        close(module(X, mask=CAUSAL), module.norm(context))
    with module.sharing(context=0.0, everywhere=True):
        inner = module.streams(X, mask=CAUSAL)
        close(module(X, mask=CAUSAL), module.norm(inner[0]))
    assert (inner[0] - token).abs().max() > 1e-3
    close(module(X, mask=CAUSAL), whole)


def test_every_channel_is_normalised_by_itself() -> None:
    y = ChannelNorm(32, 4, eps=0.0, **F64)(3 + 5 * X).unflatten(-1, (4, 8))
    close(y.mean(-1), torch.zeros(2, 11, 4, **F64))
    close(y.var(-1, unbiased=False), torch.ones(2, 11, 4, **F64))


NAMES = [
    entry.name
    for entry in ph.catalog()
    if isinstance(entry.example(), ph.nn.MultiHeadAttention)
    and "causal_self" in entry.supports
    and entry.name != "gaussian_mixture_keys"
]


@pytest.mark.parametrize("name", NAMES)
def test_an_amplification_of_one_changes_nothing_and_another_does(name: str) -> None:
    module = built(name)
    with torch.no_grad():
        plain = module(X, mask=CAUSAL)
        with amplified(module, 1):
            close(module(X, mask=CAUSAL), plain)
        with amplified(module, 8):
            assert (module(X, mask=CAUSAL) - plain).abs().max() > 1e-6
        assert torch.equal(module(X, mask=CAUSAL), plain)


def test_an_amplification_without_end_selects() -> None:
    module = built()
    q, (k, v) = module.projection.queries(X), module.projection.keys_values(X)
    best = (q @ k.mT).argmax(-1)
    with torch.no_grad(), amplified(module, 1e6):
        close(module(X), module.output(v.gather(2, best[..., None].expand(-1, -1, -1, 8))))


def test_pretrained_models_are_amplified_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2Model(config).eval().double()
    tokens = torch.randint(0, 50, (1, 9))

    def out() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens).last_hidden_state

    plain = out()
    with amplified(model, 1):
        torch.testing.assert_close(out(), plain, rtol=0, atol=1e-9)
    with amplified(model, 4):
        louder = out()
    with torch.no_grad():
        for layer in model.h:
            layer.attn.c_attn.weight[:, :32] *= 4
            layer.attn.c_attn.bias[:32] *= 4
    torch.testing.assert_close(out(), louder, rtol=0, atol=1e-9)


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(UnknownName, match="no output_map is called 'kroneker'; did you mean 'kronecker'"):
        built(output_map="kroneker")
    with pytest.raises(
        ConfigError, match="value_map='kronecker' needs the width of a head, 12, to divide 32"
    ):
        built(value_dim=12)
    with pytest.raises(ConfigError, match="query_map='independent' needs heads, 3, to divide 32"):
        built(heads=3, head_dim=8, query_map="independent")
    with pytest.raises(ConfigError, match="channels must divide dim=32; got 5"):
        streams(channels=5)
    with pytest.raises(UnknownName, match="no source of values is called 'context'"):
        streams(values="context")
    mixtures = ph.build("gaussian_mixture_keys", dim=8, heads=2)
    with pytest.raises(ConfigError, match="model has keys that are mixtures"), amplified(mixtures, 2):
        pass
    with pytest.raises(ConfigError, match="factor must be a finite number above 0"), amplified(built(), 0):
        pass
