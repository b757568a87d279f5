"""A project with models, a training, a comparison and stored figures."""

from types import SimpleNamespace

import pytest
from django.utils import timezone

from openpalm.feedback.models import (
    Assignment,
    Comparison,
    Item,
    ModelVersion,
    Promotion,
    Response,
    Snapshot,
    SnapshotJudgement,
    Statistic,
    TrainRun,
)

DIGEST = "ab" * 32


@pytest.fixture
def judge(project):
    """judge(item, user): a judgement in force that prefers the first answer."""

    def make(item: Item, user) -> Response:
        now = timezone.now()
        assignment = Assignment.objects.create(
            item=item, user=user, project=project, order=[0, 1], leased_at=now, expires_at=now
        )
        Item.objects.filter(pk=item.pk).update(taken=1, submitted=1, state=Item.State.COMPLETE)
        return Response.objects.create(
            project=project,
            item=item,
            user=user,
            assignment=assignment,
            author_kind=user.kind,
            state=Response.State.SUBMITTED,
            kind="compare",
            payload={"better": 0, "worse": 1, "strength": 1},
        )

    return make


@pytest.fixture
def loop(project, admin, member, make_item, judge):
    """Two labelers, one simulated, have judged; a reward model and a policy came of it."""
    labelers = [member("ann"), member("sim", kind="simulated")]
    items = [make_item(f"question {n}", "yes", "no") for n in range(2)]
    judgements = [judge(item, user) for item, user in zip(items, labelers, strict=True)]
    snapshot = Snapshot.objects.create(
        project=project,
        digest=DIGEST,
        path="/none",
        judgements=2,
        counts={
            "author_kind": {"person": 1, "simulated": 1},
            "kind": {"compare": 2},
            "author": {"ann": 1, "sim": 1},
        },
        created_by=admin,
    )
    SnapshotJudgement.objects.bulk_create(
        SnapshotJudgement(snapshot=snapshot, response=each) for each in judgements
    )

    def model(name: str, **fields) -> ModelVersion:
        return ModelVersion.objects.create(
            project=project, name=name, path=f"/none/{name}", checkpoint=name, **fields
        )

    base = model("base")
    project.served = base
    project.save()
    reward_run = TrainRun.objects.create(
        project=project, verb="reward", snapshot=snapshot, parent=base, state="finished"
    )
    reward = model("judge-of-taste", kind="reward", run=reward_run, parent=base)
    run = TrainRun.objects.create(
        project=project,
        verb="dpo",
        snapshot=snapshot,
        parent=base,
        state="running",
        step=30,
        steps=120,
        curve=[[1, 0.7], [2, 0.6]],
        figures={"loss": 0.6},
        directory="/none/1-dpo",
    )
    challenger = model("challenger", run=run, parent=base)
    comparison = Comparison.objects.create(project=project, challenger=challenger, served=base)
    return SimpleNamespace(
        project=project,
        items=items,
        judgements=judgements,
        snapshot=snapshot,
        base=base,
        reward=reward,
        run=run,
        challenger=challenger,
        comparison=comparison,
        promotion=Promotion.objects.create(
            project=project, model=base, by=admin, state="done", override_reason="the first one"
        ),
    )


@pytest.fixture
def store(project):
    """store(name, value): a figure of the project."""

    def make(name: str, value) -> Statistic:
        return Statistic.objects.create(project=project, name=name, value=value)

    return make


@pytest.fixture
def decided(loop):
    """decided(**result): the comparison as the worker decides it, promoted unless said else."""

    def make(**result) -> Comparison:
        row = loop.comparison
        row.state = Comparison.State.DECIDED
        row.result = {
            "comparisons": 200,
            "decision": "promote",
            "win_rate": 0.6,
            "low": 0.53,
            "high": 0.67,
            "author_kind": "person",
            "figures": {
                "win_rate": {"value": 0.6, "low": 0.53, "high": 0.67},
                "outcomes": {"win": 110, "loss": 70, "tie": 15, "both_bad": 5},
                "judged_by": {"person": 200},
            },
            **result,
        }
        row.save()
        return row

    return make
