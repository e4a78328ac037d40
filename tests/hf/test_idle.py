"""Attached and idle, a model computes what its own eager attention computes."""

import pytest
import torch
import transformers as t

from hf.tiny import DECODERS, LENGTH, bert, eager, llama, padding, t5, tokens, vit, whisper
from polyhead.hf import attach

CLOSE = {"atol": 3e-5, "rtol": 1e-5}


@torch.no_grad()
def both(model, run):
    """What `run(model)` gives with eager attention and attached; every layer must have been asked."""
    expected = run(eager(model))
    asked = set()

    def note(call):
        asked.add(call.layer.index)
        sizes = (call.layer.heads, call.layer.kv_heads, call.layer.head_dim)
        assert (call.q.shape[1], call.k.shape[1], call.q.shape[3]) == sizes
        return call.proceed()

    with attach(model, handler=note) as attachment:
        got = run(model)
    assert asked == {layer.index for layer in attachment.layers}
    assert expected.std() > 0.3
    return got, expected


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_with_padding(name, side):
    mask = padding(side)
    got, expected = both(DECODERS[name](), lambda m: m(tokens(), attention_mask=mask, use_cache=False).logits)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "gpt2"])
def test_packed_sequences(name):
    model = DECODERS[name]()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    got, expected = both(model, lambda m: m(tokens(1), position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(got, expected, **CLOSE)
    if name == "gpt_oss":
        return  # transformers' GPT-OSS takes no notice of packing
    with attach(model), torch.no_grad():
        alone = model(tokens(1)[:, 5:], use_cache=False).logits
    torch.testing.assert_close(got[:, 5:], alone, **CLOSE)


def in_steps(model, cache, steps, mask):
    """Logits of the whole sequence, fed in pieces."""
    found, at = [], 0
    for step in steps:
        seen = None if mask is None else mask[:, : at + step]
        positions = None if mask is None else (seen.cumsum(-1) - 1).clamp(min=0)[:, at:]
        out = model(
            tokens()[:, at : at + step], attention_mask=seen, position_ids=positions, past_key_values=cache()
        )
        found.append(out.logits)
        at += step
    return torch.cat(found, 1)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("steps", [[12], [5, 1, 1, 1, 1, 1, 1, 1], [5, 3, 1, 1, 2]], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_cached_in_steps_and_chunks(name, steps, kind, side):
    model, mask = DECODERS[name](), padding(side)

    def run(m):
        cache = (
            t.DynamicCache(config=m.config)
            if kind == "dynamic"
            else t.StaticCache(config=m.config, max_cache_len=16)
        )
        return in_steps(m, lambda: cache, steps, mask)

    got, expected = both(model, run)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_double_precision_agrees_to_rounding(name, side):
    # eager rounds its softmax to float32, transformers' sdpa does not
    model, mask = DECODERS[name]().double(), padding(side)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(tokens(), attention_mask=mask, use_cache=False).logits
        with attach(model):
            got = model(tokens(), attention_mask=mask, use_cache=False).logits
    tolerance = 1e-6 if name != "gpt2" else 1e-12  # rotary angles and RMS norms are float32 in the others
    torch.testing.assert_close(got[real], expected[real], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_bfloat16_is_no_worse_than_eager(name):
    model = DECODERS[name]()
    with torch.no_grad():
        truth = eager(model)(tokens(), use_cache=False).logits
        model.to(torch.bfloat16)
        theirs = model(tokens(), use_cache=False).logits.float()
        with attach(model):
            ours = model(tokens(), use_cache=False).logits.float()
    assert (ours - truth).abs().mean() < 1.2 * (theirs - truth).abs().mean()


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bert(side):
    mask = padding(side)
    got, expected = both(bert(), lambda m: m(tokens(), attention_mask=mask).last_hidden_state)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


@pytest.mark.parametrize("side", ["none", "right"])
def test_a_decoder_used_in_both_directions(side):
    model, mask = llama(), padding(side)
    model.config.is_causal = False
    got, expected = both(model, lambda m: m(tokens(), attention_mask=mask, use_cache=False).logits)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)
    with attach(model) as attachment:
        assert [layer.kind for layer in attachment.layers] == ["encoder", "encoder"]


def test_vit():
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    got, expected = both(vit(), lambda m: m(pixels).last_hidden_state)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_t5_with_its_position_bias(side):
    model = t5()
    mask = padding(side)
    got, expected = both(
        model,
        lambda m: m(tokens(), attention_mask=mask, decoder_input_ids=tokens(2, 7), use_cache=False).logits,
    )
    torch.testing.assert_close(got, expected, **CLOSE)
    with attach(model) as attachment:
        kinds = [layer.kind for layer in attachment.layers]
    assert kinds == ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]


def test_whisper():
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    got, expected = both(
        whisper(), lambda m: m(sound, decoder_input_ids=tokens(2, 7), use_cache=False).logits
    )
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_eager(name):
    model, mask = DECODERS[name](), padding("left")
    labels = tokens().masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # foretold by the last token of padding

    def gradients(m):
        m.zero_grad()
        m(tokens(), labels=labels, attention_mask=mask, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if "self_attn" in n}

    expected = gradients(eager(model))
    with attach(model):
        got = gradients(model)
    for name_, gradient in expected.items():
        torch.testing.assert_close(got[name_], gradient, atol=1e-5, rtol=1e-3)


def test_a_written_out_mask_of_the_user():
    model = llama()
    banded = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-3)[None, None].expand(2, 1, -1, -1)
    added = torch.zeros(banded.shape).masked_fill(~banded, torch.finfo(torch.float32).min)
    got, expected = both(model, lambda m: m(tokens(), attention_mask=added, use_cache=False).logits)
    torch.testing.assert_close(got, expected, **CLOSE)
    with attach(model), torch.no_grad():
        as_bools = model(tokens(), attention_mask=banded, use_cache=False).logits
    torch.testing.assert_close(as_bools, expected, **CLOSE)


def test_a_written_out_bias_of_the_user():
    bias = torch.randn(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    bias = bias.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    got, expected = both(llama(), lambda m: m(tokens(), attention_mask=bias, use_cache=False).logits)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_gradient_of_a_position_bias():
    model, ids = t5(), tokens(2, 200)  # several strips

    def gradients(m):
        m.zero_grad()
        m(input_ids=ids, labels=ids).loss.backward()
        stacks = (m.encoder, m.decoder)
        return [s.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.clone() for s in stacks]

    expected = gradients(eager(model))
    with attach(model):
        got = gradients(model)
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_gradient_checkpointing():
    model = llama().train()

    def gradient(m):
        m.zero_grad()
        m(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return m.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient(eager(model))
    model.gradient_checkpointing_enable()
    with attach(model):
        torch.testing.assert_close(gradient(model), expected, atol=1e-5, rtol=1e-3)
