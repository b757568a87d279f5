"""Trainings, with a stand-in for the command: command line, progress, models, kills, errors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openpalm.errors import DataError
from openpalm.feedback.models import Event, Job, ModelVersion, TrainRun
from openpalm.feedback.training import runs
from openpalm.feedback.training.commands import OPTIONS, check_settings
from openpalm.feedback.training.follow import RunFollower, alarms_of
from openpalm.feedback.training.snapshots import Filter
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.identity import started
from openpalm.feedback.worker.loop import Worker, drain
from openpalm.feedback.worker.processes import END_S, Running

State = TrainRun.State


@pytest.fixture
def judged(project, make_item, judge, member):
    """A project with four judgements."""
    for n in range(4):
        judge(make_item(f"question {n}", "good", "bad"), member("ann"))
    return project


def _starts(run: TrainRun, folder: str = "") -> list[list[str]]:
    text = (Path(run.directory) / folder / "starts").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _steps(run: TrainRun) -> list[int]:
    lines = (Path(run.directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_training_becomes_a_model(judged, model, admin):
    base = model("base")
    run = runs.start(judged, "dpo", admin, parent=base, settings={"beta": 0.2, "steps": 3})
    assert run.state == State.QUEUED
    drain("train")
    run.refresh_from_db()
    assert (run.state, run.step, run.steps, run.error) == (State.FINISHED, 3, 3, "")
    assert run.curve == [[1, 1.0], [2, 0.5], [3, 1 / 3]]
    assert run.figures["loss"] == 1 / 3
    made = run.made.get()
    assert (made.name, made.kind, made.parent) == (f"dpo-{run.pk}", "policy", base)
    assert made.checkpoint == json.loads(Path(made.path, "manifest.json").read_text())["sha256"]
    assert run.snapshot.judgements == 4
    (words,) = _starts(run)
    assert words == run.command[1:]
    assert words[:7] == [
        "dpo",
        "--init",
        base.path,
        "--data",
        run.snapshot.path,
        "--out",
        run.directory,
    ]
    assert words[7:] == ["--beta", "0.2", "--seed", "0", "--steps", "3"]
    assert Event.objects.filter(action="training.started", user=admin).exists()


def test_what_is_judged_after_the_click_is_not_trained_on(
    judged, model, admin, make_item, judge, member
):
    run = runs.start(judged, "dpo", admin, parent=model("base"))
    judge(make_item("late", "good", "bad"), member("ann"))
    drain("train")
    run.refresh_from_db()
    assert run.snapshot.judgements == 4


def test_an_ensemble_scores_and_rewards(judged, model, admin, monkeypatch):
    base = model("base")
    reward = runs.start(judged, "reward", admin, parent=base, settings={"members": 2, "seed": 7})
    ppo = runs.start(judged, "ppo", admin, parent=base, reward_run=reward)
    drain("train", "score")
    reward.refresh_from_db()
    ppo.refresh_from_db()
    first, second = reward.made.order_by("id")
    assert {each.kind for each in (first, second)} == {"reward"}
    members = [_starts(reward, f"member-{n}")[0] for n in (1, 2)]
    assert [words[words.index("--seed") + 1] for words in members] == ["7", "8"]
    assert (reward.step, reward.steps) == (6, 6)
    assert first.scores.count() == second.scores.count() == 8  # four prompts, two answers each
    assert (ppo.state, ppo.error) == (State.FINISHED, "")
    words = _starts(ppo)[0]
    given = words[words.index("--reward") + 1]
    assert given == f"[0.5*{first.path}, 0.5*{second.path}]"
    prompts = Path(words[words.index("--data") + 1]).read_text().splitlines()
    assert len(prompts) == 4


def test_ppo_reads_no_held_out_prompt_and_no_gold(judged, model, admin, make_item):
    hidden = make_item("hidden", "a", "b")
    type(hidden.prompt).objects.filter(pk=hidden.prompt_id).update(held_out=True)
    make_item("gold", "a", "b", purpose="gold", gold={"better": 0})
    run = runs.start(judged, "ppo", admin, parent=model("base"), reward=model("r", "reward"))
    drain("train")
    words = _starts(run)[0]
    rows = [json.loads(line) for line in Path(words[4]).read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == [f"question {n}" for n in range(4)]


def test_a_failure_is_told_with_its_log(judged, model, admin, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "--data: no pair is left")
    run = runs.start(judged, "dpo", admin, parent=model("base"))
    drain("train")
    run.refresh_from_db()
    assert run.state == State.FAILED
    assert run.error == f"openpalm dpo: --data: no pair is left (log: {run.directory}.log)"
    assert "some progress" in runs.log_file(run).read_text()
    assert Job.objects.get(kind="train").message == run.error
    # What was wrong is corrected: the run goes on.
    monkeypatch.delenv("FAKE_FAIL")
    runs.resume(run, admin)
    drain("train")
    run.refresh_from_db()
    assert (run.state, run.error) == (State.FINISHED, "")


def test_ppo_after_a_failed_reward_training_says_so(judged, model, admin, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "out of luck")
    base = model("base")
    reward = runs.start(judged, "reward", admin, parent=base)
    ppo = runs.start(judged, "ppo", admin, parent=base, reward_run=reward)
    drain("train")
    ppo.refresh_from_db()
    assert ppo.error == f"training {reward.pk} made no reward model; see its error"


def test_an_alarm_that_ended_the_run_is_shown(judged, model, admin, monkeypatch):
    line = "step 9: the reward rose while the gold reward fell: the reward is being gamed"
    monkeypatch.setenv("FAKE_FAIL", line)
    run = runs.start(judged, "ppo", admin, parent=model("base"), reward=model("r", "reward"))
    drain("train")
    run.refresh_from_db()
    assert run.alarms == [line]


def test_a_stopped_training_saves_and_can_be_resumed(judged, model, admin, monkeypatch):
    monkeypatch.setenv("FAKE_STEPS", "50")
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    run = runs.start(judged, "dpo", admin, parent=model("base"))
    store = runs._Training._store

    def stop_soon(self, follower, member, *, now=False):
        monkeypatch.setattr(runs._Training, "_store", store)
        runs.stop(run, admin)

    monkeypatch.setattr(runs._Training, "_store", stop_soon)
    monkeypatch.setattr("openpalm.feedback.worker.progress.REPORT_EVERY_S", 0)
    monkeypatch.setattr("openpalm.feedback.training.follow.READ_EVERY_S", 0)
    drain("train")
    run.refresh_from_db()
    assert run.state == State.STOPPED
    saved = int((Path(run.directory) / "saved").read_text())
    assert saved < 50
    monkeypatch.setenv("FAKE_STEP_S", "0")
    runs.resume(run, admin)
    drain("train")
    run.refresh_from_db()
    assert (run.state, run.step) == (State.FINISHED, 50)
    steps = _steps(run)
    assert steps == list(range(1, 51))


def test_a_process_of_a_killed_worker_is_waited_for(judged, model, admin, monkeypatch):
    """The worker died; its training runs on. The next worker follows it and starts none beside."""
    run = runs.start(judged, "dpo", admin, parent=model("base"), settings={"steps": 3})
    worker = Worker()
    row = TrainRun.objects.select_related("project", "parent", "snapshot").get(pk=run.pk)
    from openpalm.feedback.training import snapshots

    row.snapshot = snapshots.freeze(judged, Filter(**row.settings["filter"]), admin)
    row.save()
    words = runs.command_words(row, Path(run.directory), 0)
    environment = os.environ | {"FAKE_STEPS": "20", "FAKE_STEP_S": "0.02"}
    from openpalm.feedback.worker.processes import PROGRAM

    left = subprocess.Popen([*PROGRAM, *words], env=environment, stdout=subprocess.DEVNULL)
    row.process = {"pid": left.pid, "started": started(left.pid)}
    row.save(update_fields=["process"])
    monkeypatch.setenv("FAKE_STEPS", "20")
    assert worker.run_one(("train",))
    left.wait()
    run.refresh_from_db()
    assert (left.returncode, run.state, run.step) == (0, State.FINISHED, 20)
    steps = _steps(run)
    assert steps == list(range(1, 21))


def test_a_killed_training_goes_on(judged, model, admin, monkeypatch):
    monkeypatch.setenv("FAKE_STEPS", "10")
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    run = runs.start(judged, "dpo", admin, parent=model("base"))
    killed = []
    remember = runs._Training._remember
    store = runs._Training._store

    def note(self, running):
        remember(self, running)
        killed.append(running.pid)

    def kill_once(self, follower, member, *, now=False):
        store(self, follower, member, now=True)
        if follower.step >= 3 and len(killed) == 1:
            killed.append(0)
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(runs._Training, "_remember", note)
    monkeypatch.setattr(runs._Training, "_store", kill_once)
    drain("train")
    run.refresh_from_db()
    assert (run.state, run.step, run.error) == (State.FINISHED, 10, "")
    assert len(_starts(run)) == 2


def test_one_that_is_killed_again_and_again_fails(judged, model, admin, monkeypatch):
    killer = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(
        "openpalm.feedback.worker.processes.PROGRAM", (sys.executable, "-c", killer)
    )
    run = runs.start(judged, "dpo", admin, parent=model("base"))
    drain("train")
    run.refresh_from_db()
    assert run.state == State.FAILED
    assert "was ended by SIGKILL (is there enough memory?)" in run.error


@pytest.mark.parametrize(
    ("verb", "given", "line"),
    [
        ("grpo", {}, "grpo: is no training"),
        ("dpo", {"reward": "/etc/code.py:run"}, "reward: dpo has no such setting"),
        ("ppo", {"reward": "/etc/code.py:run"}, "reward: ppo has no such setting"),
        ("dpo", {"out": "/"}, "out: dpo has no such setting"),
        ("dpo", {"config": "x"}, "config: dpo has no such setting"),
        ("dpo", {"loss": "dpo --out /"}, "loss .*must be a number or a word"),
        ("dpo", {"loss": "--out"}, "loss .*must be a number or a word"),
        ("dpo", {"beta": [1]}, "beta .*must be a number or a word"),
        ("dpo", {"members": 2}, "members 2"),
        ("reward", {"members": 9}, "members 9"),
        ("dpo", {"steps": 2, "epochs": 1}, "one of steps, epochs and minutes"),
    ],
)
def test_settings_that_are_refused(verb, given, line):
    with pytest.raises(DataError, match=line):
        check_settings(verb, given)


def test_every_setting_is_an_option_of_its_verb():
    """Of the real verbs: a renamed option would fail only when somebody trains."""
    from dataclasses import fields, is_dataclass

    from openpalm.align.config import DpoSettings, PpoSettings, RewardSettings, SftSettings

    of = {"reward": RewardSettings, "dpo": DpoSettings, "ppo": PpoSettings, "sft": SftSettings}
    for verb, names in OPTIONS.items():
        for name in names:
            found = of[verb]
            for part in name.split("."):
                known = {each.name: each for each in fields(found)}
                assert part in known, (verb, name)
                default = known[part].default_factory
                found = default if is_dataclass(default) else None


def test_models_that_do_not_fit(judged, model, admin):
    base, reward = model("base"), model("r", "reward")
    with pytest.raises(DataError, match="is a reward model"):
        runs.start(judged, "dpo", admin, parent=reward)
    with pytest.raises(DataError, match="needs a reward model"):
        runs.start(judged, "ppo", admin, parent=base)
    with pytest.raises(DataError, match="no reward model"):
        runs.start(judged, "ppo", admin, parent=base, reward=base)
    with pytest.raises(DataError, match="nothing for sft to train on"):
        runs.start(judged, "sft", admin, parent=base)
    with pytest.raises(DataError, match="by simulated in force"):
        runs.start(judged, "dpo", admin, parent=base, chosen=Filter(["simulated"]))
    assert not TrainRun.objects.exists()
    assert not ModelVersion.objects.filter(run__isnull=False).exists()


def test_the_curve_is_thinned_and_keeps_its_end(tmp_path):
    rows = "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, 1001))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 10')
    follower = RunFollower(tmp_path)
    assert follower.changed(now=True)
    assert not follower.changed(now=True)
    assert len(follower.curve) <= 302
    assert (follower.curve[0][0], follower.curve[-1][0], follower.step) == (1, 1000, 1000)


def _evaluated(step: int, **values: float) -> dict:
    return {"step": step, "val_reward": float(step)} | {f"val_{k}": v for k, v in values.items()}


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        ({"gold": 2.0}, {"gold": 1.0}, "being gamed"),
        ({"length": 10.0}, {"length": 30.0}, "pay for length"),
        ({"distinct": 1.0}, {"distinct": 0.2}, "all alike"),
        ({"kl": 0.0}, {"kl": 40.0}, "40 nats"),
        ({"gold": 1.0, "length": 10.0, "kl": 0.0}, {"gold": 2.0, "length": 11.0, "kl": 2.0}, None),
    ],
)
def test_alarms(first, last, words):
    found = alarms_of([_evaluated(1, **first), {"step": 2, "loss": 1}, _evaluated(3, **last)])
    assert len(found) == (0 if words is None else 1)
    assert words is None or words in found[0]
    # A reward that did not rise was not gamed.
    assert alarms_of([_evaluated(3, **first), _evaluated(1, **last)]) == []


def test_a_training_that_was_stopped_without_a_worker_is_ended(project, monkeypatch):
    """Its process outlives a killed worker; the job is stopped and no worker takes it again."""
    now = [100.0]
    monkeypatch.setattr(runs, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs, "_left_over", {})
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        running = Running(process.pid, started(process.pid))
        run = TrainRun.objects.create(project=project, verb="dpo", process=running.to_json())
        job = jobs.enqueue("train", project=project, run=run.pk)
        now[0] += 1000
        assert runs.end_left_over() == 0, "it is queued: the next worker waits for the process"
        jobs.stop(job)
        assert runs.end_left_over() == 0, "its worker may be ending it at this moment"
        now[0] += END_S + 1
        assert runs.end_left_over() == 1
        assert process.wait() == -signal.SIGTERM
        runs.end_left_over()
        run.refresh_from_db()
        assert run.process is None
    finally:
        process.kill()
        process.wait()
