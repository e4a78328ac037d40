"""Loading by name, folder, file and hub id; every bad name ends in one clear line."""

import json

import pytest
import torch
import transformers as t

from hf.tiny import SIZES, llama, make, vit
from polyhead.errors import ConfigError, UnknownName
from polyhead.hf import Loaded, attach, gguf, load
from polyhead.hf.loading import _from_hub


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return t.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def saved(tmp_path, model, tokenizer=None):
    model.save_pretrained(tmp_path / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder(tmp_path, tokenizer):
    model = llama()
    folder = saved(tmp_path, model, tokenizer)
    loaded = load(folder)
    assert isinstance(loaded, Loaded)
    assert type(loaded.model) is t.LlamaForCausalLM
    assert not loaded.model.training
    assert loaded.tokenizer("a b")["input_ids"] == [1, 2]
    for ours, theirs in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with attach(loaded.model):
        pass
    assert load(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_the_class_that_was_saved_comes_back(tmp_path):
    folder = saved(tmp_path, make(t.LlamaForSequenceClassification, t.LlamaConfig(**SIZES)))
    assert type(load(folder).model) is t.LlamaForSequenceClassification


def test_a_model_without_a_tokenizer(tmp_path):
    model, tokenizer = load(saved(tmp_path, vit()))
    assert type(model) is t.ViTModel
    assert tokenizer is None


def test_what_is_there_passes_through(tmp_path, tokenizer):
    model = llama().train()
    assert load((model, tokenizer)) == (model, tokenizer)
    assert model.training
    with pytest.raises(ConfigError, match=r"pair \(model, tokenizer\), got a tuple of 3"):
        load((model, tokenizer, 1))
    found = load(load(saved(tmp_path, model, tokenizer)).model)  # a model knows the folder it came from
    assert found.tokenizer("b")["input_ids"] == [2]
    with pytest.raises(ConfigError, match="does not say where its tokenizer is"):
        load(model)


def test_progress_bars_are_shown_again_afterwards(tmp_path):
    from transformers.utils import logging

    logging.enable_progress_bar()
    load(saved(tmp_path, llama()))
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("smolm2", UnknownName, "no model is called 'smolm2'; did you mean 'smollm2'"),
        ("./nowhere", UnknownName, "there is no file or folder 'nowhere'"),
        ("models/it.gguf", UnknownName, "there is no file or folder 'models/it.gguf'"),
        ("", ConfigError, "source must be a name, a path, a model or a pair"),
        (7, ConfigError, "source must be a name, a path, a model or a pair .* got 7"),
    ],
)
def test_bad_names(source, error, message):
    with pytest.raises(error, match=message) as told:
        load(source)
    assert "\n" not in str(told.value)


def test_bad_folders(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json, so it is no model; give a folder"):
        load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="load one of its GGUF files by name, such as .*model.gguf"):
        load(tmp_path)
    folder = saved(tmp_path, llama())
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="transformers cannot load the folder .*model'"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(ConfigError, match="transformers cannot load the folder") as told:
        load(folder)
    assert "\n" not in str(told.value)


DAMAGES = [
    ("tokenizer.json", "", "Expecting value: line 1 column 1"),
    ("tokenizer.json", '{"added_tokens": [], "model": {"type": "none"}}', "data did not match any variant"),
    ("tokenizer_config.json", '{"tokenizer_class', "Unterminated string"),
    ("tokenizer_config.json", "[]", "'list' object has no attribute"),
]


@pytest.mark.parametrize(("file", "content", "reason"), DAMAGES)
def test_a_tokenizer_that_is_damaged(tmp_path, tokenizer, file, content, reason):
    model = llama()
    folder = saved(tmp_path, model, tokenizer)
    whole = load(folder).model
    (folder / file).write_text(content)
    for source in (folder, whole):
        with pytest.raises(ConfigError, match=r"cannot read the tokenizer in the folder .*model'") as told:
            load(source)
        assert "(tokenizer.json, tokenizer_config.json): " + reason in str(told.value)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("file", ["vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model"])
def test_part_of_a_tokenizer_is_not_taken_for_none(tmp_path, file):
    folder = saved(tmp_path, llama())
    (folder / file).write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=rf"cannot read the tokenizer in the folder .*model' \({file}\): "):
        load(folder)


def test_files_that_are_no_gguf(tmp_path, home):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match="notes.txt' is not a GGUF file"):
        load(tmp_path / "notes.txt")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ConfigError, match="transformers cannot load the GGUF file .*cut.gguf"):
        load(tmp_path / "cut.gguf")
    assert not list((home / "converted").glob("cut*/"))


def test_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr("polyhead.hf.loading._hub_may_answer", lambda: False)
    with pytest.raises(UnknownName, match="no model 'some-org/some-model': .* check the name") as told:
        _from_hub("some-org/some-model", torch.float32)
    assert "\n" not in str(told.value)


@pytest.fixture
def cached(tmp_path, monkeypatch, tokenizer):
    """The snapshot of "org/words" in a cache of the hub, which does not answer."""
    monkeypatch.setattr("polyhead.hf.loading._hub_may_answer", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder, commit = tmp_path / "hub" / "models--org--words", 40 * "a"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    llama().save_pretrained(folder / "snapshots" / commit)
    tokenizer.save_pretrained(folder / "snapshots" / commit)
    return folder / "snapshots" / commit


def test_a_model_of_the_hub_that_is_cached(cached):
    assert load("org/words").tokenizer("a b")["input_ids"] == [1, 2]
    for file in cached.glob("tokenizer*"):
        file.unlink()
    assert load("org/words").tokenizer is None


@pytest.mark.parametrize(("file", "content", "reason"), DAMAGES)
def test_a_cached_tokenizer_that_is_damaged(cached, file, content, reason):
    (cached / file).write_text(content)
    where = r"in the folder .*snapshots/a+' \(tokenizer.json, tokenizer_config.json\)"
    with pytest.raises(ConfigError, match=f"{where}: {reason}.*; take .*models--org--words' away") as told:
        load("org/words")
    assert "\n" not in str(told.value)


def test_a_proxy_counts_as_a_network(monkeypatch):
    from polyhead.hf.loading import _hub_may_answer

    monkeypatch.setenv("HF_ENDPOINT", "https://nowhere.invalid")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not _hub_may_answer()
    monkeypatch.setenv("https_proxy", "http://localhost:1")
    assert _hub_may_answer()


class TestConversion:
    """A GGUF file is read once; the folder made of it appears whole or not at all."""

    @pytest.fixture
    def file(self, tmp_path, monkeypatch, tokenizer):
        path = tmp_path / "tiny.gguf"
        path.write_bytes(b"GGUF, or so it says")
        self.reads = []

        def read(path, dtype):
            self.reads.append(path)
            return llama().to(dtype), tokenizer

        monkeypatch.setattr(gguf, "read", read)
        monkeypatch.setattr("polyhead.hf.loading.read", read)
        return path

    def test_once(self, file, home):
        said = []
        first, second = load(file, announce=said.append), load(file, announce=said.append)
        assert len(self.reads) == 1
        assert said == ["reading tiny.gguf: this takes a minute once"]
        assert torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)
        assert torch.equal(first.model.lm_head.weight, llama().lm_head.weight)
        assert second.tokenizer("a")["input_ids"] == [1]

    def test_again_when_the_file_changed(self, file, home):
        load(file)
        file.write_bytes(b"GGUF, another one")
        load(file)
        assert len(self.reads) == 2

    def test_an_interrupted_one_leaves_nothing(self, file, home, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(t.PreTrainedModel, "save_pretrained", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load(file)
        assert [p.suffix for p in (home / "converted").iterdir()] == [".lock"]
        load(file)
        assert len(self.reads) == 2

    def test_leftovers_of_a_killed_one_are_swept(self, file, home):
        left = home / "converted" / f".{gguf._key(file)}-killed"
        left.mkdir(parents=True)
        load(file)
        assert not left.exists()

    def test_large_files_are_not_kept(self, file, home, monkeypatch):
        monkeypatch.setattr(gguf, "KEEP_UP_TO", 3)
        assert type(load(file).model) is t.LlamaForCausalLM
        assert not (home / "converted").exists()
