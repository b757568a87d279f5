"""When the figures of a project are due."""

from datetime import timedelta

import pytest

from openpalm.feedback.accounts import audit
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Job, Statistic
from openpalm.feedback.quality.compute import compute
from openpalm.feedback.quality.job import KEPT_JOBS, REST, enqueue_due
from openpalm.feedback.worker.loop import drain

A = {"better": 0, "worse": 1, "strength": 1}


@pytest.fixture
def judged(project, member, make_item):
    """A judgement; the figures have been computed."""
    make_item("q", "x", "y")
    user = member("ann")
    assignment = queue.next_assignment(project, user)
    response = submission.submit(assignment.pk, user, Judgement("compare", A))
    assert enqueue_due() == 1
    drain("statistics")
    rested()
    return response


def rested():
    """As if the last job had ended long ago."""
    for job in Job.objects.filter(kind="statistics"):
        job.finished_at -= timedelta(hours=1)
        job.save()


def test_without_a_change_nothing_is_due(project, judged):
    assert Statistic.objects.filter(project=project, name="agreement").exists()
    assert enqueue_due() == 0


def test_nothing_is_due_while_a_job_waits(project, judged, member):
    submission.undo(project, judged.user)
    assert enqueue_due() == 1
    assert enqueue_due() == 0


def test_changes_without_a_new_judgement_are_due(project, judged, make_item):
    submission.undo(project, judged.user)
    assert enqueue_due() == 1
    drain("statistics")
    rested()
    audit.record("item.made_gold", user=None, project=project, target="item 1")
    assert enqueue_due() == 1


def test_a_project_rests_in_proportion_to_the_work(project, judged):
    submission.undo(project, judged.user)
    job = Job.objects.get(kind="statistics")
    now = job.finished_at + timedelta(hours=1)
    job.started_at, job.finished_at = now - timedelta(seconds=60), now
    job.save()
    assert enqueue_due() == 0
    job.started_at -= timedelta(hours=1)
    job.finished_at -= timedelta(hours=1)
    job.save()
    assert timedelta(seconds=60 * REST) < timedelta(hours=1)
    assert enqueue_due() == 1


def test_the_list_of_jobs_keeps_the_last_ones(project, judged):
    done = {"kind": "statistics", "project": project, "state": Job.State.DONE}
    Job.objects.bulk_create(Job(**done) for _ in range(2 * KEPT_JOBS))
    Job.objects.create(**done | {"kind": "import"})
    newest = Job.objects.filter(kind="statistics").latest("pk").pk
    submission.undo(project, judged.user)
    assert enqueue_due() == 1
    assert Job.objects.filter(**done).count() == KEPT_JOBS
    assert Job.objects.filter(pk=newest).exists()
    assert Job.objects.filter(kind="import").exists()


def test_a_second_job_reads_what_is_new(project, judged, member):
    """The tables of the first job show undone judgements and have new ones."""
    user = member("bea")
    submission.undo(project, judged.user)
    for _ in range(2):
        if assignment := queue.next_assignment(project, user):
            submission.submit(assignment.pk, user, Judgement("compare", A))
    assert enqueue_due() == 1
    drain("statistics")
    figures = {row.name: row.value for row in Statistic.objects.filter(project=project)}
    compute(project)
    assert figures == {row.name: row.value for row in Statistic.objects.filter(project=project)}
    assert figures["progress"]["responses"]["person"]["undone"] == 1
