"""What the paper of head embeddings says must hold, paper 041."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
PARTS = ("query", "key", "value")


def built(name: str = "mhe", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    module = ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if "embedding" in key:
                p.normal_(std=0.5)
    return module


def as_multi_head(module: nn.Module, **config: object) -> nn.Module:
    """Multi-head attention with the heads written out: scaled weights, or equal ones and biases."""
    adds = module.projection.mode == "add"
    plain = built("mha", bias=adds, **config)
    state = {"output.weight": module.output.weight}
    if adds:
        state["output.bias"] = torch.zeros(32, **F64)
    for part in PARTS:
        shared = getattr(module.projection, part).weight
        embedding = getattr(module.projection, f"{part}_embedding")
        factor = torch.ones_like(embedding) if adds else 1 + embedding
        state[f"projection.{part}.weight"] = (factor[:, :, None] * shared).flatten(0, 1)
        if adds:
            state[f"projection.{part}.bias"] = embedding.flatten()
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("mode", ["mul", "add"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"position": ph.nn.rope()},
        {"position": ph.nn.alibi_position()},
        {"normalizer": ph.softmax(sink=0.3)},
        {"normalizer": ph.sigmoid()},
        {"score": ph.soft_cap(1.0), "value_dim": 5},
    ],
    ids=["plain", "rope", "alibi", "sink", "sigmoid", "soft_cap"],
)
def test_it_is_multi_head_attention_with_the_heads_written_out(mode: str, config: dict) -> None:
    module = built(mode=mode, **config)
    plain = as_multi_head(module, **config)
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))
    cache = module.new_cache(2)
    steps = [module(x, mask=ph.causal(), cache=cache) for x in X.split([7, 1, 1, 2], dim=1)]
    close(torch.cat(steps, dim=1), plain(X, mask=ph.causal()))


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_without_embeddings_all_heads_are_one(mode: str) -> None:
    module, shared = built(mode=mode), built("multi_query")
    with torch.no_grad():
        for part in PARTS:
            getattr(module.projection, f"{part}_embedding").zero_()
    state = {k: v for k, v in module.state_dict().items() if "embedding" not in k}
    state["projection.query.weight"] = state["projection.query.weight"].repeat(4, 1)
    shared.load_state_dict(state)
    close(module(X), shared(X))
    heads = []
    module.output.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    module(X)
    close(heads[0], heads[0][:, :1].expand_as(heads[0]))


def test_additive_key_embeddings_change_nothing_and_value_embeddings_add_a_constant() -> None:
    module = built(mode="add")
    before = module(X, mask=ph.causal())
    before.sin().sum().backward()
    assert module.projection.key_embedding.grad.abs().max() < 1e-12
    with torch.no_grad():
        module.projection.key_embedding.add_(1.0)
        close(module(X, mask=ph.causal()), before)
        module.projection.value_embedding.add_(torch.randn(4, 8, **F64))
        moved = module(X, mask=ph.causal()) - before
    close(moved, moved[:1, :1].expand_as(moved))
    assert moved.abs().max() > 0.1


def test_additive_key_embeddings_matter_with_rotary_positions() -> None:
    module = built(mode="add", position=ph.nn.rope())
    module(X).sin().sum().backward()
    assert module.projection.key_embedding.grad.abs().max() > 1e-3


def test_a_query_embedding_of_minus_one_attends_uniformly() -> None:
    module = built()
    with torch.no_grad():
        module.projection.query_embedding[2] = -1.0
    heads = []
    module.output.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
    module(X)
    v = module.projection.value(X) * (1 + module.projection.value_embedding[2])
    close(heads[0][:, 2], v.mean(1, keepdim=True).expand_as(v))


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_parameters_and_cache(mode: str) -> None:
    module, plain = built(mode=mode), built("mha")
    one = 3 * 32 * 8 + 32 * 32
    cost = module.cost(11, batch=2)
    assert cost.parameters == one + 3 * 4 * 8
    # the paper's difference to multi-head attention, (3n² - 3n) D² - 3nD
    assert plain.cost(1).parameters - cost.parameters == (3 * 16 - 3 * 4) * 64 - 3 * 4 * 8
    cache = module.new_cache(2, max_length=11)
    module(X, mask=ph.causal(), cache=cache)
    assert cache.nbytes() == cost.cache_bytes == 2 * 11 * 8 * (2 * 8 + 2 * (mode == "add"))
    turned = built(mode=mode, position=ph.nn.rope())
    assert turned.cost(1).kv_bytes_per_token == 8 * (4 * 8 + 8 + (mode == "add"))


@pytest.mark.parametrize(
    "config", [{"mode": "add"}, {"mode": "add", "bias": True, "qk_norm": True, "value_dim": 5}]
)
def test_the_additive_form_keeps_the_contract(config: dict) -> None:
    assert broken_rules("head_embedding_attention", **config) == {}


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_with_rotary_positions_it_keeps_the_contract(mode: str) -> None:
    # that its numbers are right is tested above
    rules = "equals_twin equals_twin_masked"
    config = {"mode": mode, "position": ph.nn.rope()}
    assert broken_rules("head_embedding_attention", compiled=True, without=rules, **config) == {}


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="known: add, mul"):
        built(mode="both")
    with pytest.raises(ConfigError, match="position must be a Position; got 'rope'"):
        built(position="rope")
