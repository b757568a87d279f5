"""Works on a running site as managers and labelers do, step by step: `python loop_driver.py STEP`.

In a process of its own, next to the site's; prints what the step found as JSON.
"""

import json
import sys
import time
from typing import Any

import django

django.setup()

from feedback_prompts import add_prompts  # noqa: E402

from openpalm.feedback.judgements import queue, submission  # noqa: E402
from openpalm.feedback.judgements.submission import Judgement  # noqa: E402
from openpalm.feedback.models import (  # noqa: E402
    Candidate,
    Comparison,
    Job,
    ModelVersion,
    Project,
    Promotion,
    TrainRun,
    User,
)
from openpalm.feedback.training import comparisons, generation, promotion, runs  # noqa: E402
from openpalm.feedback.training.snapshots import Filter  # noqa: E402

SAMPLING = {"temperature": 1.0, "max_tokens": 8}


def project() -> Project:
    return Project.objects.get()


def wait(kind: str) -> Job:
    """Until the newest job of this kind has ended."""
    while True:
        job = Job.objects.filter(kind=kind).order_by("-id").first()
        if job is not None and job.state not in ("queued", "running"):
            return job
        time.sleep(0.2)


def labeler() -> User:
    user, _ = User.objects.get_or_create(username="sim", defaults={"kind": "simulated"})
    return user


def judge_all(favourite: ModelVersion | None = None) -> int:
    """By taste; with a `favourite` its answers win four times of five, whatever they say.

    So small a model learns no taste from 40 judgements, so its promotion is made sure of.
    """
    judged = 0
    while (assignment := queue.next_assignment(project(), labeler())) is not None:
        found = [place.candidate for place in assignment.item.places.all()]
        better = better_by_taste([candidate.text for candidate in found])
        if favourite is not None:
            number = [candidate.model for candidate in found].index(favourite)
            better = 1 - number if judged % 5 == 4 else number
        payload: dict[str, Any] = {"tie": [0, 1]}
        if better is not None:
            payload = {"better": better, "worse": 1 - better, "strength": 1}
        submission.submit(assignment.pk, labeler(), Judgement("compare", payload, 1000))
        judged += 1
    return judged


def better_by_taste(texts: list[str]) -> int | None:
    """The answer with the larger share of ASCII letters; None if both are equal."""
    first, second = (sum(c.isascii() and c.isalpha() for c in t) / max(1, len(t)) for t in texts)
    return None if first == second else int(second > first)


def prepare() -> Any:
    Project.objects.update(decided_by="simulated")
    add_prompts(project(), 40)
    add_prompts(project(), 200, text="hidden", held_out=True)
    generation.start(project(), None, [{"model": project().served_id, "n": 2, **SAMPLING}])
    job = wait("generate")
    return {"state": job.state, "message": job.message, "judged": judge_all()}


def train() -> Any:
    base, chosen = project().served, Filter(("simulated",))
    short = {"sequence_length": 48, "batch_tokens": 768, "dtype": "float32", "save_every": 10}
    reward = runs.start(
        project(), "reward", None, parent=base, chosen=chosen, settings=short | {"steps": 40}
    )
    dpo = runs.start(
        project(),
        "dpo",
        None,
        parent=base,
        chosen=chosen,
        settings=short | {"steps": 400, "optim.lr": 1e-3},
    )
    ppo = runs.start(
        project(),
        "ppo",
        None,
        parent=base,
        reward_run=reward,
        settings={
            "steps": 4,
            "max_new_tokens": 8,
            "prompts_per_rollout": 8,
            "dtype": "float32",
        },
    )
    return {"reward": reward.pk, "dpo": dpo.pk, "ppo": ppo.pk}


def running() -> Any:
    """The process and step of the dpo training."""
    run = TrainRun.objects.get(verb="dpo")
    return {"state": run.state, "process": run.process, "step": run.step}


def trained() -> Any:
    """Waits for the trainings and the scores."""
    while TrainRun.objects.exclude(state__in=["finished", "failed", "stopped"]).exists():
        time.sleep(0.2)
    score = wait("score")
    return {
        "runs": {
            run.verb: [run.state, run.error, run.directory, run.steps]
            for run in TrainRun.objects.all()
        },
        "score": [score.state, score.message, score.result],
        "models": list(ModelVersion.objects.values_list("name", "kind")),
    }


def compare() -> Any:
    challenger = ModelVersion.objects.get(run__verb="dpo")
    comparisons.create(project(), challenger, None, sampling=SAMPLING)
    job = wait("compare")
    judged = judge_all(challenger)
    while Comparison.objects.get().state == "judging":  # the worker computes it
        time.sleep(0.2)
    found = Comparison.objects.get()
    return {
        "job": [job.state, job.message],
        "judged": judged,
        "state": found.state,
        "result": found.result,
    }


def promote() -> Any:
    manager, _ = User.objects.get_or_create(username="manager")
    comparison = Comparison.objects.get()
    promotion.propose(project(), comparison.challenger, manager, comparison=comparison)
    job = wait("promote")
    return {"job": [job.state, job.message], "served": project().served.path}


def shared() -> Any:
    """Conversations of the chat page, with the checkpoints that answered."""
    found = Candidate.objects.filter(prompt__source="chat").select_related("prompt", "model")
    return [[c.prompt.messages[-1]["content"], c.model and c.model.path] for c in found]


def undo() -> Any:
    promotion.undo(Promotion.objects.get(), User.objects.get(username="manager"))
    job = wait("promote")
    return {"job": [job.state, job.message], "served": project().served.path}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
