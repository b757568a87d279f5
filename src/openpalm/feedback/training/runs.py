"""Trainings: the ordinary command in a process of its own, followed in the database.

start() makes a TrainRun and a job. The worker freezes the judgements, runs the command, follows its
files and adds the models that it made. A run that was interrupted continues from its saves.
"""

import signal
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import Any

from django.conf import settings as site
from django.db import transaction
from django.utils import timezone

from openpalm.errors import DataError, WorkError
from openpalm.feedback.accounts import audit
from openpalm.feedback.models import Job, ModelVersion, Project, Response, TrainRun, User
from openpalm.feedback.training import snapshots
from openpalm.feedback.training.commands import check_settings, command_words
from openpalm.feedback.training.follow import RunFollower, alarms_of
from openpalm.feedback.training.registry import POLICY, REWARD, register
from openpalm.feedback.training.snapshots import KINDS_OF_VERB, Filter, default_filter
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.processes import END_S, Command, Running, wait_until_unlocked
from openpalm.feedback.worker.progress import Progress

State = TrainRun.State
KILLED_TIMES = 3
"""times in a row that a killed process is started again without a step in between"""
_left_over: dict[tuple[int, int], float] = {}
"""trainings that ended and have a process all the same, and when that was first seen"""
_LOCKED = "another process is training in it"


@transaction.atomic
def start(
    project: Project,
    verb: str,
    user: User | None,
    *,
    parent: ModelVersion,
    chosen: Filter | None = None,
    settings: Mapping[str, Any] | None = None,
    reward: ModelVersion | None = None,
    reward_run: TrainRun | None = None,
) -> TrainRun:
    """Queues a training of `parent`. Raises DataError in words for the page.

    ppo takes its reward from `reward`, or from the model that `reward_run`, which is still
    queued, will have made. The judgements are those that `chosen` lets through now.
    """
    given = check_settings(verb, settings or {})
    _check_models(project, verb, parent, reward, reward_run)
    if verb != "ppo":
        chosen = _newest(project, verb, chosen or default_filter(project, verb))
        given["filter"] = asdict(chosen)
    elif reward_run is not None:
        given["reward_run"] = reward_run.pk
    run = TrainRun.objects.create(
        project=project,
        verb=verb,
        parent=parent,
        reward_model=reward,
        settings=given,
        created_by=user,
    )
    run.directory = str(Path(site.FEEDBACK_DIR) / "runs" / f"{run.pk}-{verb}")
    run.save(update_fields=["directory"])
    job = jobs.enqueue("train", project=project, user=user, run=run.pk)
    audit.record(
        "training.started", user=user, project=project, target=run.pk, verb=verb, job=job.pk
    )
    return run


def _check_models(
    project: Project,
    verb: str,
    parent: ModelVersion,
    reward: ModelVersion | None,
    reward_run: TrainRun | None,
) -> None:
    for model in filter(None, (parent, reward)):
        if model.project_id != project.pk or not model.path:
            raise DataError(f"the model {model} has no checkpoint in this project")
    if parent.kind != POLICY and verb != "reward":
        raise DataError(f"{verb} trains a model that answers; {parent} is a reward model")
    if verb != "ppo":
        return
    if reward is None and (reward_run is None or reward_run.project_id != project.pk):
        raise DataError("ppo needs a reward model; train one first")
    if reward is not None and reward.kind != REWARD:
        raise DataError(f"the model {reward} is no reward model")


def _newest(project: Project, verb: str, chosen: Filter) -> Filter:
    """The filter with the kinds that the verb reads, up to the newest judgement of this moment."""
    kinds = [k for k in KINDS_OF_VERB[verb] if not chosen.kinds or k in chosen.kinds]
    found = Response.objects.filter(project=project).order_by("-id")
    newest = found.values_list("id", flat=True).first()
    limited = replace(chosen, kinds=tuple(kinds), up_to=chosen.up_to or newest or 0)
    if not kinds or not snapshots.judgements(project, limited).exists():
        raise DataError(
            f"there is nothing for {verb} to train on: no judgement of the kinds "
            f"{', '.join(KINDS_OF_VERB[verb])} by {', '.join(chosen.author_kinds)} in force"
        )
    return limited


def stop(run: TrainRun, user: User | None) -> bool:
    """Asks a training to save and end; False if it has ended already."""
    job = Job.objects.filter(kind="train", arguments__run=run.pk).order_by("-id").first()
    if job is None or not jobs.stop(job):
        return False
    audit.record("training.stopped", user=user, project=run.project, target=run.pk)
    return True


@transaction.atomic
def resume(run: TrainRun, user: User | None) -> Job:
    """Continues a training that was stopped or failed from its last save."""
    # Conditional: of two managers at the same time only one resumes it.
    ended = TrainRun.objects.filter(pk=run.pk, state__in=(State.STOPPED, State.FAILED))
    if not ended.update(state=State.QUEUED, error="", finished_at=None):
        raise DataError(f"training {run.pk} is {run.state}; only an ended one can be resumed")
    audit.record("training.resumed", user=user, project=run.project, target=run.pk)
    return jobs.enqueue("train", project=run.project, user=user, run=run.pk)


def end_left_over() -> int:
    """Ends processes of trainings that ended while their worker was dead; returns how many.

    A worker that lives ends its own within END_S, so those that are older have none.
    """
    ended = TrainRun.objects.filter(state__in=(State.STOPPED, State.FAILED))
    alive: dict[tuple[int, int], Running] = {}
    for run in ended.filter(process__isnull=False).only("process"):
        running = Running.from_json(run.process)
        if running is not None and running.alive:
            alive[run.pk, running.pid] = running
        else:
            ended.filter(pk=run.pk).update(process=None)
    for key in set(_left_over) - set(alive):
        del _left_over[key]
    waited = {key: monotonic() - _left_over.setdefault(key, monotonic()) for key in alive}
    late = [key for key in alive if waited[key] > END_S]
    for key in late:
        alive[key].signal(signal.SIGKILL if waited[key] > 2 * END_S else signal.SIGTERM)
    return len(late)


def log_file(run: TrainRun) -> Path:
    return Path(f"{run.directory}.log")


# --- in the worker


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "train"."""
    train_run = TrainRun.objects.select_related(
        "project", "parent", "snapshot", "reward_model"
    ).get(pk=job.arguments["run"])
    if train_run.state == State.FINISHED:  # killed between the last two writes
        return {"models": list(train_run.made.values_list("id", flat=True))}
    made = _Training(train_run, progress).run()
    with progress.writing():
        ended = {"state": State.FINISHED, "error": "", "process": None}
        TrainRun.objects.filter(pk=train_run.pk).update(finished_at=timezone.now(), **ended)
        _follow_up(train_run, made, job.created_by)
    return {"models": [model.pk for model in made]}


def _follow_up(run: TrainRun, made: list[ModelVersion], user: User | None) -> None:
    """Scores by the new reward models, then all figures."""
    for model in made:
        if model.kind == REWARD:
            jobs.enqueue("score", project=run.project, user=user, model=model.pk)
    jobs.enqueue_once("statistics", project=run.project)


class _Training:
    """One run in the worker: a process for each member of an ensemble, usually one."""

    def __init__(self, run: TrainRun, progress: Progress):
        self.run_row = run
        self.progress = progress
        self.members = int(run.settings.get("members", 1))
        self.left_over = Running.from_json(run.process)

    def run(self) -> list[ModelVersion]:
        row = self.run_row
        self._prepare()
        row.state, row.started_at = State.RUNNING, row.started_at or timezone.now()
        self._save("state", "started_at", "snapshot", "reward_model")
        return [self._run_member(member) for member in range(self.members)]

    def _save(self, *fields: str) -> None:
        with self.progress.writing():
            self.run_row.save(update_fields=fields)

    def _prepare(self) -> None:
        """Freezes the judgements, and finds the reward model that an earlier run has made."""
        row = self.run_row
        if row.snapshot is None and "filter" in row.settings:
            self.progress.say("freezing the judgements")
            chosen = Filter(**row.settings["filter"])
            writing = self.progress.writing
            row.snapshot = snapshots.freeze(row.project, chosen, row.created_by, writing)
        reward_run = row.settings.get("reward_run")
        if row.verb == "ppo" and row.reward_model is None and reward_run:
            made = ModelVersion.objects.filter(run=reward_run, kind=REWARD, project=row.project)
            row.reward_model = made.order_by("id").first()
            if row.reward_model is None:
                raise WorkError(f"training {reward_run} made no reward model; see its error")

    def _run_member(self, member: int) -> ModelVersion:
        row = self.run_row
        out = Path(row.directory)
        out = out / f"member-{member + 1}" if self.members > 1 else out
        command = Command(command_words(row, out, member), log_file(row))
        row.command = ["openpalm", *command.words]
        self._save("command")
        which = f", model {member + 1} of {self.members}" if self.members > 1 else ""
        self.progress.say(f"openpalm {row.verb}{which}")
        follower = RunFollower(out)
        status = self._run_until_ended(command, out, follower, member)
        self._store(follower, member, now=True)
        if status:
            raise WorkError(self._reason(command, status))
        return self._made(out, member)

    def _run_until_ended(
        self, command: Command, out: Path, follower: RunFollower, member: int
    ) -> int:
        """Runs the command again after a kill from outside; returns the exit status."""
        kills, reached = 0, 0

        def check() -> None:
            self.progress.check()
            self._store(follower, member)

        while True:
            wait_until_unlocked(out, check)
            status = command.run(check=check, remember=self._remember, left_over=self.left_over)
            self.left_over = None
            if status == 2 and _LOCKED in command.last_line():
                continue  # a process that nobody knew had begun in the same moment
            if status not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                return status
            kills = 1 if follower.step > reached else kills + 1
            reached = follower.step
            if kills > KILLED_TIMES:
                return status

    def _remember(self, running: Running) -> None:
        self.run_row.process = running.to_json()
        self._save("process")

    def _store(self, follower: RunFollower, member: int, *, now: bool = False) -> None:
        if not follower.changed(now=now):
            return
        each = follower.steps
        step, steps = member * each + follower.step, self.members * each
        row = self.run_row
        row.step, row.steps, row.figures = step, steps, follower.figures
        row.curve, row.alarms = follower.curve, alarms_of(follower.rows)
        self._save("step", "steps", "figures", "curve", "alarms")
        self.progress.move_to(step, steps)

    def _reason(self, command: Command, status: int) -> str:
        """Why the command failed, and where its log is."""
        row, line = self.run_row, command.failure(status)
        if "early-stopping" in line or "being gamed" in line:
            row.alarms = [*row.alarms, command.last_line().removeprefix("openpalm: error: ")]
            self._save("alarms")
        return line

    def _made(self, out: Path, member: int) -> ModelVersion:
        row = self.run_row
        name = row.settings.get("name") or f"{row.verb}-{row.pk}"
        if self.members > 1:
            name = f"{name}.{member + 1}"
        kind = REWARD if row.verb == "reward" else POLICY
        with self.progress.writing():
            return register(row.project, out, name=name, kind=kind, parent=row.parent, run=row)
