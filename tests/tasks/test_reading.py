import pytest
import torch

from hf import tiny
from polyhead.errors import ConfigError
from polyhead.tasks.reading import context_length, encode, texts
from tasks.tokens import llama, tokenizer


def test_cutting_keeps_the_special_tokens():
    tok = tokenizer(around=True)
    whole = encode(tok, "Assignments to names are illegal.")
    cut = encode(tok, "Assignments to names are illegal.", 8)
    assert len(cut) == 8
    assert cut[0] == whole[0]
    assert cut[-1] == whole[-1]
    assert torch.equal(cut[:-1], whole[:7])
    assert torch.equal(encode(tok, "a", 8), encode(tok, "a"))


def test_texts_are_checked_before_they_are_read():
    (ids,) = texts(llama(), tokenizer(), "Assignments to names are illegal. " * 9, 12)
    assert len(ids) == 12
    for length, message in (
        (1, "at least 2; got 1"),
        ("9", "got '9'"),
        (2000, "longer than the 1024 tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            texts(llama(), tokenizer(), "some text", length)
    with pytest.raises(ConfigError, match="the text has 0 tokens"):
        texts(llama(), tokenizer(), "", None)
    with pytest.raises(ConfigError, match="must be a string or several"):
        texts(llama(), tokenizer(), [], None)


def test_context_lengths_that_configs_name():
    import transformers as t

    assert context_length(tiny.llama()) == 64
    assert context_length(tiny.DECODERS["gpt2"]()) == 1024
    assert context_length(tiny.vit()) is None
    config = t.RobertaConfig(**tiny.SIZES | {"pad_token_id": 1})
    assert context_length(t.RobertaModel(config)) == 62  # its positions begin after the padding index
    assert context_length(tiny.t5()) is None
