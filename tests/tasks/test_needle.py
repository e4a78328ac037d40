import pytest
import torch

from polyhead.errors import ConfigError
from polyhead.tasks import HELD_OUT_NAMES, NAMES, held_out_text, needle, sample_text, score
from polyhead.tasks.needle import is_right
from polyhead.tasks.texts import sentences
from tasks.tokens import llama, tokenizer


@pytest.fixture(scope="module", params=["chat", "plain", "around"])
def tok(request):
    return tokenizer(chat=request.param == "chat", around=request.param == "around")


def test_a_case_says_where_everything_is(tok):
    for case in needle(sample_text(), tok, lengths=(200, 300), depths=(0.0, 0.5, 1.0), n=2):
        assert case.length - 100 < len(case.ids) <= case.length  # a sentence of filler at most is missing
        text = tok.decode(case.ids[slice(*case.needle)])
        assert text.strip() == f"The secret number of {case.key} is {case.answer}."
        assert tok.decode(case.ids[slice(*case.value)]).strip() == case.answer
        rest = tok.decode(case.ids[case.question :])
        assert f"What is the secret number of {case.key}?" in rest
        assert rest.endswith(f"The secret number of {case.key} is")
        assert tok.decode(case.answer_ids) == " " + case.answer
        whole = tok.decode(case.ids + case.answer_ids)
        assert whole.count(case.answer) == 2


def test_depth_is_where_the_needle_stands(tok):
    cases = needle(sample_text(), tok, lengths=(400,), depths=(0.0, 0.25, 0.5, 0.75, 1.0))
    places = [case.needle[0] / case.question for case in cases]
    assert places == sorted(places)
    for place, depth in zip(places, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        assert abs(place - depth) < 0.2


def test_seeds_decide(tok):
    first, again, other = (needle(sample_text(), tok, lengths=(250,), n=3, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({case.answer for case in first}) == len(first)


def test_several_needles(tok):
    (case,) = needle(sample_text(), tok, lengths=(400,), depths=(0.5,), needles=4)
    text = tok.decode(case.ids[: case.question])
    assert text.count("The secret number of") == 4
    assert text.count(f"The secret number of {case.key} is {case.answer}.") == 1


def test_held_out_shares_nothing():
    assert not set(NAMES) & set(HELD_OUT_NAMES)
    assert not set(sentences(sample_text())) & set(sentences(held_out_text()))
    assert len(sample_text()) > 50_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": (40,)}, "a length of 40 tokens has no room for 1 needles and the question"),
        ({"depths": (1.5,)}, "depths must lie in 0..1"),
        ({"depths": ()}, "at least one case"),
        ({"n": 0}, "at least one case"),
        ({"needles": 3, "keys": ("Ada", "Boris")}, "between 1 and the number of keys, 2; got 3"),
    ],
)
def test_impossible_needles_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        needle(sample_text(), tokenizer(), **arguments)


def test_texts_without_words_and_slow_tokenizers_are_refused():
    with pytest.raises(ConfigError, match="holds no words"):
        needle(" \n ", tokenizer())
    with pytest.raises(ConfigError, match="fast tokenizer, .* got object"):
        needle("A text.", object())


def test_short_texts_are_used_again():
    (case,) = needle("One sentence only.", tokenizer(), lengths=(300,), depths=(0.5,))
    assert len(case.ids) > 290


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 48213.", True),
        ("48213 is it", True),
        (" The number is 48213", True),
        (" 482134", False),
        (" 4821", False),
        (" 1. 48213", False),
        (" none", False),
        ("", False),
    ],
)
def test_what_counts_as_right(text, right):
    assert is_right(text, "48213") is right


def test_score_is_what_generate_says():
    tok, model = tokenizer(chat=True), llama()
    cases = needle(sample_text(), tok, lengths=(150,), depths=(0.2, 0.8))
    found = score(model, tok, cases)
    assert found.accuracy == 0
    for result in found.results:
        ids = torch.tensor([result.case.ids])
        steps = len(result.case.answer_ids) + 2
        said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps)
        assert result.text == tok.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert repr(found) == "NeedleScore(accuracy=0, 0 of 2 right)"


def test_every_case_gets_a_fresh_cache():
    from transformers import DynamicCache

    tok, model, made, steps = tokenizer(), llama(), [], []
    cases = needle(sample_text(), tok, lengths=(150,), depths=(0.2, 0.8))

    def factory():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    with_cache = score(model, tok, cases, factory, progress=lambda *step: steps.append(step))
    assert len(made) == 2
    assert [c.get_seq_length() for c in made] == [len(c.ids) + len(c.answer_ids) + 1 for c in cases]
    assert [r.text for r in with_cache.results] == [r.text for r in score(model, tok, cases).results]
    assert steps == [(1, 2), (2, 2)]


def test_a_model_that_knows_scores_one():
    """The bigram table of the right answers, as a model."""
    tok = tokenizer()
    (case,) = needle(sample_text(), tok, lengths=(200,), depths=(0.5,))
    model = llama()
    says = iter([*case.answer_ids, 5, 5])

    def forced(module, arguments, out):
        out.logits[:] = 0
        if out.logits.shape[1] == 1 and module.steps:
            out.logits[..., next(says)] = 1
        module.steps += 1
        return out

    model.steps = 0
    model.register_forward_hook(forced)
    assert score(model, tok, [case]).accuracy == 1
