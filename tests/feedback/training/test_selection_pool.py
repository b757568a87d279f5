"""Which pairs the job "select" may choose, in which arm, and in what order."""

import math

import pytest

from openpalm.errors import DataError
from openpalm.feedback.models import (
    Candidate,
    Item,
    ItemCandidate,
    Job,
    ModelScore,
    ModelVersion,
    Prompt,
    TrainRun,
)
from openpalm.feedback.statistics.selection import in_reserve
from openpalm.feedback.training import scoring, selection
from openpalm.feedback.worker.jobs import enqueue
from openpalm.feedback.worker.progress import Progress


@pytest.fixture
def prompt(project):
    """prompt("a", "b", held_out=False): a prompt with these answers."""

    def make(*answers: str, **fields) -> Prompt:
        row = Prompt.objects.create(
            project=project,
            messages=[{"role": "user", "content": "question"}],
            digest=f"{Prompt.objects.count():064}",
            source="typed",
            **fields,
        )
        for text in answers:
            Candidate.objects.create(prompt=row, text=text)
        return row

    return make


@pytest.fixture
def select(project):
    def run(size: int) -> dict:
        job = enqueue("select", project=project, size=size)
        # As the worker takes it.
        Job.objects.filter(pk=job.pk).update(state="running", worker="test")
        job.refresh_from_db()
        return selection.run(job, Progress(job))

    return run


def pairs():
    """The selected pairs, as sets of candidates, by the order of their priority."""
    items = Item.objects.exclude(arm="").order_by("-priority")
    return [frozenset(item.places.values_list("candidate_id", flat=True)) for item in items]


def members(project, number=2):
    run = TrainRun.objects.create(project=project, verb="reward")
    return [
        ModelVersion.objects.create(
            project=project, name=f"r{run.pk}.{n}", kind="reward", run=run, path="/none"
        )
        for n in range(number)
    ]


def score(models, margins):
    """Gives the two answers of each prompt scores with these margins, one for each model."""
    for prompt, differences in margins.items():
        a, b = prompt.candidates.order_by("id")
        for model, difference in zip(models, differences, strict=True):
            ModelScore.objects.create(model=model, candidate=a, score=difference)
            ModelScore.objects.create(model=model, candidate=b, score=0.0)


def test_the_random_share_is_exact_and_from_the_reserve(project, prompt, select):
    prompts = [prompt("yes", "no") for _ in range(200)]
    result = select(50)
    assert (result["random"], result["active"], result["missing_random"]) == (15, 35, 0)
    arms = dict(Item.objects.values_list("prompt", "arm"))
    assert len(arms) == 50
    reserve = {row.pk for row in prompts if in_reserve(row.pk, project_seed=project.pk)}
    assert {pk for pk, arm in arms.items() if arm == "random"} <= reserve
    assert not {pk for pk, arm in arms.items() if arm == "active"} & reserve


def test_a_second_batch_takes_other_pairs(project, prompt, select):
    for _ in range(60):
        prompt("yes", "no")
    select(20)
    first = set(pairs())
    select(20)
    assert len(set(pairs())) == len(pairs()) == 40
    assert first < set(pairs())


def test_the_ensemble_disagrees_on_what_is_chosen(project, prompt, select):
    prompts = [prompt("yes", "no") for _ in range(60)]
    free = [row for row in prompts if not in_reserve(row.pk, project_seed=project.pk)]
    disputed = set(free[::5])
    margins = {row: (4.0, -4.0) if row in disputed else (3.0, 3.0) for row in prompts}
    score(members(project), margins)
    # Seven tenths are active, rounded down: at least as many as are disputed.
    size = math.ceil(len(disputed) / 0.7) + 1
    result = select(size)
    active = set(Item.objects.filter(arm="active").values_list("prompt", flat=True))
    assert {row.pk for row in disputed} <= active
    assert result["by"] == ["the reward ensemble's disagreement"]


def test_one_reward_model_is_no_ensemble(project, prompt, select):
    rows = [prompt("yes", "no") for _ in range(10)]
    score(members(project, 1), dict.fromkeys(rows, (1.0,)))
    assert select(5)["by"] == []


def test_the_newest_ensemble_counts(project):
    members(project)
    newest = members(project, 3)
    members(project, 1)
    assert selection.ensemble(project) == newest


def test_a_pair_without_a_score_comes_last(project, prompt, select, monkeypatch):
    rows = [prompt("yes", "no") for _ in range(30)]
    free = [row for row in rows if not in_reserve(row.pk, project_seed=project.pk)]
    models = members(project)
    score(models, {row: (1.0, -1.0) for row in rows if row != free[0]})
    # An answer that is too long for the reward model stays without a score.
    monkeypatch.setattr(scoring, "score", lambda *_: {})
    select(len(free))
    assert free[0].pk not in Item.objects.filter(arm="active").values_list("prompt", flat=True)


def test_what_may_not_be_chosen(project, prompt, make_item, select):
    held_out = prompt("yes", "no", held_out=True)
    gold = make_item("gold", "yes", "no", purpose="gold")
    judged = make_item("judged", "yes", "no", taken=1, submitted=1, state="complete")
    leased = make_item("leased", "yes", "no", taken=1)
    withdrawn = make_item("withdrawn", "yes", "no", state="withdrawn")
    equal = prompt("same", " same ")
    fine = prompt("yes", "no")
    assert select(50)["pool"] == 1
    chosen = Item.objects.exclude(arm="").get()
    assert chosen.prompt == fine
    others = [held_out, equal, *(item.prompt for item in (gold, judged, leased, withdrawn))]
    assert not Item.objects.filter(prompt__in=others).exclude(arm="").exists()


def test_an_item_that_waits_is_moved_up_instead_of_doubled(project, make_item, select):
    waiting = make_item("waiting", "yes", "no")
    assert select(5)["pool"] == 1
    waiting.refresh_from_db()
    assert waiting.arm in ("random", "active")
    assert 9 < waiting.priority <= 10
    assert Item.objects.count() == 1


def test_all_pairs_of_several_answers_are_possible(project, prompt, make_item, select):
    item = make_item("judged", "a", "b", taken=1, submitted=1, state="complete")
    third = Candidate.objects.create(prompt=item.prompt, text="c")
    assert select(5)["pool"] == 2
    assert all(third.pk in pair for pair in pairs())
    assert ItemCandidate.objects.filter(item__arm="").count() == 2


def test_nothing_left_is_said(project, select):
    with pytest.raises(DataError, match="generate further answers"):
        select(5)


def test_other_tasks_are_refused(project, prompt, select):
    project.task = "ranking"
    project.save()
    prompt("a", "b")
    with pytest.raises(DataError, match="only a project of pairs"):
        select(5)
