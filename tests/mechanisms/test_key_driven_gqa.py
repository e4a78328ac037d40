"""What the paper of key-driven grouped-query attention says must hold, paper 154."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.attend.perturbed import PerturbedWeights
from polyhead.attend.tile import Tile
from polyhead.errors import ConfigError, UnknownName
from polyhead.mechanisms.key_driven_gqa import allocation, key_driven

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(0), **F64)
FORMS = ("key", "diff", "ema")


def built(name: str = "key_driven_gqa", **config: object) -> Any:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 48, "heads": 6, **config}, **F64)


def plain_state(module: Any) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if k.startswith(("projection", "output"))}


def test_runs_have_all_heads_and_none_below_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads in (1, 2, 6, 16):
        for groups in (1, 2, 3, 8):
            for _ in range(30):
                found = allocation(torch.rand(groups, generator=generator) ** 4, heads)
                assert int(found.sum()) == heads
                assert int(found.min()) >= 0


def test_shares_are_rounded_and_mended_at_the_ends() -> None:
    assert allocation(torch.tensor([0.0, 0.5, 1.0]), 6).tolist() == [0, 2, 4]
    assert allocation(torch.tensor([1.0, 1.0, 1.0, 1.0]), 6).tolist() == [1, 1, 2, 2]  # 1.5 is rounded to 2
    assert allocation(torch.tensor([1.0, 1.0, 1.0]), 4).tolist() == [2, 1, 1]
    for equal in (torch.zeros(3), torch.full((3,), float("nan")), torch.full((3,), float("inf"))):
        assert allocation(equal, 6).tolist() == [2, 2, 2]


@pytest.mark.parametrize("form", FORMS)
def test_equal_norms_are_grouped_query_attention(form: str) -> None:
    module, grouped = built(kv_heads=3, form=form).train(), built("grouped_query", kv_heads=3)
    grouped.load_state_dict(plain_state(module))
    assert torch.equal(module.eval()(X, mask=ph.causal()), grouped(X, mask=ph.causal()))  # as it starts
    with torch.no_grad():
        heads = module.projection.key.weight.view(3, 8, 48)
        heads[1:] = heads[0]
    grouped.load_state_dict(plain_state(module))
    close(module.train()(X, mask=ph.causal()), grouped(X, mask=ph.causal()))
    assert module.allocation == (2, 2, 2)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_attention_over_gathered_keys_and_values(form: str) -> None:
    module, plain = built(kv_heads=3, form=form, position=ph.nn.rope()), built("mha", position=ph.nn.rope())
    with torch.no_grad():
        module.projection.key.weight.view(3, -1)[1] *= 3
        module.projection.key.weight.view(3, -1)[0] *= 2
    found = module.train()(X, mask=ph.causal())
    norms = (module.projection.key(X).unflatten(-1, (3, 8)).square().sum((1, 3)).sqrt()).sum(0)
    shares = (norms - norms.min()) / (norms.max() - norms.min()) if form == "key" else norms
    assert module.allocation == tuple(allocation(shares, 6).tolist())
    assert module.allocation != (2, 2, 2)
    state, pick = (
        plain_state(module),
        torch.repeat_interleave(torch.arange(3), torch.tensor(module.allocation)),
    )
    for part in ("key", "value"):
        name = f"projection.{part}.weight"
        state[name] = state[name].view(3, 8, 48)[pick].flatten(0, 1)
    plain.load_state_dict(state)
    close(found, plain(X, mask=ph.causal()))
    close(module.eval()(X, mask=ph.causal()), found)


def test_as_many_groups_as_heads_and_one_group() -> None:
    for groups, name in ((6, "mha"), (1, "multi_query")):
        module, plain = built(kv_heads=groups).eval(), built(name)
        plain.load_state_dict(plain_state(module))
        close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))
    one = built(kv_heads=1).train()
    assert one(X).isfinite().all()
    assert one.allocation == (6,)


@pytest.mark.parametrize("form", ["key", "ema"])
def test_a_larger_key_head_never_loses_heads_to_rounding_alone(form: str) -> None:
    for groups in (2, 3):
        module = built(kv_heads=groups, form=form).train()
        held = []
        for _ in range(25):
            module.norms.zero_()
            module(X)
            held.append(module.allocation[0])
            with torch.no_grad():
                module.projection.key.weight[:8] *= 1.15
        assert held == sorted(held)
        assert held[-1] > held[0]


def test_what_norms_were_is_remembered() -> None:
    module = built(kv_heads=3, form="diff").train()
    module(X)
    first = module.norms.clone()
    module(2 * X)
    torch.testing.assert_close(module.norms, 2 * first)
    assert module.allocation == tuple(allocation(first, 6).tolist())  # |2n - n|
    ema = built(kv_heads=3, form="ema").train()
    ema(X)
    ema.norms.copy_(torch.tensor([1e6, 0.0, 0.0]))
    ema(X)
    assert ema.allocation[0] == 6


def test_runs_are_made_in_every_window_th_call_and_frozen_in_evaluation() -> None:
    module = built(kv_heads=3, window=3).train()
    module.allocate((6, 0, 0))
    module(X)
    made = module.allocation
    assert made != (6, 0, 0)
    module.allocate((6, 0, 0))
    for _ in range(2):
        module(X)
        assert module.allocation == (6, 0, 0)
    module(X)
    assert module.allocation == made
    module.allocate((0, 1, 5))
    module.eval()(X)
    assert module.allocation == (0, 1, 5)
    again = built(kv_heads=3)
    again.load_state_dict(module.state_dict())
    assert again.allocation == (0, 1, 5)
    loose = built(kv_heads=3, freeze=False).eval()
    loose(X)
    assert loose.allocation == made


@pytest.mark.parametrize("counts", [(0, 1, 5), (3, 3, 0)])
def test_frozen_runs_decode_and_look_at_one_item_at_a_time(counts: tuple[int, ...]) -> None:
    module = built(kv_heads=3).eval()
    module.allocate(counts)
    with torch.no_grad():
        full, cache = module(X, mask=ph.causal()), module.new_cache(2)
        parts = [module(x, mask=ph.causal(), cache=cache) for x in X.split([4, 1, 6], dim=1)]
        close(torch.cat(parts, dim=1), full)
        close(module(X[:1], mask=ph.causal()), full[:1])
    assert module.cost(11) == built("grouped_query", kv_heads=3).cost(11)


def test_a_trained_module_is_pooled() -> None:
    plain = built("mha", bias=True).eval()
    with torch.no_grad():
        plain.projection.key.bias.normal_()
    same = key_driven(plain, 6)
    close(same(X), plain(X))
    pooled = key_driven(plain, 3, form="ema", window=2)
    assert (pooled.config.form, pooled.config.window, pooled.config.kv_heads) == ("ema", 2, 3)
    heads = plain.projection.key.weight.view(3, 2, 8, 48)
    close(pooled.projection.key.weight.view(3, 8, 48), (heads[:, 0] + heads[:, 1]) / 2)
    assert torch.equal(pooled.projection.query.weight, plain.projection.query.weight)


def test_training_gives_gradients_under_the_compiler_too() -> None:
    module, other = built(kv_heads=3).train(), built(kv_heads=3).train()
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for run in (module, compiled):
        run(X, mask=ph.causal()).square().sum().backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        close(p.grad, q.grad)
    assert module.allocation == other.allocation
    torch._dynamo.reset()


@pytest.mark.parametrize("form", [*FORMS, "perturbed"])
def test_every_form_keeps_the_contract(form: str) -> None:
    assert broken_rules("key_driven_gqa", compiled=form == "key", kv_heads=2, form=form) == {}


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="kv_heads must divide heads=6; got kv_heads=4"):
        built(kv_heads=4)
    with pytest.raises(UnknownName, match="did you mean 'diff'"):
        built(form="dif")
    with pytest.raises(ConfigError, match="window must be an integer, at least 1"):
        built(window=0)
    with pytest.raises(ConfigError, match="freeze must be True or False"):
        built(freeze=1)
    for counts in ((1, 2), (1, 2, 2), (-1, 3, 4), 6):
        with pytest.raises(
            ConfigError, match="counts must be 3 integers, none negative, that sum to heads=6"
        ):
            built(kv_heads=3).allocate(counts)
    with pytest.raises(ConfigError, match="attention must be mha, built by name"):
        key_driven(built("grouped_query", kv_heads=3), 1)


def perturbed(group: int = 2, strength: float = 0.5, seed: int = 3) -> PerturbedWeights:
    return PerturbedWeights(group, strength, torch.tensor(seed))


def test_noise_is_in_training_only_and_for_heads_that_share_a_key() -> None:
    module, plain = built(kv_heads=3, form="perturbed"), built("grouped_query", kv_heads=3)
    module.load_state_dict(module.state_dict() | plain_state(plain))
    close(module.eval()(X, mask=ph.causal()), plain.eval()(X, mask=ph.causal()))
    first, second = (module.train()(X, mask=ph.causal()) for _ in range(2))
    assert (first - second).abs().max() > 1e-6
    torch.manual_seed(1)
    once = module(X)
    torch.manual_seed(1)
    assert torch.equal(module(X), once)
    assert module.allocation == (2, 2, 2)
    alone = built(kv_heads=6, form="perturbed").train()
    close(alone(X), alone.eval()(X))
    silent = built(kv_heads=3, form="perturbed", noise=0).train()
    close(silent(X), silent.eval()(X))


def test_the_noise_spares_the_diagonal_and_what_is_hidden_and_follows_the_likeness() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 9, 8, **F64), torch.randn(1, 2, 9, 8, **F64)
    q[:, 1] = q[:, 0]  # alike; the others are not
    weights = ph.attend(q, k, torch.eye(9, **F64).expand(1, 2, 9, 9), mask=ph.causal())
    noisy = ph.attend(q, k, torch.eye(9, **F64).expand(1, 2, 9, 9), mask=ph.causal(), weight_map=perturbed())
    apart = weights - noisy
    hidden = torch.ones(9, 9, dtype=torch.bool).triu()  # the diagonal is spared too
    assert (apart[..., hidden] == 0).all()
    assert (apart[..., ~hidden] != 0).all()
    likeness = perturbed().likeness(weights)
    close(likeness[:, :2], torch.ones_like(likeness[:, :2]))
    cosine = torch.nn.functional.cosine_similarity(weights[:, 2], weights[:, 3], dim=-1)
    close(likeness[:, 2:], cosine[:, None].expand(-1, 2, -1))
    counts = torch.arange(1, 10, **F64)[:, None]
    z = apart * counts / (0.5 * likeness[..., None])
    assert (z[:, 0] - z[:, 1])[..., ~hidden].abs().min() > 1e-6  # every head has noise of its own


def test_the_noise_is_standard_normal_and_the_same_whatever_the_tiles() -> None:
    rows, cols = torch.arange(64), torch.arange(80)
    whole = perturbed().noise(Tile(2, 3, rows, cols))
    part = Tile(1, 2, rows[8:24], cols[::2], batch_start=1, head_start=1, total_heads=3)
    assert torch.equal(perturbed().noise(part), whole[1:, 1:, 8:24, ::2])
    assert abs(whole.mean()) < 0.03
    assert abs(whole.std() - 1) < 0.03
    for other in (whole.roll(1, -1), whole.roll(1, -2), whole.roll(1, 1), perturbed(seed=4).noise(part)):
        pair = whole if other.shape == whole.shape else whole[1:, 1:, 8:24, ::2]
        assert abs((pair * other).mean()) < 0.05
    assert abs((whole.square() * whole.roll(1, -1).square()).mean() - 1) < 0.1


def test_padding_does_not_decide_who_reads_what() -> None:
    module, other = (built(kv_heads=3, bias=True).train() for _ in range(2))
    with torch.no_grad():
        for one in (module, other):
            one.projection.key.bias[:8] = 30.0  # the norm of a key of zeros
    padded = torch.cat([X[:1], torch.full((1, 40, 48), torch.nan, **F64)], dim=1)
    real = torch.arange(51)[None] < 11
    close(module(padded, padding=real)[:, :11], other(X[:1]))
    close(module.norms, other.norms)
