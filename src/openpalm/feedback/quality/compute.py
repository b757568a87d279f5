"""Computes all figures of a project and stores them; names.py lists the rows."""

from collections.abc import Iterator
from typing import Any

from django.db import transaction

from openpalm.feedback.models import ModelVersion, Project, User
from openpalm.feedback.quality import names
from openpalm.feedback.quality.agreement import agreement
from openpalm.feedback.quality.alarms import alarms
from openpalm.feedback.quality.answer_table import AnswerTable
from openpalm.feedback.quality.board import board
from openpalm.feedback.quality.labelers import (
    Activity,
    ai_judges,
    labelers,
    picked_sides,
    position_bias,
)
from openpalm.feedback.quality.response_table import Report, ResponseTable
from openpalm.feedback.quality.reward_agreement import RewardAgreement
from openpalm.feedback.quality.store import store
from openpalm.feedback.quality.timing import Times, progress
from openpalm.feedback.worker.progress import Writing

Rows = Iterator[tuple[str, Any]]
"""name and value of each figure"""


class Tables:
    """What the figures are computed from; kept, it makes the next computation read little."""

    def __init__(self, project: Project):
        self.project = project
        self.responses = ResponseTable(project)
        self.answers = AnswerTable(project)

    def __len__(self) -> int:
        return len(self.responses) + len(self.answers.rows)

    def refresh(self, project: Project, report: Report = lambda count: None) -> None:
        """Brings the tables up to date; `project` is as the database has it now."""
        self.project = self.responses.project = project
        self.responses.refresh(report)
        if ModelVersion.objects.filter(project=project).exists():
            # After the responses: it has the items of all of them.
            self.answers.refresh(lambda items: report(0))


def compute(
    project: Project, writing: Writing = transaction.atomic, tables: Tables | None = None
) -> None:
    """Stores every figure, each in a transaction of its own, which may raise to stop.

    `tables` are up to date.
    """
    if tables is None:
        tables = Tables(project)
        tables.refresh(project)
    activity = Activity(tables.responses)
    for part in (_labelers, _models):
        for name, value in part(tables, activity):
            with writing():
                store(project, name, value)
    tables.responses.forget()


def _labelers(tables: Tables, activity: Activity) -> Rows:
    table = tables.responses
    yield names.PROGRESS, progress(tables.project, activity)
    times = Times(table)
    yield names.TIME, times.to_json()
    found = {kind: agreement(table, kind) for kind in _kinds(activity)}
    agreements = {kind: pair[0] for kind, pair in found.items() if pair}
    yield names.AGREEMENT, agreements
    yield names.CONSENSUS, {kind: pair[1] for kind, pair in found.items() if pair and pair[1]}
    sides = picked_sides(table)
    rows = labelers(table, activity, times.of_raters(), sides)
    yield names.LABELERS, {"rows": rows}
    yield names.AI_JUDGES, ai_judges(rows, agreements.get(User.Kind.PERSON, {}))
    yield names.POSITION_BIAS, position_bias(sides)


def _models(tables: Tables, activity: Activity) -> Rows:
    """What labelers say of policies, and reward models against labelers."""
    project, kinds = tables.project, _kinds(activity)
    has_policies = ModelVersion.objects.filter(project=project).exclude(kind="reward").exists()
    found = {kind: board(tables.responses, tables.answers, kind) for kind in kinds if has_policies}
    yield names.BOARD, {kind: value for kind, value in found.items() if value}
    yield from _rewards(tables, [kind for kind in kinds if kind != User.Kind.MODEL])
    yield names.ALARMS, {"rows": alarms(tables.responses, tables.answers, project.decided_by)}


def _rewards(tables: Tables, kinds: list[str]) -> Rows:
    models = ModelVersion.objects.filter(project=tables.project, kind="reward")
    has_models = models.exists()
    found = [
        RewardAgreement(tables.responses, tables.answers, kind) for kind in kinds if has_models
    ]
    yield names.REWARD_AGREEMENT, {each.author_kind: each.to_json() for each in found}
    measured = [(each.author_kind, *each.newest) for each in found if each.newest]
    yield (
        names.CALIBRATION,
        {kind: by.to_json() | {"model": model.pk} for kind, model, by, _ in measured},
    )
    # People before simulated labelers.
    yield (
        names.DISAGREEMENTS,
        next(
            (
                {"model": model.pk, "author_kind": kind, "rows": rows}
                for kind, model, _, rows in measured
            ),
            {},
        ),
    )


def _kinds(activity: Activity) -> list[str]:
    """The kinds of authors with judgements in force, people first."""
    present = {kind for (_, kind), row in activity.of_raters().items() if row["judgements"]}
    return [kind for kind in User.Kind.values if kind in present]
