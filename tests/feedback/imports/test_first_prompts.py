"""The first project's prompts: from the data of the served model's run."""

import json

import pytest

from openpalm.feedback.imports import first_prompts
from openpalm.feedback.models import Job, ModelVersion, Prompt


@pytest.fixture
def run(tmp_path):
    """A run of 40 questions, each twice, with a checkpoint."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
        for n in [*range(40), *range(40)]
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"data: {data}\n", encoding="utf-8")
    return folder


def test_prompts_are_added_once_and_most_of_a_few_are_held_out(project, run):
    model = ModelVersion.objects.create(project=project, name="sft", path=str(run))
    data = first_prompts.data_of(run / "checkpoints" / "step-1")
    assert first_prompts.add(project, model, data) == 40
    held_out = Prompt.objects.filter(held_out=True).count()
    assert Prompt.objects.count() == 40
    assert 15 < held_out < 38, "as many as a promotion needs, up to 70 %"
    job = Job.objects.get(kind="generate")
    asked = Prompt.objects.filter(pk__in=job.arguments["prompts"])
    assert not asked.filter(held_out=True).exists()
    assert asked.count() == 40 - held_out


def test_the_runs_that_it_began_from_count_too(run, tmp_path):
    later = tmp_path / "later"
    later.mkdir()
    pairs = tmp_path / "pairs.jsonl"
    pairs.touch()
    (later / "config.yaml").write_text(f"data: {pairs}\ninit: {run}\n", encoding="utf-8")
    assert first_prompts.data_of(later) == [pairs, tmp_path / "rows.jsonl"]


@pytest.mark.parametrize("config", ["data: 3\n", "data: data/shards\n", "- a\n", "steps: 1\n"])
def test_a_run_without_rows_gives_no_prompts(run, config):
    (run / "config.yaml").write_text(config, encoding="utf-8")
    assert first_prompts.data_of(run) == []


def test_rows_without_prompts_give_none(project, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"nothing": 1}\n', encoding="utf-8")
    model = ModelVersion.objects.create(project=project, name="sft", path=str(tmp_path))
    assert first_prompts.add(project, model, [data]) == 0
    assert not Job.objects.exists()
