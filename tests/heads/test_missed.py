"""What a selector would miss of every head of a model, and shares of a budget."""

import numpy as np
import pytest
import torch

import polyhead as ph
from hf.tiny import DECODERS, bert, llama, t5, tokens
from polyhead.errors import ConfigError, ShapeError, UnsupportedModel
from polyhead.heads import missed_mass, shares
from polyhead.hf import attach

OWN = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=2, cols=3)


def reference(model, inputs, select, real=None):
    """Missed mass and bound, query by query and layer by layer, by `ph.missed_mass`; and true errors."""
    found = []

    def handler(call):
        how = {"mask": call.mask, "score": call.score, "scale": call.scale}
        missed = ph.missed_mass(call.q, call.k, call.v, select=select, **how)
        dense = ph.attend(call.q, call.k, call.v, **how)
        found.append((missed, (dense - missed.output).norm(dim=-1)))
        return dense

    with torch.no_grad(), attach(model, handler=handler):
        model(**inputs, use_cache=False)
    return found


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_means_of_every_head_of_the_dense_model(name):
    model = DECODERS[name]().double()
    ids = tokens(2, 30)
    found = missed_mass(model, text=ids, select=OWN)
    assert found.mass.widths == found.bound.widths == (4, 4)
    assert found.mass.kv_groups == (2, 2)
    for layer, (missed, error) in enumerate(reference(model, {"input_ids": ids}, OWN)):
        assert bool((error <= missed.bound + 1e-9).all())
        np.testing.assert_allclose(found.mass[layer], missed.mass.mean((0, 2)))
        np.testing.assert_allclose(found.bound[layer], missed.bound.mean((0, 2)))
    assert found.mass.flat.min() > 0.01


def test_with_sinks():
    """Mass and bound against weights written out: the sink's share is neither read nor missed."""
    model = DECODERS["gpt_oss"]().double()
    ids, found = tokens(1, 30), []

    def handler(call):
        how = {"mask": call.mask, "normalizer": call.normalizer, "scale": call.scale}
        weights = ph.attend(call.q, call.k, torch.eye(30).double().expand(1, 2, 30, 30), **how)
        v = call.v.repeat_interleave(2, 1)
        cut = ph.attend(call.q, call.k, call.v, select=OWN, **how)
        read = ph.attend(call.q, call.k, torch.eye(30).double().expand(1, 2, 30, 30), select=OWN, **how)
        mass = (weights * (read == 0)).sum(-1)
        found.append((mass.mean((0, 2)), (weights @ v - cut).norm(dim=-1).mean((0, 2))))
        return call.proceed()

    with torch.no_grad(), attach(model, handler=handler):
        model(ids, use_cache=False)
    missed = missed_mass(model, text=ids, select=OWN)
    for layer, (mass, error) in enumerate(found):
        np.testing.assert_allclose(missed.mass[layer], mass)
        assert bool((torch.tensor(missed.bound[layer]) >= error).all())
    assert missed.mass.flat.min() > 0.005


def test_padding_does_not_count():
    model = llama().double()
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 24:] = 0
    found = missed_mass(model, text={"input_ids": ids, "attention_mask": mask}, select=OWN)
    alone = [missed_mass(model, text=ids[:1], select=OWN), missed_mass(model, text=ids[1:, :24], select=OWN)]
    for name in ("mass", "bound"):
        whole = [getattr(one, name).flat * rows for one, rows in zip(alone, (30, 24), strict=True)]
        np.testing.assert_allclose(getattr(found, name).flat, sum(whole) / 54)


def test_a_layer_that_reads_everything_misses_nothing():
    model = llama()
    ids = tokens(1, 30)
    found = missed_mass(model, text=ids, select={1: OWN})
    assert found.mass[0].tolist() == found.bound[0].tolist() == [0.0] * 4
    whole = ph.select(ph.mean_keys(), ph.keep_share(1.0), rows=2, cols=3)
    np.testing.assert_allclose(missed_mass(model, text=ids, select=whole).mass.flat, 0.0, atol=1e-6)
    np.testing.assert_array_equal(found.mass[1], missed_mass(model, text=ids, select=OWN).mass[1])


def test_within_sparse_it_is_about_the_dense_model():
    model = llama()
    ids = tokens(1, 30)
    expected = missed_mass(model, text=ids, select=OWN)
    with ph.sparse(model, ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=2, cols=3)):
        assert missed_mass(model, text=ids, select=OWN).mass == expected.mass


def test_the_model_is_given_back():
    model = llama().train()
    missed_mass(model, text=tokens(1, 30), select=OWN)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="selector of layer 1 must be"):
        missed_mass(model, text=tokens(1, 30), select=[OWN, "half"])
    with pytest.raises(ConfigError, match="reads 64; length=64"):
        missed_mass(model, text=tokens(1, 70), select=OWN)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_other_architectures():
    ids = tokens(2, 30)
    found = missed_mass(bert(), text=ids, select=OWN)
    assert bool((found.mass.flat > 0.01).all())
    model = t5()
    with pytest.raises(UnsupportedModel, match="two sequences"):
        missed_mass(model, text=ids, select=OWN)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(2, 12)}
    found = missed_mass(model, text=inputs, select=OWN)
    assert len(found.mass.widths) == 6
    assert bool((found.mass.flat > 0.001).all())
    with pytest.raises(ShapeError, match=r"padding is \(2, 11\)"):
        missed_mass(model, text=inputs | {"decoder_attention_mask": mask.new_ones(2, 11)}, select=OWN)


def test_shares_have_the_mean_and_the_proportions():
    scores = ph.HeadScores((np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0, 10.0])))
    found = shares(scores, 0.1)
    np.testing.assert_allclose(found.flat, scores.flat * 0.6 / 20)
    full = shares(scores, 0.5)  # the largest is full, the others share what is left
    np.testing.assert_allclose(full.flat, [0.2, 0.4, 0.6, 0.8, 0.0, 1.0])
    least = shares(scores, 0.3, least=0.1)
    assert least.flat.mean() == pytest.approx(0.3)
    assert least[1, 1] == 0.1
    np.testing.assert_allclose(shares(scores, 0.3, least=0.3).flat, 0.3)


@pytest.mark.parametrize(
    ("values", "mean", "words"),
    [
        ([0.0, 0.0, 1.0, 1.0], 0.6, "2 of 4 heads have score 0"),
        ([0.0, 0.0], 0.5, "2 of 2 heads have score 0"),
        ([-1.0, 2.0], 0.5, "score of 0 or more"),
        ([np.nan, 2.0], 0.5, "score of 0 or more"),
        ([1.0, 2.0], 0.0, "mean must be a finite number above 0"),
        ([1.0, 2.0], 1.5, "and at most 1, got 1.5"),
    ],
)
def test_shares_that_cannot_be(values, mean, words):
    with pytest.raises(ConfigError, match=words):
        shares(ph.HeadScores((np.array(values),)), mean)


def test_shares_become_budgets():
    """Of as many blocks in all, a head with a larger share reads more and misses less."""
    model = llama()
    ids = tokens(1, 60)
    even = ph.select(ph.mean_keys(), ph.keep_share(0.3), rows=4, cols=4)
    given = shares(ph.HeadScores((np.array([1.0, 1.0, 1.0, 3.0]),) * 2), 0.3)
    np.testing.assert_allclose(given[0], [0.2, 0.2, 0.2, 0.6])
    own = {
        layer: ph.select(ph.mean_keys(), ph.keep_share(torch.tensor(given[layer])), rows=4, cols=4)
        for layer in range(2)
    }
    before, after = (missed_mass(model, text=ids, select=select).mass for select in (even, own))
    for layer in range(2):
        assert after[layer, 3] < before[layer, 3]
        assert bool((after[layer][:3] > before[layer][:3]).all())
    with ph.sparse(model, own), torch.no_grad():
        assert model(ids).logits.isfinite().all()
