"""The console of tables, and what a machine says of itself: one place for each."""

import io
import platform
import sys
from pathlib import Path

import pytest

from polyhead.console import wide_console
from polyhead.machine import processor


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr", [False, True])
def test_a_console_is_wide_where_there_is_no_terminal(monkeypatch, stderr):
    monkeypatch.setenv("COLUMNS", "70")
    name = "stderr" if stderr else "stdout"
    monkeypatch.setattr(sys, name, io.StringIO())
    console = wide_console(stderr=stderr)
    assert console.width == 160
    assert wide_console(stderr=stderr, width=120).width == 120
    console.print("x" * 150)
    assert getattr(sys, name).getvalue() == "x" * 150 + "\n"


@pytest.mark.parametrize("stderr", [False, True])
def test_a_console_is_as_wide_as_the_terminal(monkeypatch, stderr):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys, "stderr" if stderr else "stdout", Terminal())
    assert wide_console(stderr=stderr).width == 70


@pytest.mark.parametrize(
    ("cpuinfo", "said"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU: fast\nmodel name\t: Other\n", "Some CPU: fast"),
        ("processor\t: 0\nBogoMIPS\t: 50\n", "as platform says"),
        (None, "as platform says"),
    ],
)
def test_the_processor_has_a_name_everywhere(monkeypatch, cpuinfo, said):
    def read_text(path, encoding):
        assert path == Path("/proc/cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "as platform says")
    assert processor() == said
