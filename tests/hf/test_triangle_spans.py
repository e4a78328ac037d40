"""Spans that are followed through the calls of a pretrained model."""

import pytest
import torch

import polyhead as ph
from hf.tiny import DECODERS, llama, tokens
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError

LENGTH = 40
OWN = ph.triangle_spans(5, 8, first=1, chunk=4, rows=1)


def mask_of(side):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side == "left":
        mask[0, :7] = 0
    return mask


@torch.no_grad()
def steps(model, ids, mask, sizes):
    past, start, found = None, 0, []
    for size in sizes:
        stop = start + size
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True)
        past, start = out.past_key_values, stop
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("sizes", [[25] + [1] * 15, [1] * 40, [7, 20, 1, 12]], ids=["steps", "all", "pieces"])
def test_steps_read_what_the_whole_text_does(name, side, sizes):
    model, ids, mask = DECODERS[name](), tokens(2, LENGTH), mask_of(side)
    with ph.sparse(model, OWN):
        expected = steps(model, ids, mask, [LENGTH])
        found = steps(model, ids, mask, sizes)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[real], steps(model, ids, mask, [LENGTH])[real], atol=1e-2)


def test_a_dense_prefill_is_followed_too():
    """The first sparse step reads what a whole text would: its queries are those of the dense prefill."""
    model, ids, mask = llama(), tokens(2, LENGTH), mask_of("none")
    seen = {}

    def look(call):
        seen.setdefault(call.layer.index, []).append(call.mask)
        return call.proceed()

    with ph.attach(model, handler=look), ph.sparse(model, OWN, prefill=False):
        steps(model, ids, mask, [LENGTH - 1, 1])
    sizes = {"batch": 2, "heads": 1, "keys": LENGTH, "queries": 1}
    kept = {}

    def keep(call):
        kept[call.layer.index] = call
        return call.proceed()

    with ph.attach(model, handler=keep):
        steps(model, ids, mask, [LENGTH])
    first = kept[0]
    whole = ph.reference("triangle_spans")(first.q, first.k, budget=5, window=8, first=1, chunk=4, rows=1)
    assert torch.equal(densify(seen[0][1], **sizes)[:, 0, 0], whole[:, -1])


def test_every_text_begins_anew():
    model, mask = llama(), mask_of("none")
    other = tokens(2, LENGTH).flip(1)
    with ph.sparse(model, OWN):
        expected = steps(model, other, mask, [30] + [1] * 10)
    with ph.sparse(model, OWN):
        steps(model, tokens(2, LENGTH), mask, [20] + [1] * 5)
        assert torch.equal(steps(model, other, mask, [30] + [1] * 10), expected)


def test_layers_follow_its_choice():
    model, ids, mask = llama(), tokens(2, LENGTH), mask_of("none")
    with ph.sparse(model, {0: ph.lead(OWN), 1: ph.follow(0)}):
        expected = steps(model, ids, mask, [LENGTH])
        found = steps(model, ids, mask, [25] + [1] * 15)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generate_with_a_cache_and_without():
    model = llama()
    model.generation_config.eos_token_id = None
    how = {"max_new_tokens": 12, "do_sample": False}
    with ph.sparse(model, OWN):
        found = model.generate(tokens(2, 30), **how)
        assert torch.equal(model.generate(tokens(2, 30), use_cache=False, **how), found)


def test_what_was_not_read_within_is_refused():
    model, ids = llama(), tokens(2, LENGTH)
    past = model(ids[:, :30], use_cache=True).past_key_values
    with ph.sparse(model, OWN), pytest.raises(ConfigError, match="goes on behind 30 tokens.*and 0 of 2 were"):
        model(ids[:, 30:31], past_key_values=past)


def test_layers_with_a_window_of_their_own_stay_dense():
    model, ids, mask = DECODERS["gpt_oss"](), tokens(2, LENGTH), mask_of("none")
    with ph.attach(model) as attachment:
        own = [OWN if layer.window is None else None for layer in attachment.layers]
    assert own.count(None) == 1
    with ph.sparse(model, own):
        expected = steps(model, ids, mask, [LENGTH])
        found = steps(model, ids, mask, [25] + [1] * 15)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with ph.sparse(model, OWN), pytest.raises(ConfigError, match="window of their own"):
        steps(model, ids, mask, [25] + [1] * 15)
