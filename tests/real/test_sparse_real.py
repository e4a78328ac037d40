"""Selectors inside SmolLM2-135M-Instruct."""

import itertools

import pytest
import torch

import polyhead as ph
from polyhead.tasks import sample_text

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2(smollm2):
    model, tokenizer = smollm2
    return model.requires_grad_(False), tokenizer


def selector(share):
    return ph.select(
        ph.mean_keys(), ph.keep_share(share), rows=32, cols=16, always=ph.sink(1) | ph.window(15)
    )


@pytest.fixture(scope="module")
def ids(smollm2):
    return smollm2[1](sample_text(), return_tensors="pt", verbose=False)["input_ids"][:, :400]


def test_keeping_everything_changes_nothing(smollm2, ids):
    model, _ = smollm2
    expected = model(ids, use_cache=False).logits
    with ph.sparse(model, selector(1.0)):
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_the_missed_mass_falls_as_more_is_read(smollm2, ids):
    model, _ = smollm2
    masses, distances = [], []
    expected = model(ids, use_cache=False).logits.log_softmax(-1)
    for share in (0.1, 0.3, 0.6):
        masses.append(ph.heads.missed_mass(model, text=ids, select=selector(share)).mass)
        assert masses[-1].widths == (9,) * 30
        assert 0.0 <= masses[-1].flat.min() <= masses[-1].flat.max() <= 1.0
        with ph.sparse(model, selector(share)):
            found = model(ids, use_cache=False).logits.log_softmax(-1)
        distances.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    for fewer, more in itertools.pairwise(masses):  # what a larger share reads holds what a smaller one does
        assert bool((more.flat <= fewer.flat + 1e-6).all())
        assert more.flat.mean() < fewer.flat.mean()
    assert distances[0] > distances[1] > distances[2] > 0


def test_generate_reads_the_same_with_a_cache_and_without(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer("The days of the week are Monday, Tuesday,", return_tensors="pt")
    own = ph.select(ph.key_bounds(), ph.keep_share(0.5), rows=1, cols=4, always=ph.sink(1) | ph.window(3))
    how = {"max_new_tokens": 10, "do_sample": False}
    with ph.sparse(model, own):
        found = model.generate(**inputs, **how)
        again = model.generate(**inputs, **how, use_cache=False)
    assert torch.equal(found, again)
