"""One reading of a text for all choices of heads: the same answers as a reading for each."""

import dataclasses

import pytest
import torch
import transformers as t

from polyhead.report import facts
from polyhead.report.effort import Effort
from polyhead.report.trying import Choice, Trial
from report import small_models

CHOICES = [
    Choice("full", None),
    Choice("retrieval", ((0, 0), (0, 1), (1, 0), (1, 1))),
    Choice("retrieval", ((0, 1), (1, 0))),
    Choice("retrieval", ((1, 1),)),
    Choice("retrieval", ()),
    Choice("random", ((0, 0), (1, 0)), 0),
]


def trial(config, kind):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # that answers depend on the text
    effort = dataclasses.replace(Effort(), window=96, facts=4, texts=2, random_texts=1, length=400)
    return Trial(model, small_models.tokenizer(), effort)


SIZES = {
    **small_models.SIZES,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WINDOWS = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
MODELS = {
    "llama": (lambda: t.LlamaConfig(**SIZES), t.LlamaForCausalLM, True),
    "qwen3": (lambda: t.Qwen3Config(**SIZES, head_dim=8), t.Qwen3ForCausalLM, True),
    "gemma2": (lambda: t.Gemma2Config(**SIZES, **WINDOWS), t.Gemma2ForCausalLM, False),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    config, kind, shared = MODELS[request.param]
    return trial(config(), kind), shared


def logits(trial, hidden, choice, rows):
    """What the model says to question and answer, with the cache filled by `rows`, or by reading."""
    seen = []
    hook = trial.model.register_forward_hook(lambda _, __, out: seen.append(out.logits))
    cache = trial._maker(choice.heads)()
    with torch.no_grad():
        if rows is None:
            facts.read(trial.model, hidden, cache)
        else:
            for layer, (k, v) in enumerate(rows):
                cache.update(k, v, layer)
        facts.ask(trial.model, hidden, cache)
    hook.remove()
    held = cache.held() if hasattr(cache, "held") else None
    if held:
        cache.detach()
    return seen[-1], held


def test_a_text_that_is_read_once_says_what_one_read_for_each_choice_says(case):
    trial, shared = case
    assert trial.reads_once is shared
    if not shared:  # a sliding window of the model's own: read anew for each choice
        return
    hidden = trial.texts("curve")[0]
    with torch.no_grad():
        rows = trial._read(hidden)
    said = []
    for choice in CHOICES:
        (found, held), (expected, as_read) = (
            logits(trial, hidden, choice, rows),
            logits(trial, hidden, choice, None),
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert held == as_read
        said.append(expected)
    # the choices differ by far more than that, and none has changed the rows for the next
    for other in said[2:5]:
        assert float((other - said[0]).abs().max()) > 1e-2
    again, _ = logits(trial, hidden, CHOICES[0], rows)
    torch.testing.assert_close(again, said[0], rtol=1e-4, atol=1e-4)


def own_answers(trial):
    """The facts' answers replaced by what the model itself says, which some caches keep and others lose."""
    texts = []
    for hidden in trial.texts("curve"):
        asked = []
        for one in hidden.asked:
            prompt = torch.tensor([hidden.text + one.tail[: -one.answer]])
            said = trial.model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            tail = one.tail[: -one.answer] + tuple(said[0, -3:].tolist())
            asked.append(dataclasses.replace(one, tail=tail, answer=3))
        texts.append(dataclasses.replace(hidden, asked=tuple(asked)))
    return texts


def test_answers_are_those_of_a_reading_for_each_choice(case, monkeypatch):
    trial, shared = case
    texts = own_answers(trial)
    reads = []
    read = facts.read
    monkeypatch.setattr(facts, "read", lambda *a: (reads.append(a[1]), read(*a)))
    found = trial.answers(texts, CHOICES)
    assert len(reads) == (2 if shared else 2 * 5 + 1)
    expected = []
    for choice in CHOICES:
        some = texts[:1] if choice.policy == "random" else texts
        answers = []
        for hidden in some:
            cache = trial._maker(choice.heads)()
            with torch.no_grad():
                answers += facts.answered(trial.model, hidden, cache)
            if choice.heads is not None:
                cache.detach()
        expected.append(tuple(answers))
    assert found == expected
    assert found[0] == found[1] == (True,) * 8
    assert not all(found[4])
