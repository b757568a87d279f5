"""A database that is away or full, a clock that is set back, a project that is closed."""

import errno
import logging
from datetime import timedelta

import pytest
from django.conf import settings
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import InterfaceError, OperationalError
from django.test import Client
from django.utils import timezone
from django.utils.module_loading import import_string

from openpalm.feedback.accounts import audit, throttle
from openpalm.feedback.imports import uploads
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.manage import prompts
from openpalm.feedback.models import Item, Job, Response
from openpalm.feedback.quality import job

TIE = Judgement("compare", {"tie": [0, 1]})
TROUBLES = [
    (OperationalError("database or disk is full"), "The disk of this site is full"),
    (OperationalError("attempt to write a readonly database"), "cannot be written"),
    (OperationalError("connection failed: Connection refused"), "does not answer"),
    (InterfaceError("connection already closed"), "does not answer"),
    (OSError(errno.ENOSPC, "No space left on device"), "The disk of this site is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk of this site is full"),
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


@pytest.mark.parametrize(("error", "line"), TROUBLES)
def test_the_log_has_one_line_of_it(error, line):
    """A traceback says nothing of the cause, and there is one for each request of each labeler."""
    assert "one_line" in settings.LOGGING["handlers"]["stderr"]["filters"]
    one_line = import_string(settings.LOGGING["filters"]["one_line"]["()"])()
    for raised, is_trouble in ((error, True), (ValueError("a bug"), False)):
        about = (type(raised), raised, None)
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "Failed: %s", ("/p",), about)
        assert one_line.filter(record)
        text = logging.Formatter("%(message)s").format(record)
        assert text == (f"Failed: /p: {error}" if is_trouble else "Failed: /p\nValueError: a bug")


def test_an_upload_to_a_full_disk_leaves_nothing(project, admin, settings, tmp_path, monkeypatch):
    settings.FEEDBACK_DIR = tmp_path
    full = OSError(errno.ENOSPC, "No space left on device")

    def flush(file):
        raise full

    monkeypatch.setattr(uploads, "flush", flush)
    client = Client(raise_request_exception=False)
    client.force_login(admin)
    file = SimpleUploadedFile("a.txt", b"one\n")
    answer = client.post("/p/demo/prompts/upload", {"file": file, "what": "prompts"})
    assert answer.status_code == 503
    assert list((tmp_path / "uploads").iterdir()) == []
    assert not Job.objects.exists()
    monkeypatch.undo()
    settings.FEEDBACK_DIR = tmp_path

    def away(*arguments, **about):
        raise OperationalError("database or disk is full")

    monkeypatch.setattr(prompts, "enqueue", away)
    file = SimpleUploadedFile("a.txt", b"one\n")
    answer = client.post("/p/demo/prompts/upload", {"file": file, "what": "prompts"})
    assert answer.status_code == 503
    assert list((tmp_path / "uploads").iterdir()) == []


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


@pytest.mark.django_db
def test_a_clock_set_back_locks_nobody_out(monkeypatch):
    for _ in range(2 * throttle.FREE):
        throttle.begin_attempt("ann", "192.0.2.1")
    assert throttle.seconds_to_wait("ann", "192.0.2.1") > 1
    earlier = timezone.now() - timedelta(hours=1)
    monkeypatch.setattr(timezone, "now", lambda: earlier)
    assert throttle.seconds_to_wait("ann", "192.0.2.1") == 0


def test_a_clock_set_back_keeps_the_figures_new(project, make_item, monkeypatch):
    now = timezone.now()
    Job.objects.create(
        kind="statistics", project=project, state="done", started_at=now, finished_at=now
    )
    audit.record("anything", user=None, project=project, target="x")
    monkeypatch.setattr(timezone, "now", lambda: now - timedelta(hours=1))
    assert job.enqueue_due() == 1


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
