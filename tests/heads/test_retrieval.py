import numpy as np
import pytest
import torch

from hf.tiny import eager
from polyhead.errors import ConfigError
from polyhead.heads import copy_scores, profile, retrieval, retrieval_mass, retrieval_score
from polyhead.heads.retrieval import _copied
from polyhead.tasks import needle, sample_text
from tasks.tokens import llama, tokenizer


@pytest.fixture(scope="module")
def tok():
    return tokenizer(chat=True)


@pytest.fixture(scope="module")
def cases(tok):
    return needle(sample_text(), tok, lengths=(150, 230), depths=(0.2, 0.7), seed=4)


def mass(model, cases):
    """The definition, from the weights of transformers' eager attention."""
    eager(model)
    rows = []
    for case in cases:
        with torch.no_grad():
            weights = model(
                torch.tensor([case.ids + case.answer_ids[:-1]]), output_attentions=True
            ).attentions
        for i in range(len(case.ids) - 1, len(case.ids) + len(case.answer_ids) - 1):
            rows.append([w[0, :, i, slice(*case.needle)].sum(-1).tolist() for w in weights])
    return np.mean(rows, 0)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_mass_equals_its_definition(cases, batch):
    found = retrieval_mass(llama(), cases, batch=batch)
    np.testing.assert_allclose(np.stack(found.values), mass(llama(), cases), rtol=1e-3, atol=1e-6)
    assert found.kv_groups == (2, 2)


def test_mass_with_sliding_windows():
    """What a window's cache has dropped is not looked at, and positions still mean the same."""
    import transformers as t

    torch.manual_seed(0)
    tok = tokenizer()
    sizes = dict(llama().config.to_dict(), sliding_window=60, model_type="mistral")
    model = t.MistralForCausalLM(t.MistralConfig(**sizes)).eval()
    cases = needle(sample_text(), tok, lengths=(200,), depths=(0.1, 0.9), seed=4)
    found = retrieval_mass(model, cases)
    np.testing.assert_allclose(np.stack(found.values), mass(model, cases), rtol=1e-3, atol=1e-6)


def test_order_of_the_cases_does_not_matter(cases):
    a, b = (retrieval_mass(llama(), c) for c in (cases, cases[::-1]))
    np.testing.assert_allclose(a.flat, b.flat, rtol=1e-6)


def test_profile_measures_it(tok):
    found = profile(llama(), tok, length=100)
    cases = needle(sample_text(), tok, lengths=(512,), depths=(0.1, 0.4, 0.7), seed=0)
    np.testing.assert_allclose(found["retrieval"].flat, retrieval_mass(llama(), cases).flat, rtol=1e-4)
    assert {"induction", "duplicate_token", "retrieval"} <= set(found)


def places(model, ids, steps):
    """Greedy generation and each head's most attended position, from eager attention over everything."""
    eager(model)
    best, said = [], []
    for _ in range(steps):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True)
        best.append([w[0, :, -1].argmax(-1).tolist() for w in out.attentions])
        said.append(int(out.logits[0, -1].argmax()))
        ids = (*ids, said[-1])
    return np.array(best), said


@pytest.mark.parametrize("batch", [1, 4])
def test_copying_equals_its_definition(cases, tok, batch, monkeypatch):
    monkeypatch.setattr(retrieval, "is_right", lambda text, answer: True)
    expected = np.zeros((2, 4))
    often = np.zeros((2, 4))
    for case in cases:
        best, said = places(llama(), case.ids, len(case.answer_ids) + 2)
        answer = set(case.answer_ids) & set(case.ids[slice(*case.needle)])
        for layer in range(2):
            for head in range(4):
                copied = {
                    w
                    for j, w in zip(best[:, layer, head], said, strict=True)
                    if case.needle[0] <= j < case.needle[1] and case.ids[j] == w
                }
                expected[layer, head] += len(copied & answer) / len(answer) / len(cases)
                often[layer, head] += bool(copied & answer) / len(cases)
    found = copy_scores(llama(), tok, cases, batch=batch)
    np.testing.assert_allclose(np.stack(found.score.values), expected)
    np.testing.assert_allclose(np.stack(found.frequency.values), often)
    assert (found.kept, found.runs) == (4, 4)


def test_a_head_that_always_looks_at_what_is_said_scores_one(cases):
    case = cases[0]
    said = torch.tensor(case.answer_ids)
    where = [case.ids.index(w, case.needle[0]) for w in case.answer_ids]
    elsewhere = [0] * len(where)
    steps = [torch.tensor([[[a], [b]]]) for a, b in zip(where, elsewhere, strict=True)]
    assert _copied(steps, said, 0, 0, case).tolist() == pytest.approx([1.0, 0.0])
    shifted = [s + 3 for s in steps]  # the same in a batch where this case is padded
    assert _copied(shifted, said, 0, 3, case).tolist() == pytest.approx([1.0, 0.0])
    wrong = torch.full_like(said, 7)
    assert _copied(steps, wrong, 0, 0, case).tolist() == [0.0, 0.0]


def test_wrong_answers_do_not_count(cases, tok):
    found = copy_scores(llama(), tok, cases)  # a random model knows nothing
    assert found.kept == 0
    assert np.isnan(found.score.flat).all()
    assert np.isnan(retrieval_score(llama(), tok, cases[:1]).flat).all()


def test_bad_values_are_refused(cases, tok):
    with pytest.raises(ConfigError, match="cases is empty"):
        retrieval_mass(llama(), [])
    with pytest.raises(ConfigError, match="batch must be at least 1, got 0"):
        retrieval_mass(llama(), cases, batch=0)
    with pytest.raises(ConfigError, match="top must be at least 1, got 0"):
        copy_scores(llama(), tok, cases, top=0)
