"""Rows survive kills, and the terminal gets a bar or plain lines."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from openpalm.base import progress_bar
from openpalm.train.logging.metrics import RowFile, TrainingBar, describe, read_rows


@pytest.fixture
def rows(tmp_path: Path) -> RowFile:
    file = RowFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step, "loss": 1 / step})
        file.append({"step": step, "val_loss": 2 / step})
    return file


def test_what_is_appended_reads_back_bit_for_bit(tmp_path: Path):
    file = RowFile(tmp_path / "metrics.jsonl")
    numbers = [math.pi, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    for step, number in enumerate(numbers):
        file.append({"step": step, "loss": number})
        file.sync()
    assert [row["loss"] for row in read_rows(file.path)] == numbers
    assert math.copysign(1, read_rows(file.path)[-1]["loss"]) == -1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_json_does_not_have_becomes_null(tmp_path: Path, number: float):
    file = RowFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": number, "why": "loss not finite"})
    text = file.path.read_text(encoding="utf-8")
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {"step": 1, "loss": None, "why": "loss not finite"}


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9])
def test_cut_after_keeps_the_rows_of_the_step_itself(rows: RowFile, step: int):
    before = read_rows(rows.path)
    rows.cut_after(step)
    assert read_rows(rows.path) == [row for row in before if row["step"] <= step]
    rows.append({"step": 4})
    assert read_rows(rows.path)[-1] == {"step": 4}
    assert list(rows.path.parent.iterdir()) == [rows.path]


def test_a_line_torn_anywhere_is_removed(rows: RowFile):
    whole = rows.path.read_bytes()
    line = json.dumps({"step": 2, "loss": 0.123456789, "skipped": "loss not finite"}).encode()
    for cut in range(len(line)):
        rows.path.write_bytes(whole + line[:cut])
        rows.cut_after(3)
        assert rows.path.read_bytes() == whole, cut


def test_a_whole_line_that_lacks_its_end_is_kept_whole(rows: RowFile):
    whole = rows.path.read_bytes()
    rows.path.write_bytes(whole[:-1])
    rows.cut_after(3)
    assert rows.path.read_bytes() == whole


def test_a_run_that_has_no_rows_yet(tmp_path: Path):
    file = RowFile(tmp_path / "metrics.jsonl")
    file.cut_after(3)
    file.sync()
    assert not file.path.exists()


@pytest.mark.parametrize(
    "line", ["", "nonsense", "[1, 2]", '{"loss": 1}', '{"step": "2"}', "\x00\x00", '{"step": 1']
)
def test_reading_passes_over_what_is_no_row(tmp_path: Path, line: str):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n', encoding="utf-8")
    assert read_rows(file) == [{"step": 1}, {"step": 2}]


def test_reading_survives_bytes_that_are_no_text(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\xff\xfe\x80\n{"step": 2}')
    assert read_rows(file) == [{"step": 1}, {"step": 2}]


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.3456, "tokens_per_s": 12345.0} | more


def test_without_a_terminal_lines_are_printed(capsys: pytest.CaptureFixture[str]):
    with TrainingBar("train", 3) as line:
        line.start_at(0)
        for step in (1, 2, 3):
            line.show(row(step, mfu=0.25))
        line.say("a lasting [line]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train step 1/3  loss 2.346  12,345 tok/s  25% of peak",
        "train step 3/3  loss 2.346  12,345 tok/s  25% of peak",
        "a lasting [line]",
    ]


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    line = TrainingBar("train", 100)
    line.show(row(50))
    assert capsys.readouterr().err == "train step 50/100  loss 2.346  12,345 tok/s\n"


def test_in_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str]):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with TrainingBar("train", 3, console) as line:
        line.start_at(1)
        line.show(row(2))
        line.show(row(3))
    assert "3/3" in shown.getvalue()
    assert "loss 2.346" in shown.getvalue()
    assert capsys.readouterr().err == ""


def test_a_row_of_pairs_shows_accuracy_and_margin():
    row = {"step": 1, "loss": 0.6931, "pairs_per_s": 12.0, "accuracy": 0.5, "reward_margin": 0.0123}
    assert describe(row) == "loss 0.693  12 pairs/s  accuracy 0.50  margin 0.012"
