"""`generate` with an attached model gives the tokens that eager attention gives."""

import pytest
import torch
import transformers as t

from hf.tiny import DECODERS, eager, llama, padding, t5, tokens, whisper
from polyhead.hf import attach

SETTINGS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


@torch.no_grad()
def both(model, **settings):
    settings = {"max_new_tokens": 10, "min_new_tokens": 10} | settings
    expected = eager(model).generate(**settings)
    with attach(model):
        got = model.generate(**settings)
    return got, expected


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_decoders(name, setting, side):
    mask = padding(side)
    mask = torch.ones_like(tokens()) if mask is None else mask
    got, expected = both(DECODERS[name](), input_ids=tokens(), attention_mask=mask, **SETTINGS[setting])
    assert got.shape == (2, 22)
    assert torch.equal(got, expected)


def test_sampling_with_a_seed():
    model, found = llama(), []
    for attached in (False, True):
        attachment = attach(model) if attached else None
        torch.manual_seed(0)
        found.append(model.generate(tokens(), do_sample=True, max_new_tokens=10, top_k=5))
        if attachment:
            attachment.detach()
    assert torch.equal(*found)


@pytest.mark.parametrize("beams", [1, 2])
def test_t5(beams):
    got, expected = both(t5(), input_ids=tokens(), attention_mask=padding("right"), num_beams=beams)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_whisper(beams):
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    got, expected = both(whisper(), input_features=sound, num_beams=beams)
    assert torch.equal(got, expected)


def test_assisted_by_another_model():
    model, helper = llama(), llama()
    got, expected = both(model, input_ids=tokens(1), assistant_model=helper, do_sample=False)
    assert torch.equal(got, expected)


def test_a_conversation_that_goes_on():
    model = llama()

    def talk(m):
        cache = t.DynamicCache()
        first = m.generate(tokens(1), past_key_values=cache, do_sample=False, max_new_tokens=5)
        more = torch.cat([first, tokens(1)[:, :6]], 1)
        return m.generate(more, past_key_values=cache, do_sample=False, max_new_tokens=5)

    expected = talk(eager(model))
    with attach(model):
        assert torch.equal(talk(model), expected)
