import base64
import dataclasses
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from polyhead.errors import ConfigError, MissingExtra
from polyhead.report import ReportData, build_page, page
from polyhead.report.packing import pack_lookups

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed by its own end tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [v for k, v in attrs if k == "id"]
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module", params=["decoder", "encoder", "nasty", "large"])
def case(request):
    data = request.getfixturevalue(request.param)
    text = build_page(data)
    return data, text, Reader(text)


def test_the_page_is_well_formed_and_below_ten_megabytes(case):
    _, text, read = case
    assert text.startswith("<!doctype html>")
    assert len(text.encode()) < 10_000_000
    assert len(set(read.ids)) == len(read.ids)
    # what labels or is linked to exists
    for name, value in read.attributes:
        if name == "href" and value.startswith("#"):
            assert value[1:] in read.ids
        if name in ("aria-labelledby", "for"):
            assert value in read.ids


def test_the_page_holds_exactly_the_data(case):
    data, _, read = case
    assert len(read.scripts) == 2  # data and program: no string became a third
    assert ReportData.from_json(read.scripts[0]) == data


def test_the_page_lists_roles_from_where_heads_rest_to_what_they_can_do(case):
    order = ["sink", "local", "previous token", "induction", "retrieval", "broad", "mixed"]
    assert case[2].scripts[1].startswith(f"\nconst ROLE_NAMES = {json.dumps(order)};\n")
    assert list(case[0].roles.counts()) == order


def test_the_page_asks_nobody_for_anything(case):
    _, text, read = case
    for name, value in read.attributes:
        if name in ("src", "href", "action", "srcset"):
            assert value.startswith("#") or value == "data:,"
        assert not name.startswith("on")
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    assert "default-src 'none'" in text


def test_the_policy_admits_the_program_and_no_other(case):
    _, text, read = case
    digest = base64.b64encode(hashlib.sha256(read.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text.replace("&#39;", "'")


def test_strings_that_want_out_stay_strings(nasty):
    text = build_page(nasty)
    read = Reader(text)
    assert "<script>window.bad" not in text
    assert "<img" not in text
    assert "</title><script>window.bad=1</script>\"'&" in read.text
    assert "\u2028" not in text


def test_an_encoder_has_no_word_of_caches(encoder):
    read = Reader(build_page(encoder))
    assert {"heads", "reading", "roles", "method"} <= set(read.ids)
    assert not {"savings", "advice", "show-kept"} & set(read.ids)


def test_parts_that_are_absent_leave_no_holes(decoder):
    bare = dataclasses.replace(
        decoder, pictures=None, lookups=None, savings=None, recommendation=None, notes=()
    )
    read = Reader(build_page(bare))
    assert not {"picture", "reading", "savings", "advice"} & set(read.ids)


def test_rules_and_numbers_are_on_the_page(decoder):
    text = Reader(build_page(decoder)).text.replace("\u00a0", " ")
    assert "window mass ≥ 60 % and sink mass ≤ 30 %" in text
    assert "28.5 MB" in text
    assert "Measured on texts, needles and seeds that were not used" in text
    assert "past_key_values=cache" in text


def test_a_page_that_grows_too_large_loses_lookups_first(decoder, monkeypatch):
    tokens, heads = len(decoder.text.tokens), decoder.model.total_heads
    rng, queries = np.random.default_rng(0), np.arange(tokens)
    shape = (decoder.model.heads[0], tokens, 8)
    noise = [rng.integers(0, tokens, shape) for _ in decoder.model.heads]
    data = dataclasses.replace(decoder, lookups=pack_lookups(queries, noise, [rng.random(shape)] * 6))
    size = len(build_page(data).encode())
    assert size > heads * tokens * 8 * 2
    monkeypatch.setattr(page, "PAGE_BYTES", size - 100_000)
    small = build_page(data)
    assert len(small.encode()) <= size - 100_000
    kept = ReportData.from_json(Reader(small).scripts[0])
    assert 0 < len(kept.lookups.queries) < tokens
    assert dataclasses.replace(kept, lookups=data.lookups) == data
    monkeypatch.setattr(page, "PAGE_BYTES", 50_000)
    with pytest.raises(ConfigError, match="record smaller pictures"):
        build_page(data)


def test_without_jinja_the_missing_extra_is_named(decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"pip install 'polyhead\[report\]'"):
        build_page(decoder)


def test_importing_the_report_needs_no_extra():
    import subprocess

    code = "import sys, polyhead.report; print({'jinja2', 'plotly', 'pandas', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jinja2" not in done.stdout
    assert "plotly" not in done.stdout
