"""A project's judgements, made through the same functions as those of the pages."""

from datetime import timedelta

import pytest
from django.utils import timezone

from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Assignment, Statistic
from openpalm.feedback.quality.compute import compute


@pytest.fixture
def lease(project):
    """lease(user, item): an assignment as the queue would make it, shown in the item's order."""

    def make(user, item, *, order=None, repeat=0, counted=None):
        now = timezone.now()
        is_counted = repeat == 0 and item.purpose != "gold" if counted is None else counted
        if is_counted:
            type(item).objects.filter(pk=item.pk).update(taken=item.taken + 1)
            item.refresh_from_db()
        return Assignment.objects.create(
            item=item,
            user=user,
            project=item.project,
            repeat=repeat,
            order=order or list(range(item.places.count())),
            counted=is_counted,
            leased_at=now,
            expires_at=now + timedelta(minutes=30),
        )

    return make


@pytest.fixture
def judge(lease):
    """judge(user, item, payload, kind="compare"): a stored response."""

    def make(user, item, payload, kind="compare", elapsed_ms=None, **how):
        assignment = lease(user, item, **how)
        return submission.submit(assignment.pk, user, Judgement(kind, payload, elapsed_ms))

    return make


@pytest.fixture
def figures(project):
    """figures("agreement"): the stored row, computed now."""

    def read(name):
        compute(project)
        return Statistic.objects.get(project=project, name=name).value

    return read
