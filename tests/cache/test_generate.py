"""`generate` with a per-head cache: greedy, sampling, beams, batches with padding."""

import copy

import pytest
import torch
from transformers import DynamicCache

from cache.tiny import MODELS, left_padded, llama, masked_forward, some_heads, tokens
from polyhead.cache import per_head
from polyhead.errors import ConfigError

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 7},
}


def generated(model, ids, cache, mask=None, **how):
    torch.manual_seed(1)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=16, **how)


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_keeps_everything_equals_dynamic_cache(name, how):
    model = MODELS[name]().float()  # in float64 the eager attention of transformers overflows on padding
    ids, mask = left_padded(2, 24, [0, 5])
    expected = generated(model, ids, DynamicCache(config=model.config), mask, **how)
    found = generated(model, ids, per_head(model, full="all"), mask, **how)
    assert found.tolist() == expected.tolist()


def beam_search(model, ids, full, beams, steps):
    """Beam search by the definition: every continuation scored by a full masked forward pass."""
    alive = [(0.0, ids)]
    for _ in range(steps):
        grown = []
        for score, tokens_so_far in alive:
            logits = masked_forward(model, tokens_so_far, full, 2, 6)[0, -1]
            for token, gain in enumerate(logits.log_softmax(-1).tolist()):
                grown.append((score + gain, tokens_so_far, token))
        grown.sort(key=lambda g: -g[0])
        alive = [(s, torch.cat([t, torch.tensor([[w]])], 1)) for s, t, w in grown[:beams]]
    return alive[0][1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_equal_beam_search_over_masked_forward_passes(name):
    model = MODELS[name]()
    full = some_heads(model)
    ids, mask = left_padded(2, 20, [0, 6])
    found = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=per_head(model, full=full, sink=2, window=6),
        max_new_tokens=5,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
    )
    for row, count in enumerate([0, 6]):
        expected = beam_search(model, ids[row : row + 1, count:], full, 3, 5)
        assert found[row, count:].tolist() == expected[0].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_greedy_over_masked_forward_passes(name):
    model = MODELS[name]()
    full = some_heads(model)
    ids = tokens(1, 20)
    found = generated(model, ids, per_head(model, full=full, sink=2, window=6), do_sample=False)
    for _ in range(16):
        logits = masked_forward(model, ids, full, 2, 6)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert found.tolist() == ids.tolist()


def test_the_choice_of_heads_matters():
    model, ids = llama(), tokens(1, 40)
    with torch.no_grad():
        whole = model(ids).logits
    some, none = some_heads(model), [[False] * 3] * 3
    distance = [(masked_forward(model, ids, full, 2, 6) - whole).abs().max() for full in (some, none)]
    assert min(distance) > 1e-3


def test_going_on_in_a_second_turn_and_from_a_copy():
    model = llama()
    full = some_heads(model)
    first, second = tokens(1, 20), tokens(1, 30, seed=1)
    cache = per_head(model, full=full, sink=2, window=6)
    so_far = generated(model, first, cache, do_sample=False)
    fork = copy.deepcopy(cache)
    prompt = torch.cat([so_far, second], dim=1)
    expected = generated(model, prompt, per_head(model, full=full, sink=2, window=6), do_sample=False)
    assert generated(model, prompt, cache, do_sample=False).tolist() == expected.tolist()
    cache.detach()
    assert generated(model, prompt, fork, do_sample=False).tolist() == expected.tolist()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


def test_assisted_generation_needs_a_cache_that_can_go_back():
    model, assistant = llama(), llama()
    ids = tokens(1, 20)
    expected = generated(model, ids, None, do_sample=False)
    found = generated(model, ids, per_head(model, full="all"), do_sample=False, assistant_model=assistant)
    assert found.tolist() == expected.tolist()
    with pytest.raises(ConfigError, match="takes tokens back.*use full='all'"):
        generated(model, ids, per_head(model, full="none"), do_sample=False, assistant_model=assistant)
