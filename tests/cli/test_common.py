"""What verbs compose alike."""

import pytest

from openpalm.cli import common


def test_progress_is_a_line_now_and_then_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for between, said in ((0.0, ["judge: 2 of 1,000", "judge: 5 of 1,000"]), (1e9, [])):
        monkeypatch.setattr(common, "SECONDS_BETWEEN_LINES", between)
        with common.progress("judge", 1000) as advance:
            advance(2)
            advance(3)
        out, err = capsys.readouterr()
        assert (out, err.split("\n")[:-1] if err.strip() else []) == ("", said)
