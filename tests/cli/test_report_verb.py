"""`openpalm report`: runs in, one page out."""

import pytest


def test_report_is_written_into_the_run(said, run):
    status, output, errors = said("report", run)
    page = run / "report.html"
    assert (status, output, errors) == (0, f"{page}\n", [])
    text = page.read_text(encoding="utf-8")
    assert "<title>OpenPaLM: run</title>" in text
    assert text.count("<svg") == 1
    page.unlink()


def test_two_runs_on_one_page(said, run, tmp_path):
    page = tmp_path / "deep" / "both.html"
    assert said("report", run, run, "--out", page)[0] == 0
    assert page.read_text(encoding="utf-8").count("<svg") == 2


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_run(said, tmp_path, name):
    (tmp_path / "empty").mkdir()
    status, output, errors = said("report", tmp_path / name)
    assert (status, output) == (2, "")
    assert errors == [
        f"openpalm: error: {tmp_path / name}: holds no metrics.jsonl; give the directory of a run"
    ]


def test_out_is_a_directory(said, run, tmp_path):
    status, _, errors = said("report", run, "--out", tmp_path)
    assert status == 2
    assert f"--out {tmp_path}: is a directory" in errors[0]
    assert list(tmp_path.iterdir()) == []
