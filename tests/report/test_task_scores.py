"""Scores of tasks as a page shows them, next to the published ones."""

import json

import pytest
from report_pages import HOSTILE, Page

from openpalm.errors import CheckpointError, DataError
from openpalm.report.task_scores import probed_section, read_scores, score_rows, scores_section


def score(task, metric, value, **more):
    return {"task": task, "metric": metric, "value": value, "stderr": 0.01, "rows": 9} | more


def cells(section):
    return Page(section.body).text


def test_published_figures_stand_beside_the_same_metric():
    scores = [
        score("lambada_openai", "perplexity", 1e12),
        score("lambada_openai", "acc", 0.5, stderr=None),
        score("hellaswag", "acc", 0.25),
        score("hellaswag", "acc_norm", 0.25, shots=5),
        score("mine", "acc", 0.5),
    ]
    assert [(row[0], row[2], row[3], row[-1]) for row in score_rows(scores)] == [
        ("lambada_openai", "1e+12", "0.0100", "3.9900"),
        ("lambada_openai", "0.5000", None, "0.6970"),
        ("hellaswag", "0.2500", "0.0100", None),
        ("hellaswag", "0.2500", "0.0100", "0.6610"),
        ("mine", "0.5000", "0.0100", None),
    ]


def test_text_of_a_file_is_escaped(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(
        json.dumps({"weights": HOSTILE, "limit": 7, "scores": [score(HOSTILE, HOSTILE, 0.5)]}),
        encoding="utf-8",
    )
    section = scores_section(read_scores(file), "tasks")
    page = Page(section.body)
    assert not {"script", "img"} & {*page.tags}
    assert page.text.count(HOSTILE.replace("&amp;", "&amp;")) == 3
    assert "the first 7 rows of each task" in page.text
    assert str(section.body).startswith('<div class="wide"><table>')  # scrolls on a phone


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"scores": 3},
        {"scores": [3]},
        {"scores": [{"task": "a", "metric": "b"}]},
        {"scores": [score("a", "b", "c")]},
        {"scores": [score("a", "b", 0.5, stderr="d")]},
    ],
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "scores.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"scores\.json: holds no scores of tasks"):
        read_scores(tmp_path / "scores.json")


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"is missing; run `openpalm eval --tasks` again"):
        read_scores(tmp_path / "scores.json")


def test_scores_during_training_in_columns():
    rows = [{"step": 1, "loss": 2.0}]
    assert probed_section(rows, "tasks") is None
    rows += [{"step": step, "task/piqa/acc": step / 100} for step in range(5, 100, 5)]
    section = probed_section(rows, "tasks")
    assert section is not None
    text = cells(section)
    assert "step 5" in text
    assert "step 95" in text  # the last one
    assert "0.9500" in text
    assert "0.7650" in text  # published


def test_the_report_of_a_run_shows_its_scores(said, run):
    (run / "tasks.json").write_text(
        json.dumps({"scores": [score("piqa", "acc", 0.5)]}), encoding="utf-8"
    )
    try:
        assert said("report", run)[0] == 0
        text = (run / "report.html").read_text(encoding="utf-8")
        assert "<h2>run: tasks</h2>" in text
        assert "0.7650" in text
    finally:
        (run / "tasks.json").unlink()
        (run / "report.html").unlink(missing_ok=True)


def test_files_of_scores_and_runs_on_one_page(said, run, tmp_path):
    file = tmp_path / "six.json"
    file.write_text(json.dumps({"scores": [score("piqa", "acc", 0.5)]}), encoding="utf-8")
    assert said("report", file)[:2] == (0, f"{tmp_path / 'six.html'}\n")
    assert "OpenPaLM: six.json" in (tmp_path / "six.html").read_text(encoding="utf-8")
    page = tmp_path / "both.html"
    assert said("report", run, file, "--out", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "six.json: tasks" in text
    assert "run: learning" in text
    status, _, errors = said("report", file, "--plot", "steps")
    assert (status, len(errors)) == (2, 1)
    assert "--plot steps: scores of tasks have no curve; give a run" in errors[0]
