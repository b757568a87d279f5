"""Whatever a job stores it stores in a transaction that checks that the job is its own still.

So a worker that was frozen while another one took over its job writes nothing when it wakes.
"""

import json
from contextlib import contextmanager, nullcontext

import pytest
from django.db import connection
from feedback_prompts import add_prompts

from openpalm.feedback.imports import uploads
from openpalm.feedback.model_server import site_server
from openpalm.feedback.models import Item, Job, Promotion, TrainRun
from openpalm.feedback.training import comparisons, generation, promotion, runs, servers
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.identity import worker_name
from openpalm.feedback.worker.loop import Worker, drain
from openpalm.feedback.worker.progress import Progress

SIZE = 4
WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE")


@pytest.fixture
def enqueue(project, model, admin, server, member, judge, monkeypatch, site):
    """enqueue(kind): a job that has something to do."""
    monkeypatch.setattr(comparisons, "MINIMUM", SIZE)
    own = nullcontext(site_server())
    monkeypatch.setattr(servers, "temporary_server", lambda path, progress: own)
    served, other = model("served"), model("other")
    project.served = served
    project.save()

    def judged() -> None:
        add_prompts(project, 3, text="seen")
        arguments = [{"model": served.pk, "n": 3}]
        generation.start(project, admin, arguments, pairs=1)
        drain("generate")
        for item in Item.objects.filter(project=project):
            judge(item, member("ann"))

    def generate() -> None:
        add_prompts(project, 3)
        generation.start(project, admin, [{"model": served.pk, "n": 2}])

    def select() -> None:
        judged()
        for number in range(2):
            model(f"reward-{number}", "reward", run=_finished_run(project))
        jobs.enqueue("select", project=project, size=2)

    def score() -> None:
        judged()
        jobs.enqueue("score", project=project, model=model("r", "reward").pk)

    def train() -> None:
        judged()
        runs.start(project, "reward", admin, parent=served, settings={"members": 2})

    def compare() -> None:
        add_prompts(project, SIZE, text="hidden", held_out=True)
        comparisons.create(project, other, admin, size=SIZE)

    def statistics() -> None:
        compare()
        drain("compare")
        assert Item.objects.filter(project=project).count() == SIZE
        for item in Item.objects.filter(project=project):
            judge(item, member("ann"))
        jobs.enqueue("statistics", project=project)

    def promote() -> None:
        promotion.propose(project, other, admin, override_reason="a good enough reason")

    def undo() -> None:
        promote()
        drain("promote")
        promotion.undo(Promotion.objects.get(), admin)

    def imported(what: str) -> None:
        rows = [{"prompt": f"{what} {n}", "chosen": "yes", "rejected": "no"} for n in range(3)]
        uploads.folder().mkdir(parents=True, exist_ok=True)
        path = uploads.folder() / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        jobs.enqueue("import", project=project, file=path.name, name="a.jsonl", what=what)

    made = {
        "generate": generate,
        "select": select,
        "score": score,
        "train": train,
        "compare": compare,
        "statistics": statistics,
        "promote": promote,
        "undo": undo,
        "prompts": lambda: imported("prompts"),
        "items": lambda: imported("items"),
    }
    return lambda kind: made[kind]()


# "prompts" and "items" are imports, "undo" is a promotion backwards.
KINDS = (
    *("generate", "select", "score", "train", "compare", "statistics", "promote", "undo"),
    *("prompts", "items"),
)


def _finished_run(project):
    run, _ = TrainRun.objects.get_or_create(project=project, verb="reward", state="finished")
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_write_of_a_job_is_fenced(enqueue, kind, monkeypatch):
    """No statement that writes runs between two fences, but those of jobs.py for the job itself."""
    enqueue(kind)
    fenced: list[bool] = []
    loose: list[str] = []
    real = Progress.writing

    @contextmanager
    def writing(self):
        fenced.append(True)
        try:
            with real(self):
                yield
        finally:
            fenced.pop()

    def look(execute, sql, parameters, many, context):
        if sql.startswith(WRITES) and not fenced and '"lease" = ' not in sql:
            loose.append(sql)
        return execute(sql, parameters, many, context)

    monkeypatch.setattr(Progress, "writing", writing)
    worker = Worker()
    job = jobs.take(worker.name, jobs.KINDS)
    assert job is not None
    with connection.execute_wrapper(look):
        worker._run_job(job, Progress(job, worker.ending))
    job.refresh_from_db()
    assert job.state == Job.State.DONE, job.message
    assert loose == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fence", [0, 1, 2])
def test_a_job_that_another_worker_has_taken_stores_nothing(enqueue, kind, fence, monkeypatch):
    """It is lost at the first, second, third thing that it would store."""
    enqueue(kind)
    job = jobs.take(worker_name(), jobs.KINDS)
    assert job is not None
    worker, real, calls, after = Worker(), jobs.is_own, [], []

    def is_own(mine):
        calls.append(mine)
        if len(calls) == fence + 1:
            Job.objects.filter(pk=mine.pk).update(lease=mine.lease + 1)
            if mine.kind == "promote":
                worker.ending.set()  # it waits for the other one's swap, which never ends here
        return real(mine)

    def look(execute, sql, parameters, many, context):
        if sql.startswith(WRITES) and len(calls) > fence:
            after.append((sql, parameters))
        return execute(sql, parameters, many, context)

    monkeypatch.setattr(jobs, "is_own", is_own)
    with connection.execute_wrapper(look):
        worker._run_job(job, Progress(job, worker.ending))
    if len(calls) <= fence:
        return  # it has fewer things to store
    job.refresh_from_db()
    assert job.state == Job.State.RUNNING
    assert len(calls) == fence + 1
    own = [sql for sql, parameters in after[1:] if '"lease" = ' in sql]
    assert [sql for sql, _ in after[1:]] == own  # conditional on the lease: they change nothing
