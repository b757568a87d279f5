"""A database that is away or full, a clock that is set back, a project that is closed."""

from datetime import timedelta

import pytest
from django.db import InterfaceError, OperationalError
from django.test import Client
from django.utils import timezone

from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Item, Response

TIE = Judgement("compare", {"tie": [0, 1]})
TROUBLES = [
    (OperationalError("database or disk is full"), "The disk of this site is full"),
    (OperationalError("attempt to write a readonly database"), "cannot be written"),
    (OperationalError("connection failed: Connection refused"), "does not answer"),
    (InterfaceError("connection already closed"), "does not answer"),
]


@pytest.fixture
def failing(monkeypatch):
    def fail(error):
        def submit(*arguments):
            raise error

        monkeypatch.setattr(submission, "submit", submit)

    return fail


@pytest.mark.parametrize(("error", "line"), TROUBLES)
def test_the_page_says_what_is_wrong_and_that_nothing_was_stored(
    error, line, project, make_item, member, failing
):
    make_item("one", "yes", "no")
    ann = member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    failing(error)
    client = Client(raise_request_exception=False)
    client.force_login(ann)
    answer = client.post(f"/p/demo/assignments/{assignment.pk}/submit", {"choice": "1"})
    page = answer.content.decode()
    assert (answer.status_code, answer["Retry-After"]) == (503, "10")
    assert line in page
    assert "nothing was stored" in page


def test_a_clock_set_back_loses_no_judgement(project, make_item, member, monkeypatch):
    make_item("one", "yes", "no", needed=1)
    ann = member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    earlier = timezone.now() - timedelta(hours=1)
    monkeypatch.setattr(timezone, "now", lambda: earlier)
    queue.return_expired(project)
    assert queue.next_assignment(project, ann) == assignment
    response = submission.submit(assignment.pk, ann, TIE)
    assert response.state == Response.State.SUBMITTED
    item = Item.objects.get()
    assert (item.taken, item.submitted, item.state) == (1, 1, Item.State.COMPLETE)


def test_a_lease_from_before_the_project_was_closed_is_judged(project, make_item, member):
    make_item("one", "yes", "no", needed=1)
    make_item("two", "yes", "no", needed=1)
    ann = member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    project.open = False
    project.save()
    client = Client()
    client.force_login(ann)
    assert b"one" in client.get("/p/demo/label").content
    client.post(f"/p/demo/assignments/{assignment.pk}/submit", {"choice": "1"})
    assert Response.objects.get().state == Response.State.SUBMITTED
    assert queue.next_assignment(project, ann) is None
