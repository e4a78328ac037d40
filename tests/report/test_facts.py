"""Hidden facts: where they stand, and what counts as an answer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from polyhead.cache.duo import gate_gradients
from polyhead.errors import ConfigError
from polyhead.report.facts import CHOOSING, STOCK, Asked, Hidden, answered, hide, questions
from polyhead.tasks import NAMES, held_out_text, needle, sample_text
from report import small_models


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = small_models.llama(tmp_path_factory.mktemp("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, AutoTokenizer.from_pretrained(folder)


def hidden(tokenizer, seed=0, **changes):
    ids = tokenizer(held_out_text())["input_ids"]
    return hide(tokenizer, ids, STOCK, **{"length": 400, "count": 4, "unseen": 100, "seed": seed, **changes})


def test_facts_stand_where_they_say_and_before_what_is_seen(pair):
    _, tokenizer = pair
    made = hidden(tokenizer)
    assert len(made.text) == 400
    assert len(made.asked) == 4
    for one in made.asked:
        start, stop = one.place
        assert tokenizer.decode(made.text[start:stop]).strip() == one.statement
        assert stop <= 300
        said = tokenizer.decode(one.tail[-one.answer :])
        assert f" {said.strip()}" in one.statement
        assert said.strip().isdigit()
        assert len(said.strip()) == 5
    starts = [one.place[0] for one in made.asked]
    assert starts == sorted(starts)
    assert starts[-1] > 150  # spread over the text


def test_the_same_seed_gives_the_same_facts_and_another_one_others(pair):
    _, tokenizer = pair
    assert hidden(tokenizer) == hidden(tokenizer)
    one, other = hidden(tokenizer), hidden(tokenizer, seed=1)
    assert not {a.statement for a in one.asked} & {a.statement for a in other.asked}


def test_what_chooses_heads_and_what_caches_are_tried_on_have_nothing_in_common(pair):
    _, tokenizer = pair
    assert not set(NAMES) & set(STOCK.names)
    assert not set(CHOOSING.names) & set(STOCK.names)
    assert not _nouns(CHOOSING) & _nouns(STOCK)
    case = needle(sample_text(), tokenizer, lengths=(300,), depths=(0.5,))[0]
    fact = tokenizer.decode(case.ids[slice(*case.needle)])
    assert not any(kind.begin.split(" {name}")[0] in fact for kind in STOCK.kinds)
    assert not set(sample_text().split("\n\n")) & set(held_out_text().split("\n\n"))


COMMON = "the of in is have with near for has was to which how many what does do did"


def _nouns(stock):
    """What the facts are about: their words, without those that all sentences have."""
    told = (
        f"{kind.begin} {kind.end} {kind.question}".replace("{name}", "").replace("?", "")
        for kind in stock.kinds
    )
    return {word for text in told for word in text.lower().split()} - set(COMMON.split())


def test_facts_as_questions_say_what_the_answers_are(pair):
    model, tokenizer = pair
    made = hidden(tokenizer)
    text, tails, answer = questions(made)
    assert text.tolist() == list(made.text)
    for row, where, one in zip(tails, answer, made.asked, strict=True):
        assert tuple(row[: len(one.tail)].tolist()) == one.tail
        assert row[where].tolist() == list(one.tail[-one.answer :])
    scores = gate_gradients(model, [questions(made)], window=100)
    assert abs(scores.flat).max() > 0


def test_too_little_room_is_said(pair):
    _, tokenizer = pair
    with pytest.raises(ConfigError, match="a text of 150 tokens has no room for 4 facts before its last 100"):
        hidden(tokenizer, length=150)


def test_a_chat_template_is_used(pair):
    _, tokenizer = pair
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<bot>"
    try:
        made = hidden(tokenizer)
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(made.text).startswith("<user>")
    assert "?</user><bot>The " in tokenizer.decode(made.asked[0].tail)


def test_answers_are_those_of_greedy_decoding(pair):
    """An answer that greedy decoding gives counts; with any other token in it, it does not."""
    model, tokenizer = pair
    made = hidden(tokenizer)
    asked = []
    for k, one in enumerate(made.asked):
        tail = one.tail[: len(one.tail) - one.answer]
        prompt = torch.tensor([made.text + tail])
        said = model.generate(prompt, max_new_tokens=4 + k, min_new_tokens=4 + k, do_sample=False)[
            0, prompt.shape[1] :
        ]
        asked.append(Asked(one.statement, tail + tuple(said.tolist()), 4 + k, one.place))
    with torch.no_grad():
        right = answered(model, Hidden(made.text, tuple(asked)), DynamicCache(config=model.config))
        assert right == [True] * 4
        for at in (-1, -2, -4):
            tail = list(asked[1].tail)
            tail[at] = (tail[at] + 1) % 600
            wrong = [asked[0], Asked("", tuple(tail), asked[1].answer, (5, 9)), *asked[2:]]
            found = answered(model, Hidden(made.text, tuple(wrong)), DynamicCache(config=model.config))
            assert found == [True, False, True, True]
