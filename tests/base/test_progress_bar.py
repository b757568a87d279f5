"""A bar in a terminal, elsewhere a line now and then; both on standard error."""

import io

import pytest
from rich.console import Console

from openpalm.base import progress_bar
from openpalm.base.progress_bar import ProgressBar


def in_terminal() -> tuple[io.StringIO, Console]:
    shown = io.StringIO()
    return shown, Console(file=shown, force_terminal=True, width=100)


@pytest.mark.parametrize(
    ("between", "lines"), [(0.0, ["judge: 2 of 1,000", "judge: 5 of 1,000"]), (1e9, [])]
)
def test_without_a_terminal_a_line_is_printed_now_and_then(
    between: float,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", between)
    with ProgressBar("judge", 1000) as bar:
        bar.advance(2)
        bar.advance(3)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", lines)


def test_bytes_are_shown_in_megabytes_and_a_total_may_come_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    with ProgressBar("download", in_bytes=True) as bar:
        bar.advance(1_000_000)
        bar.move_to(2_000_000, 4_000_000)
    lines = ["download: 1 MB", "download: 2 of 4 MB"]
    assert capsys.readouterr().err.splitlines() == lines


def test_in_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str]):
    shown, console = in_terminal()
    with ProgressBar("doctor", 3, console=console) as bar:
        bar.start_at(1)
        bar.advance(2)
    assert "doctor" in shown.getvalue()
    assert "3/3" in shown.getvalue()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("delay_s", "drawn"), [(-1.0, True), (1e9, False)])
def test_a_bar_is_drawn_only_after_its_delay(delay_s: float, drawn: bool):
    shown, console = in_terminal()
    with ProgressBar("joining", 3, delay_s=delay_s, console=console) as bar:
        bar.advance(3)
    assert ("joining" in shown.getvalue()) == drawn
