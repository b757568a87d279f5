"""Which models a judgement is in."""

from collections.abc import Iterable

from django.db.models import Q

from openpalm.feedback.models import ModelVersion, TrainRun


def models_of(response_ids: Iterable[int]) -> list[ModelVersion]:
    """The models trained on these judgements, and all that were trained from those.

    A model comes from another one by its parent, or by a reward model that its run used.
    """
    trained = TrainRun.objects.filter(snapshot__rows__response__in=list(response_ids))
    found: dict[int, ModelVersion] = {}
    fresh = list(ModelVersion.objects.filter(run__in=trained.values("pk")))
    while fresh:
        found |= {model.pk: model for model in fresh}
        ids = [model.pk for model in fresh]
        descended = Q(parent__in=ids) | Q(run__parent__in=ids) | Q(run__reward_model__in=ids)
        fresh = list(ModelVersion.objects.filter(descended).exclude(pk__in=found).distinct())
    return sorted(found.values(), key=lambda model: model.pk)
