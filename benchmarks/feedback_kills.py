"""Every kind of job while its worker is killed or frozen: is everything there exactly once?

    python benchmarks/feedback_kills.py [--database sqlite|postgresql] [--kills 20] [--freezes 4]
                                        [--prompts 60] [--seed 0]

Queues an import, answers to generate, scores, a selection, a training, a comparison, a promotion,
its undoing, and figures. A worker runs them with a stand-in for the model server and for the
commands that train and score. It is killed with SIGKILL at random moments and started again, or
stopped with SIGSTOP while another worker takes its job over, and then woken. At the end every job
is done, and the database, the model server and the folder hold what one run without a kill would
have made, once. Exits 1 on any difference.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from model_server import FakeServer, fake_server
from postgresql import postgresql_server

FAKE = Path(sys.path[0]) / "fake_openpalm.py"
PAIRS = 20
SELECTED = 10
SWAPS = ("model.promoted", "model.promotion_undone")
GIVES_UP_S = 600.0
ANSWER_S = 0.02
DEAD_AFTER_S = 2.0
"""instead of 15 s, so that a freeze need not be longer"""
WORKER = f"""
import sys
from contextlib import contextmanager
from openpalm.cli import feedback_site
from openpalm.cli.feedback import run_worker
feedback_site.open_database(migrate=False)
from openpalm.feedback.training import servers
from openpalm.feedback.worker import jobs, loop, processes
processes.PROGRAM = (sys.executable, {str(FAKE)!r})
jobs.DEAD_AFTER_S, loop.HEARTBEAT_S = {DEAD_AFTER_S}, 0.3
@contextmanager
def site_server(path, progress):
    yield servers.site_server()
servers.temporary_server = site_server
print("ready", flush=True)
run_worker()
"""


def start_worker(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", WORKER]
    worker = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE)
    assert worker.stdout
    assert worker.stdout.readline() == b"ready\n"
    return worker


class Site:
    """The database and the folder, in this process, and what the jobs have to make."""

    def __init__(self, folder: Path, server: FakeServer, prompts: int):
        from openpalm.feedback.models import ModelVersion, Project, User

        self.folder, self.server, self.prompts = folder, server, prompts
        self.admin = User.objects.create_superuser("root", "", "a long enough password")
        self.project = Project.objects.create(slug="demo", name="Demo")
        made = []
        for name, kind in (("base", "policy"), ("next", "policy"), ("taste", "reward")):
            path = folder / "models" / name
            path.mkdir(parents=True)
            (path / "manifest.json").write_text(json.dumps({"sha256": name}), encoding="utf-8")
            row = ModelVersion(project=self.project, name=name, kind=kind, checkpoint=name)
            row.path = str(path)
            row.save()
            made.append(row)
        self.base, self.next, self.taste = made
        Project.objects.update(served=self.base)
        self.project.refresh_from_db()
        server.path = self.base.path

    def queue(self) -> None:
        """Queues jobs of every kind."""
        from openpalm.feedback.models import Comparison, Promotion
        from openpalm.feedback.training import generation
        from openpalm.feedback.worker import jobs

        def add(kind: str, **arguments: Any) -> None:
            jobs.enqueue(kind, project=self.project, user=self.admin, **arguments)

        self._judged_item()
        name = "0123.jsonl"
        rows = [{"prompt": f"Question {n}?"} for n in range(self.prompts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "uploads" / name).write_text(lines, encoding="utf-8")
        add("import", file=name, name=name, what="prompts")
        asked = {"model": self.base.pk, "n": 3}
        generation.start(self.project, self.admin, [asked])
        self._train()
        add("score", model=self.taste.pk)
        add("select", size=SELECTED)
        self._hold_out()
        comparison = Comparison.objects.create(
            project=self.project, challenger=self.next, served=self.base, size=PAIRS
        )
        add("compare", comparison=comparison.pk)
        for undo in (False, True):
            promotion, _ = Promotion.objects.get_or_create(
                project=self.project, model=self.next, previous=self.base, by=self.admin
            )
            add("promote", promotion=promotion.pk, **({"undo": True} if undo else {}))
        add("statistics")

    def _judged_item(self) -> None:
        """Something to train on."""
        from openpalm.feedback.items.new_items import NewCandidate, NewItem, add_items
        from openpalm.feedback.judgements import queue, submission
        from openpalm.feedback.judgements.submission import Judgement

        messages = [{"role": "user", "content": "Which?"}]
        answers = (NewCandidate("this one"), NewCandidate("that one"))
        add_items(self.project, [NewItem(messages, answers, "typed", needed=1)])
        assignment = queue.next_assignment(self.project, self.admin)
        assert assignment is not None
        better = {"better": 0, "worse": 1, "strength": 1}
        submission.submit(assignment.pk, self.admin, Judgement("compare", better, 1000))

    def _train(self) -> None:
        from openpalm.feedback.training import runs

        runs.start(self.project, "reward", self.admin, parent=self.base, settings={"members": 2})

    def _hold_out(self) -> None:
        from openpalm.feedback.items.new_items import add_prompts

        held_out = [([{"role": "user", "content": f"Hidden {n}?"}], "typed") for n in range(PAIRS)]
        add_prompts(self.project, held_out, held_out=True)

    def is_done(self) -> bool:
        from openpalm.feedback.models import Job

        return not Job.objects.filter(state__in=["queued", "running"]).exists()

    def wait_for_job_of(self, pid: int, deadline: float) -> None:
        from openpalm.feedback.models import Job

        taken = Job.objects.filter(state="running", worker__contains=f":{pid}:")
        while not taken.exists() and not self.is_done() and time.monotonic() < deadline:
            time.sleep(0.02)

    def wait_for_progress(self, deadline: float) -> None:
        """Waits: a job fails, as it should, if its worker ends several times before it begins."""
        from openpalm.feedback.models import Job
        from openpalm.feedback.worker.jobs import MAX_ATTEMPTS

        tired = Job.objects.filter(state="running", attempts__gte=MAX_ATTEMPTS - 1)
        while tired.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def differences(self, ends: int) -> Iterator[str]:
        """Lines about what is not as it should be."""
        from openpalm.feedback import models as tables

        for job in tables.Job.objects.exclude(state="done"):
            yield f"job {job.kind} is {job.state}: {job.message}"
        answers = tables.Candidate.objects.filter(draw__isnull=False)
        training = tables.Item.objects.filter(purpose="training")
        events = tables.Event.objects.filter(action__in=SWAPS)
        imported = tables.Job.objects.get(kind="import").result
        run = tables.TrainRun.objects.get()
        promotion = tables.Promotion.objects.get()
        scored = 3 * self.prompts + 2  # those of the comparison come later
        self.project.refresh_from_db()
        want = {
            "prompts": (tables.Prompt.objects.count(), self.prompts + PAIRS + 1),
            "imported": (imported.get("added"), self.prompts),
            "answers": (answers.count(), 3 * self.prompts + 2 * PAIRS),
            "scored": (tables.ModelScore.objects.filter(model=self.taste).count(), scored),
            "selected": (training.exclude(arm="").count(), SELECTED),
            "pairs": (tables.Item.objects.filter(purpose="comparison").count(), PAIRS),
            "comparison": (tables.Comparison.objects.get().state, "judging"),
            "training": (run.state, "finished"),
            "trained": (run.made.count(), 2),
            "snapshots": (tables.Snapshot.objects.count(), 1),
            "promotion": (promotion.state, "undone"),
            "swaps": (events.count(), 2),
            "served": (self.project.served_id, self.base.pk),
            "server": (self.server.path, self.base.path),
        }
        for name, (found, wanted) in want.items():
            if found != wanted:
                yield f"{name}: {found}, not {wanted}"
        sizes = Counter(tables.ItemCandidate.objects.values_list("item", flat=True)).values()
        if set(sizes) != {2}:
            yield f"items of {set(sizes)} answers"
        if (extra := len(self.server.requests) - answers.count()) > 8 * ends:
            yield f"{extra} answers were asked for again after {ends} ends"
        for folder in ("scores", "uploads", "snapshots"):
            left = [p.name for p in (self.folder / folder).glob("*.jsonl")]
            if len(left) > (folder == "snapshots"):
                yield f"left in {folder}: {left}"


def run(site: Site, environment: dict[str, str], kills: int, freezes: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    ends = ["kill"] * kills + ["freeze"] * freezes
    chance.shuffle(ends)
    deadline = time.monotonic() + GIVES_UP_S
    done = 0
    while not site.is_done() and time.monotonic() < deadline:
        worker = start_worker(environment)
        with ExitStack() as stack:
            stack.callback(_end, worker)
            if not ends:
                while not site.is_done() and time.monotonic() < deadline:
                    time.sleep(0.1)
                break
            how = ends.pop()
            done += 1
            site.wait_for_job_of(worker.pid, deadline)
            time.sleep(chance.uniform(0, 1.5))
            site.wait_for_progress(deadline)
            if how == "freeze":
                worker.send_signal(signal.SIGSTOP)
                other = start_worker(environment)
                stack.callback(_end, other)
                time.sleep(DEAD_AFTER_S + chance.uniform(0.8, 2.0))
                worker.send_signal(signal.SIGCONT)
                time.sleep(chance.uniform(0.2, 1.0))
    found = list(site.differences(done))
    print(f"{done} ends of the worker ({len(ends)} were not reached)")
    return found


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    if worker.stdout:
        worker.stdout.close()


@contextmanager
def prepared(folder: Path, url: str | None) -> Iterator[tuple[FakeServer, dict[str, str]]]:
    """Django in this process with an empty database; the model server, the worker's environment."""
    os.environ["OPENPALM_FEEDBACK_DIR"] = str(folder)
    os.environ["DJANGO_SETTINGS_MODULE"] = "openpalm.feedback.settings"
    os.environ.pop("DATABASE_URL", None)
    if url:
        os.environ["DATABASE_URL"] = url
    with fake_server() as server:

        def answer(body: dict[str, Any]) -> str:
            time.sleep(ANSWER_S)
            return f"{server.path} {body['seed']}"

        server.answer = answer
        os.environ |= {"OPENPALM_SERVER_URL": server.url, "OPENPALM_ADMIN_KEY": server.admin_key}
        from openpalm.cli import feedback_site

        feedback_site.open_database()
        environment = dict(os.environ) | {"FAKE_STEP_S": "0.1", "FAKE_STEPS": "10"}
        yield server, environment


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--url", help="of an empty database, instead of --database")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--freezes", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="feedback-kills-")))
        url = given.url
        if url is None and given.database == "postgresql":
            server = stack.enter_context(postgresql_server(fsync=True))
            url = stack.enter_context(server.database())
        model_server, environment = stack.enter_context(prepared(folder, url))
        site = Site(folder, model_server, given.prompts)
        site.queue()
        found = run(site, environment, given.kills, given.freezes, given.seed)
        from django.db import connections

        connections.close_all()
    for line in found:
        print(line)
    print("everything is there once" if not found else f"{len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
