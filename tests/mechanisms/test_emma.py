"""What must hold of monotonic attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, ShapeError, UnsupportedPattern
from polyhead.nn.emma import Alignment, ready
from polyhead.nn.monotonic import lookback, monotonic_alignment
from polyhead.nn.regularizers import attention_diversification

F64 = {"dtype": torch.float64}
G = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, 32, generator=G, **F64)
C = torch.randn(2, 9, 32, generator=G, **F64)


def built(**config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build("emma", **{"dim": 32, "heads": 4, **config}, **F64).eval()


def by_definition(p: torch.Tensor) -> torch.Tensor:
    """The three loops of the recursion."""
    rows, columns = p.shape
    alpha = torch.zeros(rows + 1, columns, **F64)
    alpha[0, 0] = 1
    for i, j in itertools.product(range(rows), range(columns)):
        for k in range(j + 1):
            alpha[i + 1, j] += alpha[i, k] * p[i, j] * (1 - p[i, k:j]).prod()
    return alpha[1:]


def closed_form(p: torch.Tensor) -> torch.Tensor:
    """The paper's: α_i = p_i (α_i-1 T), T upper triangular with products of 1 - p."""
    columns, found = p.shape[1], []
    alpha = (torch.arange(columns) == 0).to(p.dtype)
    for row in p:
        rolled = row.roll(1)
        rolled[0] = 0
        t = (1 - torch.ones(columns, 1, dtype=p.dtype).mul(rolled).triu(1)).cumprod(1).triu()
        alpha = row * (alpha @ t)
        found.append(alpha)
    return torch.stack(found)


def divided(p: torch.Tensor, least: float = 1e-6) -> torch.Tensor:
    """The older form, which divides by a product."""
    alpha, found = (torch.arange(p.shape[1]) == 0).to(p.dtype), []
    for row in p:
        passed = torch.cat([row.new_ones(1), (1 - row[:-1]).clamp(least, 1.0).log().cumsum(0).exp()])
        alpha = row * passed * (alpha / passed.clamp(least, 1.0)).cumsum(0)
        alpha = alpha.clamp(0, 1)
        found.append(alpha)
    return torch.stack(found)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2, "keep_mass": False, "policy_layers": 2, "temperature": 0.5},
        {"policy_bias": 0.0, "bias": True, "qk_norm": True, "value_dim": 5},
    ],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, object]) -> None:
    assert not broken_rules("emma", **options)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (5, 8), (8, 5)])
def test_the_alignment_is_its_definition_for_zeros_and_ones_too(rows: int, columns: int) -> None:
    p = torch.rand(3, 2, rows, columns, generator=G, **F64)
    p[1] = p[1].round()
    p[2, 0, :, ::2] = 1
    found = monotonic_alignment(p)
    for index in itertools.product(range(3), range(2)):
        close(found[index], by_definition(p[index]))
        close(closed_form(p[index]), by_definition(p[index]))
    assert found.min() >= 0
    sums = found.sum(-1)
    assert sums.max() <= 1 + 1e-12
    assert (sums.diff(dim=-1) <= 1e-12).all()


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (4, 2), (1, 3)])
def test_gradients_are_those_of_finite_differences_also_at_zero_and_one(rows: int, columns: int) -> None:
    p = torch.rand(2, rows, columns, generator=G, **F64)
    start = torch.rand(2, columns, generator=G, **F64)
    assert torch.autograd.gradcheck(monotonic_alignment, (p.requires_grad_(), start.requires_grad_()))
    edge = torch.rand(2, rows, columns, generator=G, **F64).round().requires_grad_()
    (found,) = torch.autograd.grad(monotonic_alignment(edge).sin().sum(), edge)
    plain = edge.detach().requires_grad_()
    (want,) = torch.autograd.grad(torch.stack([*map(closed_form, plain)]).sin().sum(), plain)
    close(found, want)
    half = torch.tensor([[0.0, 1.0, 0.5]] * 3, dtype=torch.float16, requires_grad=True)
    monotonic_alignment(half).sum().backward()
    assert bool(torch.isfinite(half.grad).all())


def test_it_is_exact_in_float32_where_the_divided_form_is_not() -> None:
    p = torch.rand(30, 200, generator=G, **F64) * 0.5 + 0.3
    exact = closed_form(p)
    close(by_definition(p[:4]), exact[:4])
    mine = (monotonic_alignment(p.float()) - exact).abs().max().item()
    theirs = (divided(p.float()) - exact).abs().max().item()
    assert mine < 1e-6
    assert theirs > 1e4 * mine


def test_a_reader_who_always_stops_never_gets_on() -> None:
    alpha = monotonic_alignment(torch.ones(4, 6, **F64))
    close(alpha, (torch.arange(6) == 0).to(**F64).expand(4, 6))


def test_one_way_is_a_softmax_over_what_was_read() -> None:
    stops = torch.tensor([0, 2, 2, 5])
    p = torch.nn.functional.one_hot(stops, 7).to(**F64)
    e = 30 * torch.randn(4, 7, generator=G, **F64)
    seen = torch.ones(4, 7, dtype=torch.bool)
    alpha = monotonic_alignment(p)
    close(alpha, p)
    beta = lookback(alpha, e, seen)
    for i, stop in enumerate(stops):
        close(beta[i, : stop + 1], e[i, : stop + 1].softmax(0))
        assert beta[i, stop + 1 :].abs().sum() == 0


def test_looking_back_keeps_the_mass_and_is_its_definition() -> None:
    alpha = monotonic_alignment(torch.rand(2, 5, 8, generator=G, **F64))
    e = 100 * torch.randn(2, 5, 8, generator=G, **F64)
    seen = torch.rand(2, 5, 8, generator=G) > 0.3
    alpha = alpha.masked_fill(~seen, 0)
    beta = lookback(alpha, e, seen)
    close(beta.sum(-1), alpha.sum(-1))
    want = torch.zeros_like(beta)
    for b, i, k in itertools.product(range(2), range(5), range(8)):
        if seen[b, i, k]:
            share = e[b, i, : k + 1].masked_fill(~seen[b, i, : k + 1], -torch.inf).softmax(0)
            want[b, i, : k + 1] += alpha[b, i, k] * share
    close(beta, want)


def found_by(module: nn.Module, **call: object) -> Alignment:
    found: Alignment = module.alignment(X, C, **call)
    return found


def test_mass_is_kept_or_not_and_the_output_is_made_of_the_weights() -> None:
    for kept in (True, False):
        module = built(keep_mass=kept)
        found = found_by(module)
        sums = found.weights.sum(-1)
        close(sums, found.expected.sum(-1))
        assert bool((sums - 1).abs().max() < 1e-12) is kept
        v = module.projection.keys_values(C)[1]
        close(module(X, C), module.output(found.weights @ v))
    plain, p = found.expected, found.stopping
    close(plain, monotonic_alignment(p))
    places = torch.arange(1, 10, **F64)
    close(found.delays, (plain * places).sum(-1))
    close(found.variances, (plain * places.square()).sum(-1) - found.delays.square())
    assert (found_by(built()).delays.diff(dim=-1) >= -1e-9).all()  # no one reads backwards


def test_lagging_is_that_of_a_reader_of_even_pace() -> None:
    found = found_by(built())
    d, pace = found.delays, 9 / 6
    later, total = torch.zeros_like(d[..., 0]), 0.0
    for i in range(6):
        later = d[..., i] if i == 0 else torch.maximum(d[..., i], later + pace)
        total = total + later - i * pace
    close(found.lagging, total / 6)


def test_what_comes_after_the_stop_does_not_matter() -> None:
    module = built(temperature=1e-3, keep_mass=False, heads=1)
    found = found_by(module)
    stop = found.expected[:, 0].argmax(-1)
    sure = (found.expected[:, 0].amax(-1) > 1 - 1e-9) & (stop < 8)
    assert sure.any()
    changed = C.clone()
    for b, i in sure.nonzero().tolist():
        changed = C.clone()
        changed[b, stop[b, i] + 1 :] += 5.0
        close(module(X, changed)[b, i], module(X, C)[b, i], 1e-7)


def test_hidden_sources_are_passed_over() -> None:
    module = built()
    real = torch.tensor([[True] * 9, [False] * 2 + [True] * 5 + [False] * 2])
    close(module(X, C, padding=real)[1:], module(X[1:], C[1:, 2:7]))


def test_a_cache_goes_on_from_the_stop_and_knows_when_it_cannot() -> None:
    module = built()
    cache = module.new_context_cache(C, queries=6)
    first = [module(one, cache=cache) for one in X.split(1, dim=1)]
    close(torch.cat(first, dim=1), module(X, C))
    with pytest.raises(ConfigError, match="crop: where earlier targets had stopped is not kept"):
        cache.crop(cache.length - 1)
    cache.reset()
    close(torch.cat([module(X[:, :4], cache=cache), module(X[:, 4:], cache=cache)], dim=1), module(X, C))
    cache.reset()
    module(X[:, :3], cache=cache)
    cache.reorder(torch.tensor([1, 1]))
    close(module(X[:, 3:], cache=cache)[1:], module(X, C)[1:, 3:])


def test_losses_are_there_in_training_and_lower_the_delay() -> None:
    assert not ph.auxiliary_losses(built().train())
    module = built(latency=0.5, variance=0.1).train()
    module(X, C)
    losses = ph.auxiliary_losses(module)
    found = found_by(module)
    close(losses["latency"], 0.5 * found.lagging.mean())
    close(losses["variance"], 0.1 * found.variances.mean())
    for name, measured in (("latency", "delays"), ("variance", "variances")):
        module = built(latency=0.5, variance=0.5).train()
        before = getattr(found_by(module), measured).mean()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
        for _ in range(5):
            optimizer.zero_grad()
            module(X, C)
            ph.auxiliary_losses(module)[name].backward()
            optimizer.step()
        assert getattr(found_by(module), measured).mean() < before


def test_losses_are_of_the_latest_call_and_stand_beside_those_of_regularizers() -> None:
    module = built(latency=0.5, regularizers=attention_diversification()).train()
    module(X, C)
    assert ph.auxiliary_losses(module).keys() == {"diversification", "latency"}
    for options in ({"regularizers": attention_diversification()}, {}):
        module = built(latency=0.5, **options).train()
        module(X, C)
        module.eval()(X, C)
        assert not ph.auxiliary_losses(module)


def test_when_to_write() -> None:
    p = torch.tensor([[[0.0, 0.9], [0.0, 0.4]], [[0.0, 0.9], [0.0, 0.6]]])
    assert ready(p).tolist() == [False, True]
    assert ready(p, how="mean").tolist() == [True, True]
    assert ready(p, how="median", threshold=0.7).tolist() == [False, False]
    with pytest.raises(ConfigError, match="how must be one of min, mean, median"):
        ready(p, how="max")


def test_cost_and_what_is_refused() -> None:
    module = built(policy_layers=3)
    assert module.cost(6).parameters == 4 * 32 * 32 + 2 * 3 * (32 * 32 + 32) + 1
    assert built(policy_bias=0.0).policy_bias is None
    with pytest.raises(UnsupportedPattern, match="emma aligns .* a context must be given"):
        module.new_cache(2)
    for options, message in (
        ({"score": ph.soft_cap(3.0)}, "score must be None in emma"),
        ({"position": ph.nn.alibi_position()}, "position must not be a bias in emma"),
        ({"normalizer": ph.sigmoid()}, r"normalizer must be softmax\(\) in emma"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"policy_layers": 0}, "policy_layers must be at least 1"),
        ({"latency": -1.0}, "latency must be"),
        ({"keep_mass": 1}, "keep_mass must be True or False"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(**options)
    with pytest.raises(ShapeError, match="p must be a floating-point tensor"):
        monotonic_alignment(torch.ones(3))
    with pytest.raises(ShapeError, match=r"start must be a tensor \(3,\)"):
        monotonic_alignment(torch.ones(2, 3), torch.ones(2))
