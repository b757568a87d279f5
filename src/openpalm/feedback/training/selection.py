"""The next batch to judge: 30 % at random, the rest where a judgement teaches most.

The pool is the open items that nobody has had. The random arm stays unbiased, so agreement is
measured on it; see statistics/selection.py for the reasons and sources.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from django.db import transaction
from django.db.models import QuerySet

from openpalm.errors import DataError
from openpalm.feedback.models import Item, ItemCandidate, Job, ModelScore, ModelVersion, Project
from openpalm.feedback.statistics.selection import Batch, choose_batch, selection_scores
from openpalm.feedback.training import scoring
from openpalm.feedback.training.registry import POLICY, REWARD
from openpalm.feedback.worker.progress import Progress

PRIORITY = 10.0
"""before items that were not selected, after those of comparisons"""
POOL = 20_000
"""items that one selection looks at, the oldest first"""
BETA = 0.1
"""of the implicit reward, where the training names none"""


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "select": gives `size` items an arm and a place at the front of the queue."""
    project = job.project
    assert project is not None
    size = int(job.arguments["size"])
    if size < 1:
        raise DataError(f"size {size}: must be 1 or more")
    pool = list(unselected(project)[:POOL])
    if not pool:
        raise DataError("every item is selected or judged already; generate answers first")
    scores, basis = _scores(project, pool, progress)
    prompts = [item.prompt_id for item in pool]
    batch = choose_batch(prompts, scores, size, seed=job.pk, project_seed=project.pk)
    _store(pool, batch)
    arms = [choice.arm for choice in batch.choices]
    result = {"random": arms.count("random"), "active": arms.count("active"), "basis": basis}
    progress.say(f"{len(arms)} items, {result['random']} of them at random; {basis}")
    return result


def unselected(project: Project) -> "QuerySet[Item]":
    """Open items of training that nobody has and nobody has judged, in no arm."""
    found = Item.objects.filter(
        project=project, purpose=Item.Purpose.TRAINING, state=Item.State.OPEN, arm="", taken=0
    )
    return found.order_by("id")


def _scores(project: Project, pool: Sequence[Item], progress: Progress) -> tuple[np.ndarray, str]:
    """How much each item teaches, and what that rests on, in words."""
    pairs = _pairs(pool)
    wanted = sorted({candidate for pair in pairs.values() for candidate in pair})
    chosen = [i for i, item in enumerate(pool) if item.pk in pairs]
    sides = np.array([pairs[pool[i].pk] for i in chosen], dtype=int).reshape(-1, 2)
    ensemble = reward_ensemble(project)
    rewards = [_scored(model, wanted, progress) for model in ensemble]
    margins = np.array([_margins(each, sides) for each in rewards]).reshape(
        len(rewards), len(chosen)
    )
    policy, policy_margins = _policy_margins(project, wanted, sides, progress)
    basis = []
    if len(ensemble) > 1:
        basis.append(f"the others where {len(ensemble)} reward models disagree")
    if policy is not None:
        basis.append(f"where {policy} prefers neither answer")
    values = np.zeros(len(pool))
    if not basis or not chosen:
        return values, "the others too: no ensemble of reward models has scored them"
    # An item that a model could not score (too long) has no margin, and comes last.
    known = np.ones(len(chosen), dtype=bool)
    for each in (*margins, *([] if policy_margins is None else [policy_margins])):
        known &= ~np.isnan(each)
    if known.any():
        values[np.array(chosen)[known]] = selection_scores(
            margins[:, known] if len(ensemble) > 1 else None,
            None if policy_margins is None else policy_margins[known],
        )
    return values, " and ".join(basis)


def reward_ensemble(project: Project) -> list[ModelVersion]:
    """The reward models of the newest training that made any."""
    newest = ModelVersion.objects.filter(project=project, kind=REWARD, run__isnull=False).order_by(
        "-id"
    )
    if (first := newest.first()) is None:
        return []
    return list(newest.filter(run=first.run_id).order_by("id"))


def _pairs(pool: Sequence[Item]) -> dict[int, tuple[int, int]]:
    """Candidates of the items that have two."""
    found: dict[int, list[int]] = {}
    ids = [item.pk for item in pool]
    for start in range(0, len(ids), 500):
        places = ItemCandidate.objects.filter(item__in=ids[start : start + 500])
        for item, candidate in places.order_by("position").values_list("item_id", "candidate_id"):
            found.setdefault(item, []).append(candidate)
    return {item: (pair[0], pair[1]) for item, pair in found.items() if len(pair) == 2}


def _scored(model: ModelVersion, wanted: Sequence[int], progress: Progress) -> dict[int, float]:
    """The model's score of each candidate; those that are missing are computed first."""
    scoring.score(model, progress, list(wanted))
    found: dict[int, float] = {}
    for start in range(0, len(wanted), 500):
        scores = ModelScore.objects.filter(model=model, candidate__in=wanted[start : start + 500])
        found.update(scores.values_list("candidate_id", "score"))
    return found


def _margins(scores: dict[int, float], sides: np.ndarray) -> np.ndarray:
    """Score of the first candidate less that of the second; nan where one is missing."""
    return np.array([scores.get(a, np.nan) - scores.get(b, np.nan) for a, b in sides.tolist()])


def _policy_margins(
    project: Project, wanted: Sequence[int], sides: np.ndarray, progress: Progress
) -> tuple[ModelVersion | None, np.ndarray | None]:
    """Implicit rewards of the newest model of DPO, relative to its parent; None without one."""
    policy = (
        ModelVersion.objects.filter(project=project, kind=POLICY, run__verb="dpo")
        .exclude(parent=None)
        .select_related("parent", "run")
        .order_by("-id")
        .first()
    )
    if policy is None or policy.run is None or policy.parent is None or not len(sides):
        return None, None
    ours, before = (_scored(each, wanted, progress) for each in (policy, policy.parent))
    beta = float(policy.run.settings.get("beta", BETA))
    return policy, beta * (_margins(ours, sides) - _margins(before, sides))


@transaction.atomic
def _store(pool: Sequence[Item], batch: Batch) -> None:
    """Items that a labeler took meanwhile stay as they are."""
    for place, choice in enumerate(batch.choices):
        # The order of the batch, which is random, so that it tells nobody the arm.
        priority = PRIORITY - place / (len(batch.choices) + 1)
        Item.objects.filter(pk=pool[choice.pair].pk, arm="", taken=0).update(
            arm=choice.arm, priority=priority
        )
