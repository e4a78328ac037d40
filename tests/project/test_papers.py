"""The packaged list of papers: whole, consistent, and honest about what is built."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from polyhead.errors import UnknownName
from polyhead.papers import built_in, paper, papers

module = importlib.import_module("polyhead.papers")  # the package's attribute is the function

PACKAGE = Path(module.__file__).parent


def test_numbers_run_without_a_gap():
    assert [one.number for one in papers()] == [f"{n:03d}" for n in range(1, len(papers()) + 1)]
    assert len(papers()) == 199


def test_rows_are_well_formed():
    for one in papers():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", one.name), one
        assert one.title
        assert one.title == one.title.strip()
        assert one.short
        assert 2015 <= one.year <= 2026, one
        assert one.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}|1\d{3}\.\d{4,5}", one.arxiv), one
        assert one.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", one.code), one
    names = [name for one in papers() for name in (one.name, *one.aliases)]
    assert len(set(names)) == len(names)
    arxiv = [one.arxiv for one in papers() if one.arxiv]
    assert len(set(arxiv)) == len(arxiv)


def test_arxiv_number_is_not_younger_than_the_paper():
    for one in papers():
        if one.arxiv:
            assert 2000 + int(one.arxiv[:2]) <= one.year, one


def test_a_paper_is_found_by_number_name_and_common_name():
    assert paper("59") is paper("059") is paper("multi_query") is paper("MQA")
    assert paper("icl_score").number == "142"
    assert paper("059").url == "https://arxiv.org/abs/1911.02150"
    with pytest.raises(UnknownName, match=r"no paper is called 'multi_qery'; did you mean 'multi_query'"):
        paper("multi_qery")


def test_papers_are_immutable_and_shared():
    assert papers() is papers()
    with pytest.raises(AttributeError):
        papers()[0].title = "other"


def test_what_is_built_follows_the_registry(monkeypatch):
    from polyhead.mechanisms import registry

    entries = (
        SimpleNamespace(paper="002", file="mechanisms/moh.py"),
        SimpleNamespace(paper="002", file="mechanisms/moh.py"),
        SimpleNamespace(paper=None, file="mechanisms/other.py"),
    )
    monkeypatch.setattr(registry, "catalog", lambda: entries)
    assert built_in("002") == ("mechanisms/moh.py",)
    assert paper("002").built
    assert built_in("003") == ()
    monkeypatch.setattr(registry, "catalog", lambda: ())
    assert not paper("002").built


def test_files_count_only_when_they_exist(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    assert built_in("078") == ()
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "retrieval.py").touch()
    assert built_in("078") == ("heads/retrieval.py",)


def test_every_file_named_exists_and_cites_the_paper():
    for one in papers():
        for file in one.built_in:
            source = (PACKAGE / file).read_text(encoding="utf-8")
            assert any(cited in source for cited in (one.arxiv, one.title) if cited), (
                f"paper {one.number} is built in {file}, which cites neither arXiv {one.arxiv} nor the title"
            )
