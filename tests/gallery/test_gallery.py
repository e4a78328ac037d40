"""The gallery: the committed pages are what the registry gives, and say what is there."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, PolyheadError
from polyhead.gallery import Size, facts_of, pages, svg, text, write_pages
from polyhead.mechanisms import Flow, Step
from polyhead.mechanisms.files import MOST

ROOT = Path(__file__).parents[2]
NAMES = [entry.name for entry in ph.catalog()]


def test_the_committed_pages_are_what_the_registry_gives() -> None:
    made = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "gallery").iterdir()}
    stale = sorted(name for name in made.keys() | there if made.get(name) != there.get(name))
    assert not stale, f"run `make gallery` and commit what it writes; out of date: {', '.join(stale)}"


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_those_of_the_module(name: str) -> None:
    facts = facts_of(ph.entry(name), Size(64, 4, 16, torch.float32))
    module = ph.build(name, dim=64, heads=4)
    assert facts.cost == module.cost(16)
    assert facts.cost.parameters == sum(p.numel() for p in module.parameters())
    assert facts.twin_source is not None
    assert facts.twin_source.count("def ") >= 1
    assert facts.twin_file is not None
    assert (ROOT / "src" / "polyhead" / facts.twin_file).is_file()
    assert facts.entry.files[0] == facts.entry.file
    assert len(facts.entry.files) <= 1 + MOST
    assert all((ROOT / "src" / "polyhead" / file).is_file() for file in facts.entry.files)
    assert [o.name for o in facts.options][:2] == ["dim", "heads"]
    assert eval(facts.build, {"ph": ph}).config.dim == 64
    assert facts_of(ph.entry(name)).cost.kv_bytes_per_token == ph.entry(name).cost.kv_bytes_per_token


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="heads must divide dim"):
        facts_of(ph.entry("mha"), Size(dim=10, heads=4))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_everything(name: str) -> None:
    entry = ph.entry(name)
    files = pages([entry])
    page = files[f"{name}.md"]
    for part in (entry.equation, *entry.files, f'ph.build("{name}"', "naive twin"):
        assert part in page
    assert f"({name}.svg)" in page
    if entry.paper is not None:
        assert entry.title in page
        assert "https://arxiv.org/abs/" in page
    assert f"]({name}.md)" in files["index.md"]
    assert str(f"{entry.cost.kv_bytes_per_token:,}") in files["index.md"]
    assert "/work" not in page
    drawing = ElementTree.fromstring(files[f"{name}.svg"])
    words = " ".join("".join(node.itertext()) for node in drawing.iter() if node.tag.endswith("text"))
    for step in (*entry.flow.queries, *entry.flow.keys, *entry.flow.joined):
        assert step.name in words


def test_links_between_the_pages_lead_somewhere() -> None:
    files = pages()
    for name, content in files.items():
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", content) if name.endswith(".md") else ():
            assert target in files, (name, target)


def test_a_picture_keeps_every_word_and_stays_within_its_drawing() -> None:
    long = "many words " * 30
    flow = Flow((Step("x"), Step("a", long)), (Step("c"),), (Step("y", "<&>"),), (Step("also here", long),))
    assert text(flow).count("many") == text(flow).count("words") == 2 * 30
    drawing = ElementTree.fromstring(svg(flow, "a < b & c"))
    height = float(drawing.attrib["height"])
    bottoms = [float(n.attrib["y"]) for n in drawing.iter() if n.tag.endswith("text")]
    assert 0 < max(bottoms) < height
    assert "<&>" in "".join(drawing.itertext())


def test_pages_are_written_once_and_what_is_gone_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    mha = pages([ph.entry("mha")])
    both = pages([ph.entry("mha"), ph.entry("multi_query")])
    assert write_pages(folder, both) == (list(both), [])
    assert write_pages(folder, both) == ([], [])
    assert write_pages(folder, mha) == (["index.md"], ["multi_query.md", "multi_query.svg"])
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == mha


@pytest.mark.parametrize("name", ["thesis.md", "index.md", "code.py", "picture.png"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(PolyheadError, match=f"does not look like a gallery: it holds {name}"):
        write_pages(tmp_path, {"index.md": "a"})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(PolyheadError, match="is a file; name a folder"):
        write_pages(tmp_path / name, {"index.md": "a"})
