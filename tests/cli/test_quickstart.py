"""The whole line in one command, with a model small enough for a test."""

import json

import pytest

from openpalm.cli import quickstart


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished quickstart's directory, and what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "MODEL", "palm-tiny")
        patch.setattr(quickstart, "VOCABULARY", 512)
        out = tmp_path_factory.mktemp("quickstart") / "runs"
        words = ["--minutes", "0.1", "--out", str(out)]
        quickstart.run(words)
        yield out, words


def test_every_station_left_its_work(done):
    out, _ = done
    assert (out / "data" / "manifest.json").is_file()
    for run in ("pretrain", "sft"):
        assert list((out / run / "checkpoints").glob("step-*"))
    results = json.loads((out / "results.json").read_text())
    assert 0 < results["validation bits a byte"] < 8
    assert 0 <= results["token F1 after fine-tuning"] <= 1
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
    assert "next, try" in capsys.readouterr().out
