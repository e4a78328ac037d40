"""Gradients of the gates: those of dense attention, written out here, without a cache; finite differences."""

from functools import partial

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from cache.tiny import MODELS, gemma2, llama, qwen3, tokens
from polyhead.cache import duo, per_head
from polyhead.errors import ConfigError, ShapeError, UnsupportedModel
from polyhead.hf import attach

SINK, WINDOW, TEXT = 2, 7, 30


def questions(seed=0):
    """Two continuations of one text, the shorter one filled up; answers of two tokens and of three."""
    answer = torch.zeros(2, 8, dtype=torch.bool)
    answer[0, 5:8] = True
    answer[1, 4:6] = True
    return duo.Questions(tokens(1, TEXT, seed)[0], tokens(2, 8, seed + 50), answer)


def dense_attention(model, gates, call):
    """o = α Full + (1 - α) Short for the rows after the text, with whole rows of weights."""
    repeat = call.layer.heads // call.layer.kv_heads
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (call.k, call.v))
    logits = (call.q @ k.transpose(-1, -2)) * call.scale
    cap = getattr(model.config, "attn_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    size = logits.shape[-1]
    i, j = torch.arange(size)[:, None], torch.arange(size)[None]
    seen = j <= i
    if call.layer.window is not None:
        seen = seen & (i - j < call.layer.window)
    sinks = getattr(model.get_submodule(call.layer.name), "sinks", None)

    def attention(mask):
        found = logits.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            extra = sinks.view(1, -1, 1, 1).expand(*found.shape[:3], 1)
            return torch.cat([found, extra], dim=-1).softmax(-1)[..., :-1] @ v
        return found.softmax(-1) @ v

    full, short = attention(seen), attention(seen & ((j < SINK) | (i - j < WINDOW)))
    alpha = gates[call.layer.index].repeat_interleave(repeat).view(1, -1, 1, 1)
    alpha = torch.where(i >= TEXT, alpha, 1.0)
    return alpha * full + (1 - alpha) * short


def log_probability(model, one, gates):
    """Of all answers together, from whole forward passes without a cache."""
    total = torch.zeros((), dtype=torch.float64)
    handler = partial(dense_attention, model, gates)
    with attach(model) as attachment, attachment.handling(handler):
        for tail, answer in zip(one.tails, one.answer, strict=True):
            said = model(torch.cat([one.text, tail])[None], use_cache=False).logits[0].log_softmax(-1)
            for place in answer.nonzero().flatten().tolist():
                total = total + said[TEXT + place - 1, tail[place]]
    return total


@pytest.mark.parametrize("name", MODELS)
def test_they_are_the_gradients_of_dense_attention(name):
    """Grouped heads, a norm on queries and keys, sliding windows, soft caps, sink logits."""
    model = MODELS[name]()
    asked = [questions(), questions(7)]
    scores = duo.gate_gradients(model, asked, sink=SINK, window=WINDOW)
    assert scores.level == "kv"
    gates = torch.ones(len(scores.widths), scores.widths[0], dtype=torch.float64, requires_grad=True)
    sum(log_probability(model, one, gates) for one in asked).backward()
    expected = (gates.grad / 4).flatten().numpy()
    assert max(abs(expected)) > 1e-3  # there is something to compare
    assert scores.flat == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_they_are_finite_differences():
    """Four steps aside, for the models' norms compute in single precision."""
    model, one, step = qwen3(), questions(), 0.02
    scores = duo.gate_gradients(model, [one], sink=SINK, window=WINDOW)
    for layer, head in scores.pairs:
        expected = 0.0
        for sides, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            gates = torch.ones(3, 3, dtype=torch.float64)
            gates[layer, head] += sides * step
            with torch.no_grad():
                expected += weight * float(log_probability(model, one, gates)) / (12 * step) / 2
        assert scores[layer, head] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_head_that_says_nothing_is_not_needed_and_one_that_sees_all_neither():
    model = llama()
    model.model.layers[1].self_attn.v_proj.weight.data[8:16] = 0.0  # KV head 1 of layer 1
    scores = duo.gate_gradients(model, [questions()], sink=SINK, window=WINDOW)
    assert scores[1, 1] == 0.0
    assert abs(scores.flat).max() > 1e-3
    whole = duo.gate_gradients(model, [questions()], sink=SINK, window=TEXT + 8)
    assert abs(whole.flat).max() < 1e-12
    # a sliding window of 12 of the model's own, of which a head sees no less with a window of 12
    short = duo.gate_gradients(gemma2(), [questions()], sink=SINK, window=12)
    assert abs(short[0]).max() < 1e-12
    assert abs(short[1]).max() > 1e-3


def test_what_fills_up_a_tail_does_not_count_and_answers_count_alike():
    model, one = llama(), questions()
    other = one.tails.clone()
    other[1, 6:] = 5
    scores = duo.gate_gradients(model, [one], sink=SINK, window=WINDOW)
    same = duo.gate_gradients(model, [one._replace(tails=other)], sink=SINK, window=WINDOW)
    assert scores.flat == pytest.approx(same.flat, abs=1e-12)
    parts = [
        duo.gate_gradients(
            model,
            [one._replace(tails=one.tails[k:][:1], answer=one.answer[k:][:1])],
            sink=SINK,
            window=WINDOW,
        )
        for k in range(2)
    ]
    assert scores.flat == pytest.approx((parts[0].flat + parts[1].flat) / 2, abs=1e-12)


def test_the_model_is_given_back_as_it_was_and_the_heads_make_a_cache():
    model = llama().train()
    model.lm_head.weight.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    done = []
    with torch.no_grad():
        scores = duo.gate_gradients(model, [questions()], sink=SINK, window=WINDOW, progress=done.append)
    assert done == [1]
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"
    again = duo.gate_gradients(model, [questions()], sink=SINK, window=WINDOW)
    assert scores == again
    cache = per_head(model, full=scores.top(4), sink=SINK, window=WINDOW)
    assert "4 of 9 KV heads in full" in repr(cache)


def test_half_precision_is_near():
    model, half = llama(), llama().bfloat16()
    scores = duo.gate_gradients(model, [questions()], sink=SINK, window=WINDOW)
    found = duo.gate_gradients(half, [questions()], sink=SINK, window=WINDOW)
    assert scores.correlation(found, "pearson") > 0.9


def test_what_cannot_be_asked_is_said():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=97, **sizes))
    with pytest.raises(UnsupportedModel, match="BertModel has no causal self-attention"):
        duo.gate_gradients(bert, [questions()])
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModel, match="gate_gradients are for decoders.*T5ForConditionalGeneration"):
        duo.gate_gradients(t5, [questions()])
    model, one = llama(), questions()
    with pytest.raises(ConfigError, match="LlamaModel gives no logits"):
        duo.gate_gradients(model.model, [one])
    with pytest.raises(ConfigError, match="questions is empty"):
        duo.gate_gradients(model, [])
    with pytest.raises(ConfigError, match="window >= 1; got 4 and 0"):
        duo.gate_gradients(model, [one], window=0)
    with pytest.raises(ShapeError, match="answer must be bool of the shape of tails"):
        duo.gate_gradients(model, [one._replace(answer=one.answer[:, 1:])])
    with pytest.raises(ShapeError, match=r"text must be token ids \(S,\)"):
        duo.gate_gradients(model, [one._replace(text=one.text[None])])
    with pytest.raises(ConfigError, match="must not begin with one"):
        duo.gate_gradients(model, [one._replace(answer=torch.ones_like(one.answer))])
    with pytest.raises(ConfigError, match="every tail must have tokens of an answer"):
        duo.gate_gradients(model, [one._replace(answer=one.answer & (torch.arange(2) == 1)[:, None])])
    assert model.config._attn_implementation == "sdpa"
