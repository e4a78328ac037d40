import os
import xml.etree.ElementTree as ET

import pytest

from polyhead.errors import ConfigError
from polyhead.report import ReportData, write_report
from polyhead.report.write import FILES, check_folder


def test_all_files_are_written(decoder, tmp_path):
    written = write_report(decoder, tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == sorted(FILES)
    assert [f.name for f in written.files] == list(FILES)
    assert written.page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert ReportData.from_json((written.folder / "report.json").read_text()) == decoder
    for file in written.files:
        if file.suffix == ".svg":
            ET.parse(file)
        assert file.stat().st_mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_earlier_report_is_replaced_and_other_files_stay(decoder, encoder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_report(decoder, tmp_path)
    write_report(encoder, tmp_path)
    assert not (tmp_path / "savings.svg").exists()  # an encoder has none
    assert ReportData.from_json((tmp_path / "report.json").read_text()) == encoder
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing_half_done(decoder, encoder, tmp_path, monkeypatch, stop):
    replace, calls = os.replace, []

    def fails_third(a, b):
        calls.append(b)
        if len(calls) == 3:
            raise stop
        replace(a, b)

    monkeypatch.setattr(os, "replace", fails_third)
    with pytest.raises((KeyboardInterrupt, ConfigError)) as error:
        write_report(decoder, tmp_path / "new" / "report")
    assert os.listdir(tmp_path) == []
    if not isinstance(stop, type):
        assert "No space left on device; choose another folder" in str(error.value)

    monkeypatch.setattr(os, "replace", replace)
    write_report(encoder, tmp_path)
    calls.clear()
    monkeypatch.setattr(os, "replace", fails_third)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        write_report(encoder, tmp_path)
    assert ReportData.from_json((tmp_path / "report.json").read_text()) == encoder
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder; choose another folder"):
        check_folder(tmp_path / "file" / "report")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ConfigError, match=r"report\.html is a folder"):
        check_folder(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc, which even root cannot write")
def test_a_forbidden_folder():
    with pytest.raises(ConfigError, match=r"out: cannot write to /proc: .*; choose another folder"):
        check_folder("/proc/report")


def test_checking_leaves_nothing_behind(tmp_path):
    assert check_folder(tmp_path / "x" / "y") == tmp_path / "x" / "y"
    assert os.listdir(tmp_path) == []
