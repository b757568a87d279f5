"""What each model was trained on, down to each judgement, and which models a judgement is in.

A model carries the judgements of its own snapshot, those of its reward model (PPO), and those of
the models that it was trained from.
"""

from collections.abc import Iterable

from django.db.models import Q, QuerySet

from openpalm.feedback.models import ModelVersion, Response, Snapshot
from openpalm.feedback.training.registry import REWARD, ancestors

__all__ = ["ancestors", "direct_models", "judgements_of", "models_of", "snapshots_of"]


def snapshots_of(model: ModelVersion) -> list[Snapshot]:
    """All snapshots that the model, its reward models and its ancestors were trained on."""
    # One query for all models of the project, however long the chain of ancestors is.
    rows = ModelVersion.objects.filter(project=model.project_id)
    rows = rows.select_related("run__snapshot", "run__reward_model").defer("run__curve")
    known = {row.pk: row for row in rows}
    found: dict[int, Snapshot] = {}
    seen: set[int] = set()
    waiting = [model.pk]
    while waiting:
        current = known.get(waiting.pop())
        if current is None or current.pk in seen:
            continue
        seen.add(current.pk)
        run = current.run
        if current.parent_id is not None:
            waiting.append(current.parent_id)
        if run is not None and run.snapshot is not None:
            found[run.snapshot.pk] = run.snapshot
        if run is not None and run.reward_model is not None:
            reward = run.reward_model
            waiting.append(reward.pk)
            # The other members of an ensemble reward the policy too.
            of_run = (row for row in known.values() if row.run_id == reward.run_id is not None)
            waiting += [row.pk for row in of_run if row.kind == REWARD]
    return sorted(found.values(), key=lambda snapshot: snapshot.pk)


def judgements_of(model: ModelVersion) -> "QuerySet[Response]":
    """Every judgement that the model was trained on, deleted ones included."""
    snapshots = [snapshot.pk for snapshot in snapshots_of(model)]
    found = Response.objects.filter(snapshot_rows__snapshot__in=snapshots)
    return found.distinct().order_by("id")


def direct_models(responses: Iterable[Response]) -> set[int]:
    """Ids of the models trained on a snapshot that holds one of these judgements."""
    ids = [response.pk for response in responses]
    found = ModelVersion.objects.filter(run__snapshot__rows__response__in=ids)
    return set(found.values_list("id", flat=True))


def models_of(responses: Iterable[Response]) -> list[ModelVersion]:
    """Every model that one of these judgements is in: what to show before they are deleted."""
    found: set[int] = set()
    newest = direct_models(responses)
    while newest:
        found |= newest
        children = ModelVersion.objects.filter(
            Q(parent__in=newest)
            | Q(run__reward_model__in=newest)
            # The other members of an ensemble reward the policy too.
            | Q(run__reward_model__run__made__in=newest, run__reward_model__kind=REWARD)
        )
        newest = set(children.values_list("id", flat=True)) - found
    return list(ModelVersion.objects.filter(pk__in=found).order_by("id"))
