"""`openpalm report`: an HTML page or plots from run directories."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from openpalm.cli import train
from openpalm.train.run import Outcome


def test_report_is_written_into_the_run(said, run):
    status, output, errors = said("report", run)
    page = run / "report.html"
    assert (status, output, errors) == (0, f"{page}\n", [])
    text = page.read_text(encoding="utf-8")
    assert "<title>OpenPaLM: run</title>" in text
    assert text.count("<svg") == 1
    page.unlink()


@pytest.fixture
def other(run, tmp_path):
    return shutil.copytree(run, tmp_path / "other")


def test_two_runs_on_one_page(said, run, other, tmp_path):
    page = tmp_path / "deep" / "both.html"
    assert said("report", run, other, "--out", page) == (0, f"{page}\n", [])
    text = page.read_text(encoding="utf-8")
    assert "<title>OpenPaLM: run, other</title>" in text
    assert text.count('aria-label="Learning against') == 4
    assert "the runs have the same settings" in text
    assert said("report", run, run, "--out", page)[0] == 0
    assert "<title>OpenPaLM: run</title>" in page.read_text(encoding="utf-8"), "twice is once"


@pytest.mark.parametrize("axis", ["steps", "tokens", "minutes", "flops"])
def test_a_plot_in_the_terminal(said, run, other, tmp_path, axis):
    status, output, errors = said("report", run, other, "--plot", axis)
    assert (status, errors) == (0, [])
    assert output.count("training loss") == output.count("validation loss") == 1
    assert not (run / "report.html").exists()
    page = tmp_path / "page.html"
    assert said("report", run, "--plot", axis, "--out", page)[1].endswith(f"{page}\n")
    assert page.exists()


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_run(said, tmp_path, name):
    (tmp_path / "empty").mkdir()
    status, output, errors = said("report", tmp_path / name)
    assert (status, output) == (2, "")
    assert errors == [
        f"openpalm: error: {tmp_path / name}: holds no metrics.jsonl; give a run directory"
    ]


def test_out_is_a_directory(said, run, tmp_path):
    status, _, errors = said("report", run, "--out", tmp_path)
    assert status == 2
    assert f"--out {tmp_path}: is a directory" in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_ends_with_its_curve_in_a_terminal_only(run, capsys, monkeypatch, terminal):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1") if terminal else monkeypatch.delenv("FORCE_COLOR", False)
    train.report(Outcome(Path("step"), 8, was_finished=False), SimpleNamespace(out=run))
    output, errors = capsys.readouterr()
    assert output == "step\n"
    assert errors.count("training loss") == terminal
    train.report(Outcome(Path("step"), 8, was_finished=True), SimpleNamespace(out=run))
    assert capsys.readouterr().err == ""
