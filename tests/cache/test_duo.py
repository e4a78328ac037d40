"""DuoAttention: what its gates promise, and what its caches do."""

import itertools

import pytest
import torch

from cache.tiny import gemma2, llama, tokens
from polyhead.attend.masks import sink, window
from polyhead.cache import duo, per_head
from polyhead.errors import ConfigError
from polyhead.hf import attach


class Words:
    """A tokenizer of the words of a text."""

    bos_token_id = 1

    def __init__(self):
        self.known = {}

    def __call__(self, text, **_):
        return {"input_ids": [self.known.setdefault(word, 2 + len(self.known)) for word in text.split()]}


def repeated(length=24, seed=0):
    """The same tokens twice; what counts is the second half."""
    for n in itertools.count(seed):
        ids = tokens(1, length, seed=n).repeat(1, 2)
        yield duo.Sample(ids, (torch.arange(2 * length) >= length)[None])


def test_gates_of_one_leave_the_model_as_it_is():
    model, seen = llama(), []
    duo.gates(model, repeated(), steps=1, sink=1, window=4, progress=lambda *told: seen.append(told))
    assert seen == [(1, 1, 0.0, 1.0)]


def test_short_samples_are_exact_for_any_gates():
    model, seen = llama(), []
    duo.gates(model, repeated(), steps=1, sink=8, window=40, initial=0.3, progress=lambda *t: seen.append(t))
    assert seen[0][2] < 1e-20


def test_gradients_reach_only_the_gates_and_the_model_is_given_back():
    model = llama().train()
    model.lm_head.weight.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen = []
    scores = duo.gates(
        model, repeated(), steps=3, sink=1, window=4, initial=0.8, progress=lambda *told: seen.append(told)
    )
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"
    assert [told[0] for told in seen] == [1, 2, 3]
    assert all(told[2] > 0 for told in seen)
    assert any(value != 0.8 for value in scores.flat)


def test_the_mixture_is_that_of_the_two_attentions():
    """One layer: the distance is that of attention outputs, mixed by hand."""
    model = llama()
    model.model.layers = model.model.layers[:1]
    sample = next(repeated())
    outputs = {}

    def handler(mask):
        def answer(call):
            found = call.proceed() if mask is None else call.replace(mask=call.mask & mask).proceed()
            outputs[mask is None] = found
            return found

        return answer

    hidden = {}
    with attach(model) as attachment, torch.no_grad():
        for mask in (None, window(3) | sink(1)):
            with attachment.handling(handler(mask)):
                model.model(sample.ids)
        mixed = 0.25 * outputs[True] + 0.75 * outputs[False]
        for name, answer in (("full", outputs[True]), ("mixed", mixed)):
            with attachment.handling(lambda call, answer=answer: answer):
                hidden[name] = model.model(sample.ids).last_hidden_state[sample.counted]
    expected = float((hidden["full"] - hidden["mixed"]).square().mean())
    seen = []
    duo.gates(
        model, [sample], steps=1, sink=1, window=4, initial=0.25, progress=lambda *told: seen.append(told)
    )
    assert seen[0][2] == pytest.approx(expected, rel=1e-5)


def test_gates_close_where_nothing_far_away_matters():
    """A penalty without a distance to pay closes gates; a distance keeps those open that matter."""
    model = llama()
    easy = [duo.Sample(tokens(1, 12), torch.ones(1, 12, dtype=torch.bool))] * 30
    closed = duo.gates(model, easy, steps=30, sink=1, window=16, lr=0.1, penalty=1.0)
    assert max(closed.flat) < 0.2
    model.model.layers[1].self_attn.v_proj.weight.data[8:16] = 0.0  # KV head 1 of layer 1 says nothing
    scores = duo.gates(model, repeated(), steps=20, sink=1, window=2, lr=0.1, penalty=1e-4)
    assert scores[1, 1] < 0.5
    assert (1, 1) not in scores.top(4)
    assert scores.level == "kv"


def test_passkeys():
    tokenizer = Words()
    text = " ".join(f"hay{n}" for n in range(300))
    first, second = itertools.islice(duo.passkeys(tokenizer, text, length=200, count=3, words=4), 2)
    again = next(duo.passkeys(tokenizer, text, length=200, count=3, words=4))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, second.ids)
    assert first.ids.shape == (1, 200)
    assert int(first.counted.sum()) == 3 * 4
    known = {number: word for word, number in tokenizer.known.items()}
    words = [known.get(number, "") for number in first.ids[0].tolist()]
    answers = [words[place + 1] for place in first.counted[0].nonzero().flatten().tolist()]
    for n, ordinal in enumerate(["first", "second", "third"]):
        place = words.index(ordinal)
        told = words[place + 5 : place + 9]
        assert [word.rstrip(".") for word in told] == answers[4 * n : 4 * n + 4]


def test_what_cannot_be_done_is_said():
    model = llama()
    with pytest.raises(ConfigError, match="samples ended after 1 of 2 steps"):
        duo.gates(model, [next(repeated())], steps=2)
    with pytest.raises(ConfigError, match="steps >= 1"):
        duo.gates(model, repeated(), steps=0)
    with pytest.raises(ConfigError, match="counted must be bool"):
        duo.gates(model, [duo.Sample(tokens(1, 9), torch.zeros(1, 9, dtype=torch.bool))], steps=1)
    with pytest.raises(ConfigError, match="leave -?[0-9]+ of 60 tokens"):
        next(duo.passkeys(Words(), "hay " * 500, length=60, count=4))
    assert model.config._attn_implementation == "sdpa"


def test_streaming_heads_never_hold_more_than_sinks_and_window():
    model, ids = gemma2(), tokens(2, 50)
    cache = per_head(
        model, full=[[False] * 3, [True] * 3, [False, True, False]], sink=3, window=8, prefill="dense"
    )
    with torch.no_grad():
        for start, stop in [(0, 20), (20, 21), (21, 40), (40, 41), (41, 50)]:
            model(ids[:, start:stop], past_key_values=cache)
            held = cache.held()
            assert max(held[0]) <= 11  # in a layer with a window of 12 of the model's own
            assert held[1] == [stop] * 3
            assert held[2][0] <= 11
            assert held[2][1] <= 12
    assert cache.get_seq_length() == 50


def test_heads_in_another_order_are_the_same_model():
    """The paper reorders heads so that full ones come first; weights that move along change nothing."""
    model, other = llama(), llama()
    ids, order = tokens(1, 40), [2, 0, 1]
    queries = [h * 2 + r for h in order for r in range(2)]
    for layer in other.model.layers:
        attention = layer.self_attn
        for projection, heads in (
            (attention.q_proj, queries),
            (attention.k_proj, order),
            (attention.v_proj, order),
        ):
            weight = projection.weight.data.view(len(heads), 8, 48)
            projection.weight.data = weight[heads].reshape(-1, 48)
        out = attention.o_proj.weight.data.view(48, 6, 8)
        attention.o_proj.weight.data = out[:, queries].reshape(48, 48)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
        rows = [[True, False, False], [False, True, False], [True, False, True]]
        cache = per_head(model, full=rows, sink=3, window=8)
        moved = per_head(other, full=[[row[h] for h in order] for row in rows], sink=3, window=8)
        expected = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(other(ids, past_key_values=moved).logits, expected)
