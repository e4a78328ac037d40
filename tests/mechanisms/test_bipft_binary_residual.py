"""What must hold of binary attention with estimates of its residuals."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify
from polyhead.attend.rounding import BinaryWeights
from polyhead.attend.signs import signs_of
from polyhead.errors import ConfigError
from polyhead.nn.binary_projection import BinaryLinear
from polyhead.nn.binary_residual import BinaryResidualAttention
from polyhead.nn.kv_cache import BareSigns
from polyhead.nn.straight_through import elastic_signs, slowed, weight_signs
from polyhead.nn.visible_mean import visible_count

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(**config: object) -> BinaryResidualAttention:
    torch.manual_seed(0)
    return ph.build("bipft_binary_residual", **{"dim": 32, "heads": 4, **config}, **F64).eval()


def stirred(module: BinaryResidualAttention) -> BinaryResidualAttention:
    """Estimates that do something."""
    with torch.no_grad():
        for p in module.key_estimates.parameters():
            p.normal_()
    return module


def plain_of(module: BinaryResidualAttention) -> torch.nn.Module:
    plain = ph.build("mha", dim=32, heads=4, **F64)
    plain.load_state_dict({n: module.state_dict()[n] for n in plain.state_dict()})
    return plain


@pytest.mark.parametrize(
    "options",
    [{"kv_heads": 2}, {"linear_bits": 32}, {"kv_heads": 1, "head_dim": 12, "value_dim": 5}],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, object]) -> None:
    assert broken_rules("bipft_binary_residual", **options) == {}


def test_estimates_without_bits_keep_the_contract() -> None:
    options = {"bits": 32, "linear_bits": 32}
    lacking = "equals_twin equals_twin_masked gradients"  # of which the twin knows nothing
    assert broken_rules("bipft_binary_residual", without=lacking, **options) == {}


def test_thirty_two_bits_without_estimates_are_plain_attention() -> None:
    module = built(bits=32, linear_bits=32)
    for mask in (None, ph.causal(), ph.window(3, 2)):
        torch.testing.assert_close(module(X, mask=mask), plain_of(module)(X, mask=mask))
    assert not torch.allclose(stirred(module)(X), plain_of(module)(X))


def test_without_estimates_it_is_plain_binary_attention() -> None:
    module = built(linear_bits=32)
    with torch.no_grad():
        q, k, v = (
            1.6 * torch.where(t >= 0, 1.0, -1.0).double()
            for t in (module.projection.queries(X), *module.projection.keys_values(X))
        )
        for step in (module.query_step, module.key_step, module.value_step):
            step.fill_(1.6)
        a = (q @ k.mT / 8**0.5).softmax(-1)
        want = (4 / 11) * (a > 2 / 11).double() @ v
        torch.testing.assert_close(module(X), module.output(want))
    assert not torch.allclose(stirred(module)(X), module.output(want))


def test_estimates_are_three_outer_products_and_a_value() -> None:
    module = stirred(built(bits=32, linear_bits=32))
    with torch.no_grad():
        q, (k, v) = module.projection.queries(X), module.projection.keys_values(X)
        qm, qp = module.query_estimates(X).split(1, -1)
        kp, km, vp = module.key_estimates(X).split(1, -1)
        e = qm @ kp.mT + qp @ km.mT + qp @ kp.mT
        assert torch.linalg.matrix_rank(e).tolist() == [2, 2]
        a = ((q @ k.mT + e[:, None]) / 8**0.5).softmax(-1)
        torch.testing.assert_close(module(X), module.output(a @ v + (a @ vp[:, None])))


def test_the_polynomial_of_residuals_is_exact() -> None:
    module = built(linear_bits=32)
    q, (k, _) = module.projection.queries(X), module.projection.keys_values(X)
    qb, kb = module._queries(X, 0)[..., :-2], module._rows(X, 0)[0] * module.key_step
    rq, rk = q - qb, k - kb
    torch.testing.assert_close(qb @ kb.mT + qb @ rk.mT + rq @ kb.mT + rq @ rk.mT, q @ k.mT)
    ratios = (qb @ kb.mT / (module.query_step * module.key_step)).round(decimals=9)
    assert set(ratios.unique().tolist()) <= set(range(-8, 9, 2))
    assert torch.equal(ratios, (signs_of(q).double() @ signs_of(k).double().mT))


def test_signs_have_the_gradients_of_elastic_steps() -> None:
    x = torch.tensor([-3.0, -2.0, -0.5, 0.0, 0.7, 2.5], **F64, requires_grad=True)
    step = torch.tensor(2.0, **F64, requires_grad=True)
    g = torch.arange(1.0, 7.0, **F64)
    found = elastic_signs(x, step) * slowed(step, x.numel())
    assert found.tolist() == [-2, -2, -2, 2, 2, 2]
    of_x, of_step = torch.autograd.grad((g * found).sum(), (x, step))
    assert of_x.tolist() == [0, 2, 3, 4, 5, 0]
    torch.testing.assert_close(of_step, (g * torch.tensor([-1.0, -1, -1, 1, 1, 1])).sum() / 6**0.5)


def test_weights_have_the_gradients_of_elastic_steps() -> None:
    class Tile:
        batch_slice = head_slice = row_slice = slice(0, 1)

    w = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7], **F64).view(1, 1, 1, 5).requires_grad_()
    step = torch.full((1, 1, 1, 1), 0.5, **F64, requires_grad=True)
    found = step * BinaryWeights(step).apply(w, Tile())
    assert found.flatten().tolist() == [0, 0, 0.5, 0.5, 0.5]
    of_w, of_step = torch.autograd.grad(found.sum(), (w, step))
    assert of_w.flatten().tolist() == [1, 1, 1, 1, 0]
    torch.testing.assert_close(of_step.item(), (0 - 0) + (0 - 0.2) + (1 - 0.6) + (1 - 1) + 1)


@pytest.mark.parametrize("seed", range(6))
def test_ties_are_decided_alike_in_decoding_and_in_one_call(seed: int) -> None:
    torch.manual_seed(seed)
    module = ph.build("bipft_binary_residual", dim=32, heads=4).eval()
    x = torch.randn(2, 16, 32)  # of two keys with equal scores, each weight is half a step
    cache = module.new_cache(2)
    with torch.no_grad():
        steps = [module(x[:, i : i + 1], mask=ph.causal(), cache=cache) for i in range(16)]
        torch.testing.assert_close(torch.cat(steps, 1), module(x, mask=ph.causal()), atol=1e-4, rtol=1e-4)


def test_linear_maps_of_signs() -> None:
    torch.manual_seed(0)
    layer, x = BinaryLinear(6, 3, dtype=torch.float64), X[..., :6]
    w = layer.weight
    binary = torch.where(w >= w.mean(), 1.0, -1.0).double() * w.abs().mean()
    torch.testing.assert_close(layer(x), layer.step * torch.where(x >= 0, 1.0, -1.0).double() @ binary.T)
    signs, size = weight_signs(w)
    (flow,) = torch.autograd.grad(((signs * size) * torch.arange(18.0, **F64).view(3, 6)).sum(), w)
    torch.testing.assert_close(flow, torch.arange(18.0, **F64).view(3, 6))


@pytest.mark.parametrize("mask", [None, ph.causal(), ph.window(2, 1), ph.causal() & ph.sink(2)], ids=str)
@pytest.mark.parametrize("queries", [1, 6, 9])
def test_visible_keys_are_counted(mask: object, queries: int) -> None:
    real = torch.arange(6) < torch.tensor([[6], [4]])
    for padded in (False, True):
        whole = mask
        if padded:
            known = ph.padding(real)
            whole = known if mask is None else mask & known
        found = visible_count(torch.zeros(2, 3, 0, 1), queries, 6, whole)
        want = torch.ones(2, 1, queries, 6, dtype=torch.bool)
        if whole is not None:
            want = densify(whole, batch=2, heads=1, queries=queries, keys=6)
        want = want.sum(-1, keepdim=True).expand(2, 3, queries, 1)
        assert torch.equal(found.expand(2, 3, queries, 1), want.float())


def test_the_cache_holds_bits() -> None:
    module = built(kv_heads=2)
    cache = module.new_cache(2, max_length=11, dtype=torch.float64)
    with torch.no_grad():
        module(X, mask=ph.causal(), cache=cache)
    assert cache.nbytes() == 2 * 11 * (2 * (1 + 1) + 3 * 8)  # items, tokens, signs of heads, three numbers
    half = ph.build("bipft_binary_residual", dim=512, heads=8).cost(1, dtype=torch.float16)
    assert half.kv_bytes_per_token == 8 * 2 * 64 // 8 + 3 * 2
    rows = torch.where(X >= 0, 1.0, -1.0)
    assert torch.equal(BareSigns().unpack(BareSigns().pack(rows), 32, torch.float32), rows.float())


def test_estimates_take_five_numbers_a_channel() -> None:
    with_them, without = built(), built(bits=32)
    estimates = sum(p.numel() for n, p in with_them.named_parameters() if "estimates" in n)
    assert estimates == 5 * (32 + 1)
    assert sum(p.numel() for p in with_them.parameters()) - sum(p.numel() for p in without.parameters()) == 4


def test_what_is_not_allowed() -> None:
    for options, message in (
        ({"bits": 2}, "bits must be 1 or 32; got 2"),
        ({"linear_bits": True}, "linear_bits must be 1 or 32; got True"),
        ({"kv_heads": 3}, "allowed are 1, 2, 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(**options)
