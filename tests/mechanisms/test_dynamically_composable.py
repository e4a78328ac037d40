"""What must hold of dynamically composable heads, paper 130."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "dynamically_composable", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def stirred(**config: object) -> nn.Module:
    """With mixes that do something."""
    module = built(**config)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "mixes" in name or name == "base":
                p.add_(0.3 * torch.randn_like(p))
    return module


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if "mixes" not in k and k != "base"}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_starts_as_grouped_query_attention(kv_heads: int) -> None:
    composable, plain = built(kv_heads=kv_heads), built("grouped_query", kv_heads=kv_heads)
    plain.load_state_dict(plain_state(composable))
    close(composable(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_at_the_start_gradients_reach_what_turns_the_mixes_on() -> None:
    module = built()
    module(X, mask=ph.causal()).sin().sum().backward()
    for mixes in (module.query_mixes, module.key_mixes):
        for stage in range(2):
            assert mixes.write.grad[stage].abs().max() > 0
            assert mixes.gate.grad.chunk(2)[stage].abs().max() > 0
    assert all(grad.abs().max() > 0 for grad in module.base.grad)


@pytest.mark.parametrize("mask", [None, ph.causal()], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"rank": 1, "hidden": 5}, {"kv_heads": 1, "rank": 3}, {"static": False}], ids=str
)
def test_low_ranks_equal_a_matrix_for_every_pair(options: dict[str, object], mask: ph.Mask | None) -> None:
    module = stirred(**options)
    dense = None if mask is None else torch.ones(11, 11, dtype=torch.bool).tril()
    want = ph.reference("dynamically_composable")(
        X, parameters=module.state_dict(), heads=4, kv_heads=module.config.kv_heads, mask=dense
    )
    close(module(X, mask=mask), want)


def test_the_base_alone_is_talking_heads() -> None:
    module, talking = built(), built("talking_heads")
    with torch.no_grad():
        module.base.normal_()
    mixing = {
        f"{name}_mixing.weight": torch.eye(4) + module.base[n] for n, name in ((0, "logit"), (1, "weight"))
    }
    talking.load_state_dict(plain_state(module) | mixing)
    close(module(X, mask=ph.causal()), talking(X, mask=ph.causal()))


def test_a_key_chooses_by_its_own_token_alone() -> None:
    module, changed = stirred(), X.clone()
    changed[:, 7] += 1.0
    moved = (module(changed, mask=ph.causal()) - module(X, mask=ph.causal())).abs().amax((0, 2))
    assert moved[:7].max() == 0
    assert moved[7:].min() > 1e-6


@pytest.mark.parametrize("stage", [0, 1])
def test_rows_of_composed_logits_sum_to_one_and_of_composed_weights_do_not(stage: int) -> None:
    module = stirred()
    with torch.no_grad():
        module.base[1 - stage].zero_()
        for mixes in (module.query_mixes, module.key_mixes):
            mixes.write[1 - stage].zero_()
            mixes.gate.view(2, 4, 32)[1 - stage].zero_()
        # every value is one: the outputs of the heads are sums of weights
        module.projection.value.weight.zero_()
        module.projection.value.bias = nn.Parameter(torch.ones(32, **F64))
    heads: list[Tensor] = []
    module.output.register_forward_pre_hook(lambda m, inputs: heads.append(inputs[0]))
    module(X)
    assert torch.allclose(heads[0], torch.ones_like(heads[0])) is (stage == 0)


def test_biases_of_the_logits_are_composed_with_them() -> None:
    module, without = stirred(score=ph.alibi(4)), built()
    without.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("score")})
    assert (module(X) - without(X)).abs().max() > 1e-3
    with torch.no_grad():  # nothing is left of the logits, nor of their biases
        for mixes in (module.query_mixes, module.key_mixes):
            mixes.write.zero_()
            mixes.gate.zero_()
        module.base[0] = -torch.eye(4)
        module.base[1] = 0
    plain = built("mha", score=ph.soft_cap(1e-14))
    plain.load_state_dict(plain_state(module), strict=False)
    close(module(X), plain(X))


def test_queries_alone_need_no_more_cache() -> None:
    plain, whole, queries = (
        built(n, **o).cost(64)
        for n, o in (
            ("mha", {}),
            ("dynamically_composable", {}),
            ("dynamically_composable", {"key_wise": False}),
        )
    )
    assert queries.kv_bytes_per_token == plain.kv_bytes_per_token
    assert whole.kv_bytes_per_token == plain.kv_bytes_per_token + 8 * 4 * (4 * 2 + 2)
    one_side = 2 * (32 * 16 + 2 * 16 * 2 * 4 + 32 * 4)
    assert queries.parameters == plain.parameters + one_side + 2 * 16
    assert whole.parameters == queries.parameters + one_side


def test_the_leanest_variant_keeps_the_contract() -> None:
    options = {"key_wise": False, "static": False, "rank": 1, "kv_heads": 2}
    assert broken_rules("dynamically_composable", **options) == {}


def test_a_window_of_cached_tokens_with_positions() -> None:
    module = stirred(position=ph.nn.rope(), score=ph.alibi(4)).eval()
    mask = ph.causal() & (ph.window(4) | ph.sink(2))
    with torch.no_grad():
        full = module(X, mask=mask)
        cache = module.new_cache(2, window=5, sinks=2)
        close(torch.cat([module(x, mask=mask, cache=cache) for x in X.split(1, dim=1)], dim=1), full)


def test_a_token_may_turn_over_what_its_heads_read() -> None:
    """The target is the mean of what the keys hold, with a sign that the query's token says.

    Rows of weights that sum to one, or to a number of their head, cannot give both signs.
    """

    def loss_of(name: str) -> float:
        torch.manual_seed(0)
        module = ph.build(name, dim=8, heads=2)
        optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
        losses = []
        for _ in range(120):
            x = torch.randn(16, 8, 8)
            sign = torch.sign(torch.randn(16, 8, 1))
            x[..., :1] = sign
            held = torch.cat([torch.zeros(16, 1, 1), x.mean(1, keepdim=True)[..., 1:]], dim=-1)
            loss = ((module(x) - 3 * sign * held)[..., 1:] ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-20:]) / 20

    found = {name: loss_of(name) for name in ("mha", "talking_heads", "dynamically_composable")}
    assert found["dynamically_composable"] < 0.3 * min(found["mha"], found["talking_heads"]), found


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="rank must be an integer, at least 1; got 0"):
        built(rank=0)
    with pytest.raises(ConfigError, match="key_wise must be True or False; got 1"):
        built(key_wise=1)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=3"):
        built(kv_heads=3)
