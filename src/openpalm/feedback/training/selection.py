"""Chooses the next pairs to judge: 30 % by chance, the rest where judgements teach most.

The pool is every pair of different answers to a training prompt that nobody has judged or is
judging. The active arm is ranked by the disagreement of the newest reward ensemble and by the
implicit rewards of the newest model of DPO; without both it is drawn by chance. See
statistics/selection.py for the reserve of the random arm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import numpy as np
from django.db.models import Count

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.items.new_items import make_item
from openpalm.feedback.models import (
    Candidate,
    Item,
    ItemCandidate,
    Job,
    ModelScore,
    ModelVersion,
    Project,
    Prompt,
    Task,
    User,
)
from openpalm.feedback.statistics.selection import Batch, choose_batch, selection_scores
from openpalm.feedback.training import scoring
from openpalm.feedback.training.commands import training_prompts
from openpalm.feedback.training.registry import POLICY, REWARD
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.progress import Progress

PRIORITY = 10.0
"""before items that were not selected, after comparisons"""
BETA = 0.1
"""of the implicit reward, where the training names none"""
BATCH_SIZE, MOST_IN_BATCH = 50, 10_000
MOST_PAIRS = 500_000
AT_ONCE = 2000


Shown = dict[frozenset[int], int | None]
"""pairs of candidates that items show: the item's id if it can still be selected, else None"""


@dataclass(frozen=True)
class Pair:
    prompt: int
    candidates: tuple[int, int]
    item: int | None
    """an open item that shows this pair, if there is one"""


def start(project: Project, user: User | None, size: int) -> Job:
    """Queues the choice of the next `size` pairs. Raises DataError."""
    _check_pairs(project)
    job = jobs.enqueue("select", project=project, user=user, size=size)
    audit.record("job.select", user=user, project=project, target=job.pk, size=size)
    return job


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "select": `size` pairs become items with an arm and a priority."""
    project = job.project
    assert project is not None
    if job.result:  # the worker ended between the last two writes
        return job.result
    _check_pairs(project)
    members, policy = ensemble(project), newest_policy(project)
    for model in (*members, *((policy, policy.parent) if policy and policy.parent else ())):
        scoring.score(model, progress.quiet())
    progress.say("looking for pairs that nobody has judged")
    pairs = list(_pool(project, progress))
    if not pairs:
        raise DataError(
            "every pair of answers is judged or waits to be: generate further answers first"
        )
    progress.start(len(pairs), "ranking pairs")
    margins = _margins(members, pairs, progress) if len(members) > 1 else None
    implicit = _implicit_margins(policy, pairs, progress) if policy else None
    scores = _scores(margins, implicit, len(pairs))
    batch = choose_batch(
        [pair.prompt for pair in pairs],
        scores,
        job.arguments["size"],
        seed=job.pk,
        project_seed=project.pk,
    )
    arms = [choice.arm for choice in batch.choices]
    result = {
        "random": arms.count("random"),
        "active": arms.count("active"),
        "missing_random": batch.missing_random,
        "pool": len(pairs),
        "by": ["the reward ensemble's disagreement"] * (margins is not None)
        + ["the margin of the policy's implicit rewards"] * (implicit is not None),
        "members": [member.pk for member in members],
    }
    with progress.writing():
        _store(project, pairs, batch)
        progress.keep(result)  # a second attempt would choose a second batch
    return result


def _check_pairs(project: Project) -> None:
    if project.task != Task.PAIR:
        raise DataError("only a project of pairs has batches")


def ensemble(project: Project) -> list[ModelVersion]:
    """The reward models of the newest training that made two or more; empty without one."""
    made = ModelVersion.objects.filter(project=project, kind=REWARD, run__isnull=False)
    several = made.order_by().values("run").annotate(n=Count("pk")).filter(n__gte=2)
    newest = several.order_by("-run").values_list("run", flat=True).first()
    return list(made.filter(run=newest).order_by("id")) if newest else []


def newest_policy(project: Project) -> ModelVersion | None:
    """The newest model that DPO trained from a parent with a checkpoint."""
    made = ModelVersion.objects.filter(project=project, kind=POLICY, run__verb="dpo")
    return (
        made.exclude(parent=None)
        .exclude(parent__path="")
        .select_related("parent", "run")
        .order_by("-id")
        .first()
    )


def _pool(project: Project, progress: Progress) -> Iterator[Pair]:
    """Pairs in the order of prompts; at most MOST_PAIRS."""
    count = 0
    ids = list(training_prompts(project).values_list("id", flat=True))
    for start in range(0, len(ids), AT_ONCE):
        progress.check()
        prompts = ids[start : start + AT_ONCE]
        shown = _shown(prompts)
        candidates = Candidate.objects.filter(prompt__in=prompts).order_by("prompt", "id")
        rows = candidates.values_list("prompt_id", "id", "text")
        for prompt, group in groupby(rows, key=lambda row: row[0]):
            answers = [(pk, text) for _, pk, text in group]
            for pair in _pairs_of(prompt, answers, shown.get(prompt, {})):
                yield pair
                count += 1
                if count == MOST_PAIRS:
                    return


def _pairs_of(prompt: int, answers: Sequence[tuple[int, str]], shown: Shown) -> Iterator[Pair]:
    """`answers` are all of the prompt, with their ids."""
    first: dict[str, int] = {}
    for pk, text in answers:
        first.setdefault(text.strip(), pk)
    # An answer that an item shows may be the second of two equal ones.
    texts = {pk: text.strip() for pk, text in answers}
    taken = {frozenset(texts[pk] for pk in pair) for pair in shown}
    for pair in combinations(first.values(), 2):
        if frozenset(texts[pk] for pk in pair) not in taken:
            yield Pair(prompt, pair, None)
    for pair, item in shown.items():
        if item is not None:
            a, b = sorted(pair)
            yield Pair(prompt, (a, b), item)


def _shown(prompts: Sequence[int]) -> dict[int, Shown]:
    """The pairs of each prompt that items show."""
    free: dict[int, bool] = {}
    sets: dict[tuple[int, int], set[int]] = {}
    rows = ItemCandidate.objects.filter(item__prompt__in=prompts).values_list(
        "item__prompt_id",
        "item_id",
        "candidate_id",
        "item__state",
        "item__taken",
        "item__arm",
        "item__purpose",
    )
    for prompt, item, candidate, state, taken, arm, purpose in rows:
        sets.setdefault((prompt, item), set()).add(candidate)
        free[item] = (
            state == Item.State.OPEN and not taken and not arm and purpose == Item.Purpose.TRAINING
        )
    found: dict[int, Shown] = {}
    for (prompt, item), candidates in sets.items():
        pair, pairs = frozenset(candidates), found.setdefault(prompt, {})
        if len(pair) == 2:
            # One pair in two items: it is free only if all of them are.
            is_free = free[item] and pairs.get(pair, item) is not None
            pairs[pair] = item if is_free else None
    return found


def _margins(
    members: Sequence[ModelVersion], pairs: Sequence[Pair], progress: Progress
) -> np.ndarray:
    """Reward of the first answer minus that of the second, (members, pairs); nan without scores."""
    margins = np.full((len(members), len(pairs)), np.nan)
    for row, member in enumerate(members):
        for start in range(0, len(pairs), AT_ONCE):
            progress.move_to(start)
            part = pairs[start : start + AT_ONCE]
            ids = {pk for pair in part for pk in pair.candidates}
            known = ModelScore.objects.filter(model=member, candidate__in=ids)
            scores = dict(known.values_list("candidate_id", "score"))
            for place, pair in enumerate(part, start):
                a, b = (scores.get(pk, np.nan) for pk in pair.candidates)
                margins[row, place] = a - b
    return margins


def _implicit_margins(
    policy: ModelVersion, pairs: Sequence[Pair], progress: Progress
) -> np.ndarray:
    """Difference of the implicit rewards beta log pi/pi_parent of the two answers, (pairs,)."""
    assert policy.parent is not None
    assert policy.run is not None
    ours, before = _margins([policy, policy.parent], pairs, progress)
    return float(policy.run.settings.get("beta", BETA)) * (ours - before)


def _scores(margins: np.ndarray | None, implicit: np.ndarray | None, count: int) -> np.ndarray:
    """Pairs with an answer that was too long to score come last; all equal without models."""
    scores = np.zeros(count)
    known = [rows for rows in (margins, implicit) if rows is not None]
    scored = ~np.isnan(np.vstack(known)).any(axis=0) if known else np.zeros(count, dtype=bool)
    if scored.any():
        scores[scored] = selection_scores(
            None if margins is None else margins[:, scored],
            None if implicit is None else implicit[scored],
        )
    return scores


def _store(project: Project, pairs: Sequence[Pair], batch: Batch) -> None:
    """Gives each chosen pair its arm, and a priority in the batch's random order."""
    chosen = [pairs[choice.pair] for choice in batch.choices]
    prompts = Prompt.objects.in_bulk([pair.prompt for pair in chosen])
    answers = Candidate.objects.in_bulk([pk for pair in chosen for pk in pair.candidates])
    for place, choice in enumerate(batch.choices):
        pair = pairs[choice.pair]
        fields = {"arm": choice.arm, "priority": PRIORITY - place / len(batch.choices)}
        if pair.item is not None:
            # Unless somebody took it in the meantime: then it is judged anyway, without an arm.
            Item.objects.filter(pk=pair.item, taken=0, arm="").update(**fields)
        else:
            shown = [answers[pk] for pk in pair.candidates]
            make_item(project, prompts[pair.prompt], shown, **fields)
