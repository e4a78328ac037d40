"""Looking at heads of real models: SmolLM2-135M-Instruct and all-MiniLM-L6-v2."""

import numpy as np
import pytest
import torch

from polyhead.heads import copy_scores, profile, retrieval_mass
from polyhead.tasks import HELD_OUT_NAMES, held_out_text, needle, perplexity, sample_text, score

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def seen(smollm2):
    return profile(*smollm2, length=400, pictures=16)


def weights(model, ids):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model.base_model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [w[0].double() for w in found]


def test_scores_are_those_of_materialised_weights(smollm2, seen):
    dense = weights(smollm2[0], seen.ids)
    i = torch.arange(400)
    far = (i[:, None] - i).abs()
    for layer, whole in enumerate(dense):
        w = whole[:, 1:]  # the first row has no choice
        expected = {
            "entropy": torch.special.entr(w).sum(-1).mean(-1),
            "sink": w[..., 0].mean(-1),
            "distance": (w * far[1:]).sum((1, 2)) / 399,
            "previous_token": whole.diagonal(-1, 1, 2).mean(-1),
            "window": (w * (far[1:] <= 50)).sum(-1).mean(-1),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(seen[name][layer], values.numpy(), rtol=2e-3, atol=2e-4, err_msg=name)
        pooled = whole.view(9, 16, 25, 16, 25).sum(-1).mean(2)
        np.testing.assert_allclose(seen.pictures(16).mass[layer], pooled.numpy(), rtol=2e-3, atol=2e-4)


def test_the_known_heads_of_smollm2(seen):
    assert seen["induction"].above(0.5) >= {(18, 6), (17, 3), (17, 4)}
    assert (16, 0) in seen["previous_token"].top(2)
    assert {(18, 6), (21, 8), (14, 3)} <= set(seen["retrieval"].top(8))
    assert seen["sink"][18, 8] > 0.9
    assert all(0 in sinks for sinks in seen.sinks[13:])  # the first token, in the upper half
    roles = seen.roles
    assert roles[16, 0] == "previous token"
    assert roles[18, 6] == "induction"
    assert roles[21, 8] == "retrieval"
    assert 3 < roles.counts()["induction"] < 20


def test_needles_are_found_again_and_scores_agree(smollm2):
    cases = needle(
        held_out_text(), smollm2[1], lengths=(400,), depths=(0.2, 0.7), seed=5, keys=HELD_OUT_NAMES
    )
    assert score(*smollm2, cases).accuracy == 1
    mass = retrieval_mass(smollm2[0], cases, batch=2)
    copied = copy_scores(*smollm2, cases)
    assert copied.kept == 2
    assert copied.score[18, 6] >= 0.5
    assert (18, 6) in mass.top(4)
    assert mass.by_kv_head().widths == (3,) * 30


def test_perplexity_of_prose(smollm2):
    model, tokenizer = smollm2
    found = perplexity(model, tokenizer, sample_text(), length=200)
    assert 5 < found.value < 40
    x = torch.tensor([tokenizer(sample_text())["input_ids"][:200]])
    with torch.no_grad():
        assert found.nats == pytest.approx(model(x, labels=x).loss.item(), rel=1e-3)


def test_an_encoder_has_roles_without_retrieval(minilm):
    model, tokenizer = minilm
    seen = profile(model, tokenizer, length=256)
    assert seen.is_encoder
    assert len(seen.ids) == 256
    assert tokenizer.convert_ids_to_tokens([seen.ids[0], seen.ids[-1]]) == ["[CLS]", "[SEP]"]
    assert "retrieval" not in seen
    assert "retrieval" not in seen.roles.counts()
    assert seen["next_token"][1, 8] > 0.5
    assert seen.roles[0, 2] == "previous token"
    dense = weights(model, seen.ids)
    for layer, w in enumerate(dense):
        entropy = torch.special.entr(w).sum(-1).mean(-1)
        np.testing.assert_allclose(seen["entropy"][layer], entropy.numpy(), rtol=2e-3, atol=2e-4)
