"""The queue of jobs: order, one worker a job, jobs of dead workers, stopping."""

import errno
import os
import subprocess
import sys
from datetime import timedelta

import pytest
from django.db import OperationalError
from django.utils import timezone

from openpalm.errors import DataError, StorageError
from openpalm.feedback.models import (
    Comparison,
    Job,
    ModelVersion,
    Project,
    Promotion,
    TrainRun,
)
from openpalm.feedback.worker import handlers, jobs
from openpalm.feedback.worker.identity import host, is_gone, started, worker_name
from openpalm.feedback.worker.loop import FULL_DISK_PAUSE_S, Worker, drain
from openpalm.feedback.worker.progress import JobStopped, Progress, WorkerEnds

State = Job.State


@pytest.fixture
def other_project(db):
    return Project.objects.create(slug="other", name="Other")


@pytest.fixture
def runs(monkeypatch):
    """runs(function): the handler of all jobs."""

    def set_handler(function):
        monkeypatch.setattr("openpalm.feedback.worker.loop.handler", lambda kind: function)

    return set_handler


def test_the_oldest_job_is_taken_and_no_job_twice(project):
    first, second = (jobs.enqueue("import", number=n) for n in (1, 2))
    assert jobs.take("a", jobs.KINDS).pk == first.pk
    assert jobs.take("b", jobs.KINDS).pk == second.pk
    assert jobs.take("a", jobs.KINDS) is None


def test_jobs_of_one_project_run_in_order(project, other_project):
    first = jobs.enqueue("import", project=project)
    second = jobs.enqueue("select", project=project)
    third = jobs.enqueue("import", project=other_project)
    here = worker_name()
    taken = jobs.take(here, jobs.KINDS)
    assert taken.pk == first.pk
    assert jobs.take(here, jobs.KINDS).pk == third.pk
    assert jobs.take(here, jobs.KINDS) is None
    assert jobs.finish(taken, State.DONE)
    assert jobs.take(here, jobs.KINDS).pk == second.pk


def test_trainings_and_figures_hold_up_no_other_kind(project):
    here = worker_name()
    jobs.enqueue("train", project=project)
    jobs.enqueue("statistics", project=project)
    jobs.enqueue("promote", project=project)
    assert jobs.take(here, jobs.SLOTS["training"]).kind == "train"
    assert jobs.take(here, jobs.SLOTS["figures"]).kind == "statistics"
    assert jobs.take(here, jobs.SLOTS["other"]).kind == "promote"
    assert set().union(*jobs.SLOTS.values()) == set(jobs.KINDS) == set(handlers.HANDLERS)


def test_an_unknown_kind_is_a_bug(db):
    with pytest.raises(ValueError, match="no such kind"):
        jobs.enqueue("cook")


def test_work_without_arguments_waits_once(project):
    first = jobs.enqueue_once("statistics", project=project)
    assert jobs.enqueue_once("statistics", project=project) == first
    jobs.take(worker_name(), jobs.KINDS)
    assert jobs.enqueue_once("statistics", project=project) != first


@pytest.fixture
def passes(monkeypatch):
    """passes(seconds): that much later on the clock that nobody sets."""
    now = [1000.0]
    monkeypatch.setattr(jobs, "monotonic", lambda: now[0])
    monkeypatch.setattr(jobs, "_beats", {})

    def wait(seconds):
        now[0] += seconds

    return wait


def _dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_process_is_known_by_number_and_start():
    assert not is_gone(worker_name())
    assert is_gone(f"{host()}:{os.getpid()}:another start")
    assert is_gone(f"{host()}:{_dead_process()}:1")
    assert not is_gone("another-machine:1:1")
    assert started(_dead_process()) is None


def test_a_worker_in_another_container_of_this_host_name_is_not_gone(monkeypatch):
    """Its number of a process belongs to another process here, or to none."""
    name, _, _ = worker_name().partition(":")
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    host.cache_clear()
    other = host()
    monkeypatch.undo()
    host.cache_clear()
    assert host() == name
    assert other != name
    assert other.rpartition("-")[0] == name.rpartition("-")[0]
    assert len(f"{other}:4194304:{2**60}") <= 64
    assert not is_gone(f"{other}:{_dead_process()}:1")


def test_a_zombie_counts_as_ended():
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()
    try:
        while started(process.pid) is not None:
            pass
    finally:
        process.stdout.close()
        process.wait()


def test_the_job_of_a_dead_worker_is_taken_up_again(project):
    job = jobs.enqueue("import", project=project)
    assert jobs.take(f"{host()}:{_dead_process()}:1", jobs.KINDS).pk == job.pk
    assert jobs.take(worker_name(), jobs.KINDS).attempts == 2


def test_of_other_machines_the_heartbeat_tells(project, passes):
    job = jobs.enqueue("import", project=project)
    old = jobs.take("far:1:1", jobs.KINDS)
    assert jobs.take(worker_name(), jobs.KINDS) is None
    passes(jobs.DEAD_AFTER_S - 1)
    assert jobs.beat(old)
    passes(2)
    assert jobs.take(worker_name(), jobs.KINDS) is None
    passes(jobs.DEAD_AFTER_S + 1)
    assert jobs.take(worker_name(), jobs.KINDS).pk == job.pk
    job.refresh_from_db()
    assert job.state == State.RUNNING


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_jumps_takes_no_job_from_its_worker(project, passes, monkeypatch, hours):
    jobs.enqueue("import", project=project)
    jobs.take("far:1:1", jobs.KINDS)
    assert jobs.take(worker_name(), jobs.KINDS) is None
    jumped = timezone.now() + timedelta(hours=hours)
    monkeypatch.setattr(timezone, "now", lambda: jumped)
    passes(jobs.DEAD_AFTER_S - 1)
    assert jobs.take(worker_name(), jobs.KINDS) is None
    passes(2)  # and the worker is dead after the same time as ever
    assert jobs.take(worker_name(), jobs.KINDS) is not None


def test_a_worker_that_was_frozen_writes_nothing(project, passes):
    """Also if the job came back to the same worker: the number of its lease is another."""
    jobs.enqueue("import", project=project)
    frozen = jobs.take("far:1:1", jobs.KINDS)
    jobs.requeue_abandoned()
    passes(jobs.DEAD_AFTER_S + 1)
    taken = jobs.take("far:1:1", jobs.KINDS)
    assert not jobs.beat(frozen)
    assert not jobs.report(frozen)
    assert not jobs.give_back(frozen)
    assert not jobs.finish(frozen, State.FAILED, message="an error of the frozen one")
    for progress, may in ((Progress(frozen), False), (Progress(taken), True)):
        try:
            with progress.writing():
                Project.objects.update(name="written")
            assert may
        except JobStopped:
            assert not may
            assert progress.lost.is_set()
            assert Project.objects.get().name == "Demo"
    taken.refresh_from_db()
    assert (taken.state, taken.message) == (State.RUNNING, "")


def test_a_job_that_kills_its_workers_fails_in_the_end(project):
    run = TrainRun.objects.create(project=project, verb="dpo")
    job = jobs.enqueue("train", project=project, run=run.pk)
    for _ in range(jobs.MAX_ATTEMPTS):
        assert jobs.take(f"{host()}:{_dead_process()}:1", jobs.KINDS) is not None
    assert jobs.take(worker_name(), jobs.KINDS) is None
    job.refresh_from_db()
    run.refresh_from_db()
    assert job.state == State.FAILED
    assert run.state == TrainRun.State.FAILED
    assert run.error == job.message
    assert run.error.startswith("the worker ended 5 times while it ran this job")


def test_a_job_that_gets_on_may_be_killed_any_number_of_times(project):
    job = jobs.enqueue("train", project=project)
    for done in range(1, 2 * jobs.MAX_ATTEMPTS):
        taken = jobs.take(f"{host()}:{_dead_process()}:1", jobs.KINDS)
        progress = Progress(taken)
        progress.move_to(done, 100)
        progress.say("a step")
    assert jobs.take(worker_name(), jobs.KINDS).pk == job.pk


def test_the_worker_stores_progress_and_result(project, runs):
    def handler(job, progress):
        progress.start(3, "counting")
        progress.advance(2)
        return {"found": job.arguments["n"]}

    runs(handler)
    job = jobs.enqueue("import", project=project, n=5)
    assert drain() == 1
    job.refresh_from_db()
    assert (job.state, job.done, job.total, job.message) == (State.DONE, 2, 3, "counting")
    assert job.result == {"found": 5}
    assert job.finished_at is not None


def test_a_failed_job_says_why(project, runs, caplog):
    errors = iter([DataError("the file is\nempty"), RuntimeError("a bug")])

    def handler(job, progress):
        raise next(errors)

    runs(handler)
    for _ in range(2):
        jobs.enqueue("import", project=project)
    drain()
    first, second = Job.objects.order_by("id")
    assert (first.state, first.message) == (State.FAILED, "the file is empty")
    assert second.message == "RuntimeError: a bug (the worker's log says where)"
    assert "RuntimeError: a bug" in caplog.text


def test_a_worker_with_a_lost_thread_ends(monkeypatch):
    """Its jobs of the other slot would wait for ever."""

    def run_one(kinds):
        raise OSError("no space left on device")

    worker = Worker()
    monkeypatch.setattr(worker, "run_one", run_one)
    worker._run_slot(("train",))
    assert worker.ending.is_set()


def test_a_bug_in_a_job_ends_the_training_that_it_was_for(project, runs):
    training = TrainRun.objects.create(project=project, verb="dpo", state="running")

    def handler(job, progress):
        raise RuntimeError("a bug")

    runs(handler)
    jobs.enqueue("import", project=project, run=training.pk)
    drain()
    training.refresh_from_db()
    assert (training.state, training.error[:19]) == ("failed", "RuntimeError: a bug")


def test_a_stopped_job_ends_at_its_next_report(project, runs):
    reached = []

    def handler(job, progress):
        progress.start(10)
        jobs.stop(Job.objects.get(pk=job.pk))
        progress.say("the next report")
        reached.append(True)

    runs(handler)
    job = jobs.enqueue("import", project=project)
    drain()
    job.refresh_from_db()
    assert job.state == State.STOPPED
    assert not reached
    assert not jobs.stop(job)


def test_a_waiting_job_is_stopped_at_once(project):
    job = jobs.enqueue("import", project=project)
    assert jobs.stop(job)
    assert jobs.take(worker_name(), jobs.KINDS) is None


def test_a_worker_that_ends_gives_its_job_back(project, runs):
    worker = Worker()

    def handler(job, progress):
        worker.ending.set()
        progress.check()

    runs(handler)
    job = jobs.enqueue("import", project=project)
    assert worker.run_one(jobs.KINDS)
    job.refresh_from_db()
    assert (job.state, job.worker, job.attempts) == (State.QUEUED, "", 0)


def test_a_database_that_was_away_costs_no_job(project, runs, monkeypatch, caplog, passes):
    tries = []

    def handler(job, progress):
        tries.append(True)
        if len(tries) == 1:
            raise OperationalError("the connection\nis lost")
        return {"tries": len(tries)}

    runs(handler)
    monkeypatch.setattr("django.db.connections.close_all", lambda: None)  # the test's own
    worker = Worker()
    monkeypatch.setattr(worker.ending, "wait", lambda seconds: None)
    job = jobs.enqueue("import", project=project)
    assert not worker._safely(lambda: worker.run_one(jobs.KINDS))
    assert "the connection is lost; trying again" in caplog.text
    assert not worker.run_one(jobs.KINDS)
    passes(jobs.DEAD_AFTER_S + 1)
    assert worker.run_one(jobs.KINDS)
    job.refresh_from_db()
    assert (job.state, job.result) == (State.DONE, {"tries": 2})


def test_waiting_ends_with_the_worker(project):
    worker = Worker()
    progress = Progress(jobs.enqueue("import"), worker.ending)
    worker.ending.set()
    with pytest.raises(WorkerEnds):
        progress.wait(3600)


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: StorageError("given.jsonl")])
def test_a_job_waits_for_room_on_a_full_disk(project, runs, monkeypatch, caplog, wrap):
    tries, pauses = [], []

    def handler(job, progress):
        tries.append(job.pk)
        if len(tries) <= 2 * jobs.MAX_ATTEMPTS:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise wrap(error) from None
        return {"tries": len(tries)}

    runs(handler)
    worker = Worker()
    monkeypatch.setattr(worker.ending, "wait", pauses.append)
    job = jobs.enqueue("import", project=project)
    worker.run_one(jobs.KINDS)
    job.refresh_from_db()
    assert job.state == State.QUEUED
    assert job.message.startswith("the disk is full (")
    assert job.message.endswith("it continues when there is room")
    assert len(caplog.records) == 1
    assert "Traceback" not in caplog.text
    while worker.run_one(jobs.KINDS):
        pass
    job.refresh_from_db()
    assert (job.state, job.result) == (State.DONE, {"tries": 2 * jobs.MAX_ATTEMPTS + 1})
    assert pauses == [FULL_DISK_PAUSE_S] * 2 * jobs.MAX_ATTEMPTS


def test_another_error_of_the_disk_is_one_line(project, runs, caplog):
    def handler(job, progress):
        raise PermissionError(errno.EACCES, "Permission denied", "scores/1.jsonl")

    runs(handler)
    job = jobs.enqueue("import", project=project)
    drain()
    job.refresh_from_db()
    assert job.state == State.FAILED
    assert job.message == "[Errno 13] Permission denied: 'scores/1.jsonl'"
    assert not caplog.records


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("undo", [False, True])
def test_what_a_stopped_job_was_for_ends_with_it(project, admin, running, undo):
    """At once: its worker may be killed before it notices."""
    model = ModelVersion.objects.create(project=project, name="m")
    run = TrainRun.objects.create(project=project, verb="dpo")
    comparison = Comparison.objects.create(project=project, challenger=model, served=model)
    state = Promotion.State.DONE if undo else Promotion.State.QUEUED
    promotion = Promotion.objects.create(project=project, model=model, by=admin, state=state)
    given = {"train": {"run": run.pk}, "compare": {"comparison": comparison.pk}}
    given["promote"] = {"promotion": promotion.pk, "undo": undo}
    for kind, arguments in given.items():
        job = jobs.enqueue(kind, project=project, **arguments)
        if running:
            assert jobs.take(worker_name(), [kind]).pk == job.pk
        assert jobs.stop(job) == (not running or kind != "promote")
    for each in (run, comparison, promotion):
        each.refresh_from_db()
    why = "stopped" if running else "stopped before it began"
    assert run.state == TrainRun.State.STOPPED
    assert (comparison.state, comparison.result) == ("failed", {"reason": why})
    if running:  # the server may have the model
        assert (promotion.state, promotion.error) == (state, "")
        return
    assert (promotion.state, promotion.error) == ("done" if undo else "failed", why)


def test_one_promotion_runs_on_the_site(project, other_project):
    """All projects have one model server."""
    first = jobs.enqueue("promote", project=project)
    jobs.enqueue("promote", project=other_project)
    behind = jobs.enqueue("select", project=Project.objects.create(slug="third", name="Third"))
    here = worker_name()
    taken = jobs.take(here, jobs.KINDS)
    assert taken.pk == first.pk
    assert jobs.take(here, jobs.KINDS).pk == behind.pk
    assert jobs.take(here, jobs.KINDS) is None
    jobs.finish(taken, State.DONE)
    assert jobs.take(here, jobs.KINDS).kind == "promote"


def test_doing_again_what_was_done_is_no_progress(project):
    """A job that kills its worker at the third thing each time fails in the end."""
    job = jobs.enqueue("import", project=project)
    for attempt in range(jobs.MAX_ATTEMPTS):
        taken = jobs.take(f"{host()}:{_dead_process()}:1", jobs.KINDS)
        assert taken is not None, attempt
        progress = Progress(taken)
        progress.start(10)
        for _ in range(2):
            progress.advance()
        progress.say("the third")
        job.refresh_from_db()
        assert job.done == 2
    assert jobs.take(worker_name(), jobs.KINDS) is None
    job.refresh_from_db()
    assert job.state == State.FAILED


def test_progress_after_a_kill_is_stored_at_once(project):
    job = jobs.enqueue("import", project=project)
    for done in (1, 2, 3):
        progress = Progress(jobs.take(f"{host()}:{_dead_process()}:1", jobs.KINDS))
        progress.start(10)
        progress.move_to(done)
    job.refresh_from_db()
    assert (job.done, job.attempts) == (3, 1)
