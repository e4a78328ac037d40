"""`Profile.to_html`: a profile alone as one page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, PolyheadError

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("jinja2", reason="needs the extra report")


class Letters:
    """A tokenizer as far as a page needs one."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture(scope="module")
def profile() -> object:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    found = ph.profile(model, None, torch.randint(64, (50,)), measurements=["entropy", "previous_token"])
    object.__setattr__(found, "_tokenizer", Letters())
    return found


def test_writes_one_page(profile: object, tmp_path: Path) -> None:
    path = tmp_path / "heads.html"
    profile.to_html(path)  # type: ignore[attr-defined]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") or text.lower().startswith("<!doctype html>")
    assert "LlamaForCausalLM" in text
    assert [p.name for p in tmp_path.iterdir()] == ["heads.html"]


def test_bad_paths_and_profiles(profile: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path must name a file in a folder that exists"):
        profile.to_html(tmp_path / "nowhere" / "x.html")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="path must name a file"):
        profile.to_html(tmp_path)  # type: ignore[attr-defined]
    loaded = type(profile).from_json(profile.to_json())  # type: ignore[attr-defined]
    with pytest.raises(PolyheadError, match="knows no model"):
        loaded.to_html(tmp_path / "x.html")
    assert not list(tmp_path.iterdir())
