"""Promotions that are killed, refused, lost: database, server and its next start agree."""

import errno
import json
from contextlib import suppress
from pathlib import Path

import pytest

from openpalm.errors import DataError
from openpalm.feedback.models import Event, Job, ModelVersion, Project, Promotion
from openpalm.feedback.training import promotion, served, servers
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.identity import worker_name
from openpalm.feedback.worker.loop import FULL_DISK_PAUSE_S, Worker, drain
from openpalm.feedback.worker.progress import JobStopped, Progress

REASON = "a good enough reason"


class Killed(BaseException):
    """The worker ends here and stores nothing more."""


@pytest.fixture
def pair(project, model, server):
    """The served model and another one, and a server that has the first."""
    first, second = model("first"), model("second")
    project.served = first
    project.save()
    server.path = first.path
    return first, second


@pytest.fixture(params=["promotion", "undoing"])
def swap(request, project, pair, admin):
    """A swap that waits: (promotion, the model before, the model to be)."""
    made = promotion.propose(project, pair[1], admin, override_reason=REASON)
    if request.param == "promotion":
        return made, *pair
    drain("promote")
    made.refresh_from_db()
    promotion.undo(made, admin)
    return made, *reversed(pair)


def _agree(project, server, model: ModelVersion) -> None:
    """The database, the server and the file for the server's next start name this model."""
    project.refresh_from_db()
    assert project.served == model
    assert server.path == model.path
    assert servers.promoted_path() in (None, model.path)


def _kill_at(monkeypatch, name: str, *, after: bool) -> None:
    """Kills the worker at the first call of this function."""
    real = getattr(promotion, name)

    def call(*arguments):
        monkeypatch.setattr(promotion, name, real)
        if after:
            real(*arguments)
        raise Killed

    monkeypatch.setattr(promotion, name, call)


def _run_killed() -> Job:
    """Runs the job until it is killed; afterwards it waits again, as that of a dead worker."""
    with suppress(Killed):
        Worker().run_one(["promote"])
        pytest.fail("it was not killed")
    job = Job.objects.order_by("-id").first()
    assert job is not None
    Job.objects.filter(pk=job.pk).update(worker="", state=Job.State.QUEUED)
    return job


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("point", ["_store", "write_served"])
def test_a_swap_that_is_killed_is_finished(project, swap, server, monkeypatch, point, after):
    _, before, wanted = swap
    _kill_at(monkeypatch, point, after=after)
    job = _run_killed()
    project.refresh_from_db()
    assert (project.served, server.path) == (before, wanted.path)
    drain("promote")
    job.refresh_from_db()
    assert job.state == Job.State.DONE, job.message
    _agree(project, server, wanted)
    assert servers.promoted_path() == wanted.path


@pytest.mark.parametrize("point", ["_store", "write_served"])
def test_a_killed_swap_that_is_refused_the_second_time_is_taken_back(
    project, swap, server, monkeypatch, point
):
    """Its checkpoint was deleted in between."""
    made, before, wanted = swap
    _kill_at(monkeypatch, point, after=True)
    _run_killed()
    assert server.path == wanted.path
    server.refuses = {wanted.path: "path: holds no checkpoint"}
    drain("promote")
    _agree(project, server, before)
    made.refresh_from_db()
    assert made.error.endswith("holds no checkpoint; the server has the model before it")


def test_a_finished_swap_is_not_done_again(project, swap, server):
    """The worker was killed before the job's last write; another project has promoted since."""
    drain("promote")
    events = Event.objects.count()
    job = Job.objects.order_by("-id")[0]
    Job.objects.filter(pk=job.pk).update(state=Job.State.QUEUED)
    server.path = "another project's"
    drain("promote")
    job.refresh_from_db()
    assert (job.state, server.path) == (Job.State.DONE, "another project's")
    assert Event.objects.count() == events


def test_a_server_that_loads_but_does_not_answer(project, swap, server):
    """It loads slowly and the request was given up: the old model comes back after it."""
    made, before, _ = swap
    server.hangs_up = True
    drain("promote")
    _agree(project, server, before)
    made.refresh_from_db()
    assert "the model server does not answer (" in made.error


def test_a_frozen_worker_that_wakes_takes_its_late_swap_back(project, pair, admin, server, model):
    """Two promotions were made since it froze; it had sent nothing yet."""
    _, second = pair
    promotion.propose(project, second, admin, override_reason=REASON)
    frozen = jobs.take(worker_name(), ["promote"])
    assert frozen is not None
    Job.objects.filter(pk=frozen.pk).update(state=Job.State.QUEUED)
    drain("promote")
    project.refresh_from_db()
    third = model("third")
    promotion.propose(project, third, admin, override_reason=REASON)
    drain("promote")
    progress = Progress(frozen)
    progress.say = lambda message: None  # it was frozen after this
    made = Promotion.objects.get(model=second)
    with pytest.raises(JobStopped):
        promotion._swap(made, second, frozen, progress)
    assert server.path == second.path
    Promotion.objects.filter(pk=made.pk).update(state="queued")  # as when it looked
    with pytest.raises(JobStopped):
        promotion.run(frozen, progress)
    _agree(project, server, third)


def test_a_full_disk_takes_a_swap_back_until_there_is_room(project, swap, server, monkeypatch):
    made, before, wanted = swap
    real = promotion.write_served

    def full(model):
        monkeypatch.setattr(promotion, "write_served", real)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(promotion, "write_served", full)
    worker, pauses = Worker(), []
    monkeypatch.setattr(worker.ending, "wait", pauses.append)
    worker.run_one(["promote"])
    _agree(project, server, before)
    assert pauses == [FULL_DISK_PAUSE_S]
    made.refresh_from_db()
    assert made.error == ""
    worker.run_one(["promote"])
    _agree(project, server, wanted)


def test_a_promoted_checkpoint_that_is_gone(project, pair, admin, server, settings):
    """The supervisor starts the server with the model of its command, and the database says so."""
    first, second = pair
    promotion.propose(project, second, admin, override_reason=REASON)
    drain("promote")
    (Path(second.path) / "manifest.json").unlink()
    served.serve_again(first)
    project.refresh_from_db()
    assert project.served == first
    assert servers.promoted_path() is None
    assert Event.objects.filter(action="model.served", target="first").exists()


def test_a_connection_that_fails_keeps_the_promotion(project, pair, admin, tmp_path):
    _, second = pair
    promotion.propose(project, second, admin, override_reason=REASON)
    drain("promote")
    with pytest.raises(DataError):
        served.connect(str(tmp_path / "none"), "x")
    assert servers.promoted_path() == second.path


def test_of_two_managers_the_second_sees_what_the_first_has_done(project, pair, admin, model):
    """Their pages were loaded at the same time; the first one's swap has ended already."""
    first, second = pair
    theirs = Project.objects.get()
    promotion.propose(project, second, admin, override_reason=REASON)
    drain("promote")
    with pytest.raises(DataError, match="the model second is served already"):
        promotion.propose(theirs, second, admin, override_reason=REASON)
    theirs.served = first  # as on their page
    late = promotion.propose(theirs, model("third"), admin, override_reason=REASON)
    assert late.previous == second
    drain("promote")
    stale = Promotion.objects.get(pk=late.pk)
    promotion.undo(late, admin)
    drain("promote")
    stale.state = Promotion.State.DONE  # as on their page
    with pytest.raises(DataError, match="can be undone"):
        promotion.undo(stale, admin)
    assert not Job.objects.filter(state__in=Job.UNFINISHED).exists()


GARBAGE = [
    b"<html>a proxy</html>",
    b"[]",
    b"{}",
    b'{"data": [], "choices": []}',
    b'{"data": [3], "choices": [{"message": {"content": 3}}]}',
    b'{"data": null, "choices": null}',
    json.dumps({"error": "a text"}).encode(),
]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("status", [200, 500])
def test_a_server_that_answers_garbage(project, swap, server, garbage, status, caplog):
    made, before, _ = swap
    server.garbage, server.status = garbage, status
    drain("promote")
    server.garbage = None
    _agree(project, server, before)
    made.refresh_from_db()
    line = "none of a model server; check OPENPALM_SERVER_URL" if status == 200 else "status 500"
    assert line in made.error
    assert "Traceback" not in caplog.text
