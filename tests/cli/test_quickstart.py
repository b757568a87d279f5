"""The whole line in one command, with a model small enough for a test."""

import json

import pytest

from openpalm.base.device import multiplies_bfloat16
from openpalm.checkpoint import directory as checkpoint
from openpalm.cli import quickstart
from openpalm.errors import SettingsError
from openpalm.train.sizing import budget


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished quickstart's directory, and what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "VOCABULARY", 512)
        out = tmp_path_factory.mktemp("quickstart") / "runs"
        words = ["--minutes", "0.05", "--out", str(out)]
        quickstart.run(words)
        yield out, words


def test_every_station_left_its_work(done):
    out, _ = done
    assert (out / "data" / "manifest.json").is_file()
    for run in ("pretrain", "sft"):
        assert list((out / run / "checkpoints").glob("step-*"))
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["bits_per_byte"] < 8
    assert summary["order5"] < summary["gzip"] < 8
    assert 0 <= summary["f1_before"] <= 1
    assert 0 <= summary["f1_after"] <= 1
    assert 0 < summary["train_seconds"] < summary["seconds"]
    assert summary["steps"] >= 1
    assert summary["parameters"] == checkpoint.load(out / "pretrain").config.parameters
    assert summary["native_bfloat16"] == multiplies_bfloat16()
    assert summary["processor"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "shutil.copytree" in page


def test_the_questions_asked_are_not_the_questions_taught(done):
    out, _ = done
    taught = (out / "questions.jsonl").read_text()
    assert "What does shutil.copytree do?" in taught
    assert "Can you tell me what shutil.copytree does?" not in taught


def test_repeated_it_trains_nothing_again(done, capsys):
    out, words = done
    weights = sorted(out.glob("*/checkpoints/*/model.safetensors"))
    before = [(file, file.stat().st_mtime_ns) for file in weights]
    quickstart.run(words)
    assert [(file, file.stat().st_mtime_ns) for file in weights] == before
    printed = capsys.readouterr().out
    assert "next, try" in printed
    last = printed.splitlines()[-1].strip()
    assert last in [f"openpalm serve {out / run} --feedback" for run in ("sft", "dpo")]


def test_another_length_is_refused_before_any_work(done, capsys):
    out, _ = done
    with pytest.raises(SettingsError, match=r"give --minutes 0\.05 to continue it, another --out"):
        quickstart.run(["--minutes", "0.2", "--out", str(out)])
    assert capsys.readouterr().out == ""


GOOD = {"bits_per_byte": 1.7, "order5": 1.9, "f1_after": 0.9, "steps": 600}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, 0),
        ({"bits_per_byte": 8.3}, 2),
        ({"f1_after": 0.1}, 2),
        ({"bits_per_byte": 2.0, "f1_after": 0.1}, 3),
    ],
)
def test_a_poor_result_is_called_poor_and_what_to_do_is_said(changes, lines):
    said = quickstart.shortcomings(GOOD | changes, quickstart.QuickstartSettings())
    assert len(said) == lines
    assert not said or "--minutes 15" in said[-1]


def test_more_time_or_a_faster_machine_trains_a_larger_model():
    assert budget.affordable(1e10).model == "palm-tiny"
    assert budget.affordable(1e15).model == "palm-5m"
    assert budget.facts(60, 8000) == 2 * budget.facts(30, 8000)
    assert budget.facts(0.1, 10) == 8
