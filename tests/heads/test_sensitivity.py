"""How sensitive a model is to the sparsity of each head, and budgets that follow it."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import polyhead as ph
from hf.tiny import DECODERS, bert, llama, t5, tokens, vit
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.heads import (
    OutputError,
    allocate_budget,
    allocate_greedily,
    error_curve,
    head_sensitivities,
    head_sensitivity,
    hidden_distance,
    logit_divergence,
)
from polyhead.hf import attach

OWN = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=2, cols=3)


class Last(OutputError):
    """The squared distance of 4 features of one token, whose probes are the axes in turn: no chance in it."""

    name: ClassVar[str] = "last"
    axes: ClassVar[list[int]] = []

    token: int = -1

    def seen(self, output: Any) -> torch.Tensor:
        at = self.token % output.hidden_states[-1].shape[1]
        return output.hidden_states[-1][:, at : at + 1, :4]

    def probe(self, y: torch.Tensor, noise: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        self.axes.append(len(self.axes) % 4)
        r = torch.zeros_like(y)
        r[..., self.axes[-1]] = (4 * 2 / 4) ** 0.5  # one axis of four, drawn evenly
        return r

    def between(self, y: torch.Tensor, dense: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return (y - dense).square().mean((1, 2))


def turned(model: Any, ids: torch.Tensor, layer: int, head: int, far: float) -> Any:
    """The model's output where one head is so far on the way from dense to sparse."""

    def handler(call: Any) -> torch.Tensor:
        dense = call.proceed()
        if call.layer.index != layer:
            return dense
        sparse = ph.attend(call.q, call.k, call.v, mask=call.mask, scale=call.scale, select=OWN)
        on = torch.zeros(dense.shape[1], dtype=dense.dtype)
        on[head] = far
        return dense + on[:, None, None] * (sparse - dense)

    with torch.no_grad(), attach(model, handler=handler):
        return model(ids, use_cache=False, output_hidden_states=True)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_is_the_error_of_small_changes(name: str) -> None:
    model = DECODERS[name]().double()
    if name == "gemma2":  # what the handler above leaves out
        model.config.attn_logit_softcapping = None
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
            layer.self_attn.sliding_window = None
        model.config.sliding_window = 64
    ids = tokens(1, 20)
    error = Last()
    (found,) = head_sensitivities(model, text=ids, select=OWN, errors=[error], probes=4)
    dense = turned(model, ids, 0, 0, 0.0)
    counts = torch.ones(1, 1, 1)
    for layer in range(2):
        for head in range(4):
            y = turned(model, ids, layer, head, 1e-4)
            true = float(error.between(error.seen(y), error.seen(dense), counts)) / 1e-8
            assert found[layer, head] == pytest.approx(true, rel=1e-2)
    assert found.flat.max() > 5 * found.flat.min() > 0
    assert found.kv_groups == (2, 2)


@pytest.mark.parametrize("error", [logit_divergence(), hidden_distance()], ids=lambda e: e.name)
def test_probes_have_the_curvature_of_the_error(error: OutputError) -> None:
    torch.manual_seed(0)
    y = torch.randn(1, 2, 3, dtype=torch.float64)
    counts = torch.tensor([[[0.25], [0.75]]], dtype=torch.float64)
    at = y.clone().requires_grad_()
    value = error.between(at, y, counts)
    assert float(value.detach()) == pytest.approx(0.0)
    assert torch.autograd.grad(value.sum(), at)[0].abs().max() < 1e-12
    hessian = torch.autograd.functional.hessian(lambda x: error.between(x, y, counts).sum(), y).view(6, 6)
    noise = torch.randn(40_000, 2, 3, dtype=torch.float64)
    r = error.probe(y, noise, counts).flatten(1)
    torch.testing.assert_close(r.mT @ r / len(r), hessian, rtol=0, atol=0.02 * float(hessian.abs().max()))


def test_more_probes_come_near_the_truth() -> None:
    model = llama().double()
    ids = tokens(1, 12)
    found = head_sensitivities(model, text=ids, select=OWN, probes=150)
    dense = turned(model, ids, 0, 0, 0.0)
    counts = torch.full((1, 12, 1), 1 / 12, dtype=torch.float64)
    for error, scores in zip((logit_divergence(), hidden_distance()), found, strict=True):
        true = [
            float(error.between(error.seen(turned(model, ids, layer, head, 1e-3)), error.seen(dense), counts))
            for layer in range(2)
            for head in range(4)
        ]
        np.testing.assert_allclose(scores.flat, np.array(true) * 1e6, rtol=0.4)
        assert np.corrcoef(scores.flat, true)[0, 1] > 0.95


def test_texts_twice_change_nothing_and_scores_are_not_negative() -> None:
    model = llama()
    once = head_sensitivity(model, text=tokens(2, 20), select=OWN)
    twice = head_sensitivity(model, text=tokens(2, 20).repeat(2, 1), select=OWN)
    np.testing.assert_allclose(twice.flat, once.flat, rtol=1e-5)
    assert bool((once.flat > 0).all())
    assert once.flat.mean() == pytest.approx(1.0)
    other = head_sensitivity(model, text=tokens(2, 20), select=OWN, seed=1)
    assert np.abs(other.flat - once.flat).max() > 1e-3


def test_errors_are_weighed() -> None:
    model = llama()
    ids = tokens(1, 20)
    errors = logit_divergence(), hidden_distance()
    each = head_sensitivities(model, text=ids, select=OWN, errors=errors)
    parts = [one.flat / one.flat.mean() for one in each]
    even = head_sensitivity(model, text=ids, select=OWN)
    np.testing.assert_allclose(even.flat, (parts[0] + parts[1]) / 2)
    uneven = head_sensitivity(model, text=ids, select=OWN, errors=errors, weights=(3.0, 1.0))
    np.testing.assert_allclose(uneven.flat, 0.75 * parts[0] + 0.25 * parts[1])


def test_a_head_on_which_nothing_depends_gets_the_floor() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0.0
    scores = head_sensitivity(model, text=tokens(1, 20), select=OWN)
    assert scores[1, 1] == 0.0
    assert bool((np.delete(scores.flat, 5) > 0).all())
    assert allocate_budget(scores, 0.3, 0.07)[1, 1] == pytest.approx(0.07)


def test_padding_does_not_count() -> None:
    model = llama().double()
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    how: dict[str, Any] = {"select": OWN, "errors": [Last(11)], "probes": 4}
    found = head_sensitivities(model, text={"input_ids": ids, "attention_mask": mask}, **how)[0]
    alone = [head_sensitivities(model, text=one, **how)[0].flat for one in (ids[:1], ids[1:, :14])]
    np.testing.assert_allclose(found.flat, (alone[0] + alone[1]) / 2)
    # the means of errors are over real tokens alone
    full = {"input_ids": ids, "attention_mask": mask}
    changed = ids.clone()
    changed[1, 14:] = 7
    a, b = (
        head_sensitivities(model, text=full | {"input_ids": x}, select=OWN, probes=100)[1].flat
        for x in (ids, changed)
    )
    np.testing.assert_allclose(a, b, rtol=0.5)  # other probes, the same error


def test_layers_without_a_selector_and_corrected_ones() -> None:
    model = llama().double()
    ids = tokens(1, 20)
    how: dict[str, Any] = {"errors": [Last()], "probes": 4}
    every = head_sensitivities(model, text=ids, select=OWN, **how)[0]
    one = head_sensitivities(model, text=ids, select={1: OWN}, **how)[0]
    assert one[0].tolist() == [0.0] * 4
    np.testing.assert_allclose(one[1], every[1])
    whole = ph.select(ph.mean_keys(), ph.keep_share(1.0), rows=2, cols=3)
    np.testing.assert_allclose(
        head_sensitivities(model, text=ids, select=whole, **how)[0].flat, 0.0, atol=1e-20
    )
    corrected = head_sensitivities(model, text=ids, select=ph.rectified(OWN, gate=ph.open_gate()), **how)[0]
    assert np.abs(corrected.flat / every.flat - 1).max() > 0.05


def test_other_models() -> None:
    ids = tokens(2, 20)
    found = head_sensitivity(bert(), text=ids, select=OWN, errors=[hidden_distance()])
    assert bool((found.flat > 0).all())
    model = t5()
    inputs = {"input_ids": ids, "decoder_input_ids": tokens(2, 12)}
    found = head_sensitivity(model, text=[inputs, inputs], select=OWN)
    assert len(found.widths) == 6
    assert bool((found.flat > 0).all())
    picture = {"pixel_values": torch.randn(2, 3, 16, 16)}
    found = head_sensitivity(vit(), text=picture, select=OWN, errors=[hidden_distance()])
    assert bool((found.flat > 0).all())
    with pytest.raises(UnsupportedModel, match="two sequences"):
        head_sensitivity(model, text=ids, select=OWN)
    with pytest.raises(ConfigError, match="logit_divergence needs logits"):
        head_sensitivity(bert(), text=ids, select=OWN)


def test_the_model_is_given_back_and_wrong_input_is_said() -> None:
    model = llama().train()
    ids = tokens(1, 20)
    head_sensitivity(model, text=ids, select=OWN)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for more, words in (
        ({"errors": []}, "errors must be one or more"),
        ({"errors": [OWN]}, "errors must be one or more"),
        ({"weights": (1.0,)}, "one number for each of 2 errors"),
        ({"weights": 5}, "one number for each of 2 errors; got 5"),
        ({"weights": (0.0, 0.0)}, "must not all be 0"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"select": [OWN, "half"]}, "selector of layer 1 must be"),
        ({"text": {"input_ids": ids}, "length": 4}, "length cuts texts"),
    ):
        with pytest.raises(ConfigError, match=words):
            head_sensitivity(model, **({"text": ids, "select": OWN} | more))  # type: ignore[arg-type]


def scores(*values: float) -> ph.HeadScores:
    return ph.HeadScores((np.array(values[:2]), np.array(values[2:])), kv_groups=1)


RANDOM = [np.random.default_rng(n).lognormal(0.0, 2.0, 7) for n in range(6)]


@pytest.mark.parametrize("values", RANDOM, ids=str)
def test_water_filling_equals_its_twin(values: np.ndarray) -> None:
    for mean, floor, cap, power in ((0.2, 0.05, 1.0, 0.5), (0.5, 0.0, 0.9, 1.0), (0.7, 0.3, 0.8, 0.25)):
        found = allocate_budget(scores(*values), mean, floor, cap, power=power)
        expected = ph.reference("allocate_budget")(torch.tensor(values), mean, floor, cap, power)
        np.testing.assert_allclose(found.flat, expected.numpy(), atol=1e-9)
        assert found.flat.mean() == pytest.approx(mean)
        assert found.widths == (2, 5)
        assert found.kv_groups == (1, 1)


CURVE = error_curve({0.1: scores(3.0, 1, 2), 0.3: scores(0.5, 0.6, 1), 0.6: scores(0.1, 0.2, 0.3)})


@pytest.mark.parametrize("values", RANDOM, ids=str)
def test_the_greedy_one_equals_its_twin_and_loses_least(values: np.ndarray) -> None:
    own = scores(*values)
    found = allocate_greedily(own, 0.4, CURVE, 0.0, 1.0, step=1 / 20)
    errors = CURVE.at(np.linspace(0, 1, 21))
    steps = ph.reference("allocate_greedily")(torch.tensor(values), torch.tensor(errors), 56)
    np.testing.assert_allclose(found.flat, steps.numpy() / 20)
    assert found.flat.mean() == pytest.approx(0.4, abs=0.5 / 20 / 7 + 1e-9)
    for other in (np.full(7, 0.4), allocate_budget(own, 0.4).flat):
        assert (values * CURVE.at(found.flat)).sum() <= (values * CURVE.at(other)).sum() + 1e-9


def test_what_budgets_must_hold() -> None:
    for allocate in (allocate_budget, lambda s, m, f=0.0, c=1.0: allocate_greedily(s, m, CURVE, f, c)):
        np.testing.assert_allclose(allocate(scores(2.0, 2, 2, 2), 0.25).flat, 0.25, atol=1e-9)
        np.testing.assert_allclose(allocate(scores(0.0, 0, 0, 0), 0.25).flat, 0.25, atol=1e-9)
        np.testing.assert_allclose(allocate(scores(0.0, 1, 5, 2), 1.0).flat, 1.0)
        np.testing.assert_allclose(allocate(scores(0.0, 1, 5, 2), 0.1, 0.1, 0.1).flat, 0.1)
        # what the others leave is for the heads without a score, alike
        np.testing.assert_allclose(allocate(scores(0.0, 0, 5, 2), 0.75).flat, [0.5, 0.5, 1.0, 1.0], atol=0.01)
        np.testing.assert_allclose(allocate(scores(0.0, 0, 5, 2), 0.5).flat, [0.0, 0.0, 1.0, 1.0], atol=0.01)
        for values in RANDOM:
            before = allocate(scores(*values), 0.3, 0.05, 0.9).flat
            assert 0.05 - 1e-12 <= before.min() <= before.max() <= 0.9 + 1e-12
            for head in range(7):
                more = values.copy()
                more[head] *= 1.7
                assert allocate(scores(*more), 0.3, 0.05, 0.9).flat[head] >= before[head] - 1e-9


def test_the_curve_is_convex_and_ends_at_nothing() -> None:
    assert CURVE.shares == (0.1, 0.3, 0.6, 1.0)
    np.testing.assert_allclose(CURVE.errors, (2.0, 0.7, 0.2, 0.0))
    np.testing.assert_allclose(CURVE.at(np.array([0.0, 0.2, 1.0])), [2.65, 1.35, 0.0])
    bent = error_curve({0.1: scores(1.0), 0.5: scores(0.9), 0.7: scores(0.2)})
    assert bent.shares == (0.1, 0.7, 1.0)  # 0.9 lies above the line


def test_budgets_that_cannot_be() -> None:
    good = scores(1.0, 2, 3)
    for wrong, words in (
        (lambda: allocate_budget(good, 0.0), "mean must be a finite number above 0"),
        (lambda: allocate_budget(good, 0.2, 0.3), "between floor and cap, 0.3 and 1; got 0.2"),
        (lambda: allocate_budget(good, 0.6, 0.1, 0.5), "between floor and cap, 0.1 and 0.5; got 0.6"),
        (lambda: allocate_budget(scores(-1.0, 2), 0.5), "score of 0 or more"),
        (lambda: allocate_budget(scores(np.nan, 2), 0.5), "score of 0 or more"),
        (lambda: allocate_budget([1.0], 0.5), "scores must be HeadScores"),  # type: ignore[arg-type]
        (lambda: allocate_greedily(good, 0.5, {0.1: 2.0}), "curve must be one that error_curve makes"),  # type: ignore[arg-type]
        (lambda: error_curve({}), "measured must be"),
        (lambda: error_curve({1.5: good}), "share must be"),
        (lambda: error_curve({0.5: scores(np.nan)}), "error of 0 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            wrong()


def test_budgets_go_into_a_model() -> None:
    """A head that the model does not need reads little, and the logits stay nearer than with even shares."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 8:] = 0.0  # one head of four is needed
    ids = tokens(1, 60)

    def own(share: Any) -> ph.Selector:
        return ph.select(ph.mean_keys(), ph.keep_share(share), rows=4, cols=4)

    budget = allocate_budget(head_sensitivity(model, text=ids, select=own(0.25)), 0.25)
    np.testing.assert_allclose(budget.flat.reshape(2, 4)[:, 1:], 0.0, atol=1e-9)
    with torch.no_grad():
        dense = model(ids).logits
        with ph.sparse(model, [own(torch.tensor(row)) for row in budget.values]):
            torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-4)
        with ph.sparse(model, own(0.25)):
            assert (model(ids).logits - dense).abs().max() > 0.01
