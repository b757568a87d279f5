"""Candidates for prompts, from several models and samplings, and the items to judge them.

The job's arguments:
  models    [{"model": id, "n": 2, "temperature": 1.0, "max_tokens": 128, ...}, ...]
  prompts   ids; without it all training prompts that no item uses
  pairs     most pairs to judge of one prompt, for projects of pairs; default 1
"""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from django.db.models import Exists, OuterRef, QuerySet

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.items.new_items import make_item
from openpalm.feedback.items.tasks import candidates_needed
from openpalm.feedback.models import (
    Candidate,
    Item,
    ItemCandidate,
    Job,
    ModelVersion,
    Project,
    Prompt,
    Task,
    User,
)
from openpalm.feedback.training.answers import (
    PROMPTS_AT_ONCE,
    Wanted,
    answer_key,
    check_sampling,
    generate,
    sampling_of,
    stored_answers,
)
from openpalm.feedback.training.registry import POLICY
from openpalm.feedback.training.servers import serving
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.progress import Progress

MOST_PROMPTS, MOST_ANSWERS, MOST_ITEMS = 10_000, 16, 100
"""of one job; of a model and a prompt; of a prompt"""
PROMPTS, ANSWERS = 100, 2


def start(
    project: Project,
    user: User | None,
    models: Sequence[dict[str, Any]],
    *,
    prompts: Sequence[int] | None = None,
    pairs: int = 1,
) -> Job:
    """Queues the generation. Raises DataError in words for the page."""
    least, most = candidates_needed(project.task)
    if not most:
        raise DataError("labelers write the answers of this project; there is nothing to generate")
    for each in models:
        _check(project, each)
    if sum(each.get("n", 1) for each in models) < least:
        raise DataError(f"an item of this project needs {least} answers or more; ask for more")
    if not 1 <= pairs <= MOST_ITEMS:
        raise DataError(f"pairs {pairs}: must be 1 to {MOST_ITEMS}")
    if prompts is not None and not prompts:
        raise DataError("every prompt has an item already; add prompts first")
    arguments: dict[str, Any] = {"models": list(models), "pairs": pairs}
    if prompts is not None:
        arguments["prompts"] = list(prompts)
    count = {} if prompts is None else {"count": len(prompts)}
    audit.record("job.generate", user=user, project=project, **count)
    return jobs.enqueue("generate", project=project, user=user, **arguments)


def _check(project: Project, each: dict[str, Any]) -> None:
    model = ModelVersion.objects.filter(pk=each.get("model"), project=project).first()
    if model is None or model.kind != POLICY or not model.path:
        raise DataError("choose a model of this project that answers and has a checkpoint")
    n = each.get("n", 1)
    if not isinstance(n, int) or not 1 <= n <= MOST_ANSWERS:
        raise DataError(f"n {n!r:.40}: must be 1 to {MOST_ANSWERS} answers a prompt")
    _sampling(each)


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "generate"."""
    assert job.project is not None
    prompts = _prompts(job.project, job.arguments.get("prompts"))
    ids = list(prompts.values_list("id", flat=True))
    answers = sum(each.get("n", 1) for each in job.arguments["models"])
    progress.start(len(ids) * answers)
    made, failed, reason = 0, 0, ""
    for each in job.arguments["models"]:
        model = ModelVersion.objects.select_related("project").get(pk=each["model"])
        with serving(model, progress) as server:
            progress.say(f"{model} answers")
            counts = generate(server, model, _wanted(ids, model, each), progress)
        made, failed = made + counts.made, failed + counts.failed
        reason = counts.reason or reason
    items, equal = _make_items(job.project, ids, job.arguments, progress)
    result = {"prompts": len(ids), "answers": made, "items": items, "equal": equal}
    if failed:
        result |= {"failed": failed, "reason": reason}
    progress.say(_summary(result))
    return result


def _summary(result: dict[str, Any]) -> str:
    text = f"{result['items']} items from {result['prompts']} prompts"
    if result["equal"]:
        text += f"; {result['equal']} left out because their answers are equal"
    if result.get("failed"):
        text += f"; {result['failed']} answers failed: {result['reason']}"
    return text


def _prompts(project: Project, ids: Sequence[int] | None) -> "QuerySet[Prompt]":
    """The prompts asked for, or those without an item; never one that is held out."""
    if ids is None:
        return unused_prompts(project)
    return Prompt.objects.filter(project=project, held_out=False, pk__in=ids).order_by("id")


def unused_prompts(project: Project) -> "QuerySet[Prompt]":
    """The training prompts without an item, the oldest first."""
    without = ~Exists(Item.objects.filter(prompt=OuterRef("pk")))
    return Prompt.objects.filter(without, project=project, held_out=False).order_by("id")


def _prompts_in_groups(ids: Sequence[int]) -> Iterator[list[Prompt]]:
    for start_at in range(0, len(ids), PROMPTS_AT_ONCE):
        yield list(
            Prompt.objects.filter(pk__in=ids[start_at : start_at + PROMPTS_AT_ONCE]).order_by("id")
        )


def _sampling(each: dict[str, Any]) -> dict[str, float]:
    return check_sampling({k: v for k, v in each.items() if k not in ("model", "n")})


def _wanted(ids: Sequence[int], model: ModelVersion, each: dict[str, Any]) -> Iterator[Wanted]:
    sampling = _sampling(each)
    for group in _prompts_in_groups(ids):
        for prompt in group:
            for draw in range(each.get("n", 1)):
                yield Wanted(prompt, sampling_of(model, prompt, sampling, draw))


def _make_items(
    project: Project, ids: Sequence[int], arguments: dict[str, Any], progress: Progress
) -> tuple[int, int]:
    """Makes the items; returns how many, and how many were left out for equal texts."""
    progress.say("making items")
    chosen = [(each, ModelVersion.objects.get(pk=each["model"])) for each in arguments["models"]]
    items = equal = 0
    for group in _prompts_in_groups(ids):
        progress.check()
        found = [
            (each, model, stored_answers(model, [p.pk for p in group])) for each, model in chosen
        ]
        with progress.writing():
            for prompt in group:
                answers = [
                    stored[key]
                    for each, model, stored in found
                    for draw in range(each.get("n", 1))
                    if (
                        key := answer_key(
                            prompt.pk, sampling_of(model, prompt, _sampling(each), draw)
                        )
                    )
                    in stored
                ]
                more, same = _items_of(project, prompt, answers, arguments.get("pairs", 1))
                items, equal = items + more, equal + same
    return items, equal


def _items_of(
    project: Project, prompt: Prompt, answers: Sequence[Candidate], pairs: int
) -> tuple[int, int]:
    different, equal = distinct(answers)
    groups = _groups_to_judge(project, prompt, different, pairs)
    have = _candidate_sets(prompt)
    made = 0
    for group in groups:
        if frozenset(each.pk for each in group) not in have:
            make_item(project, prompt, group)
            made += 1
    return made, equal


def distinct(answers: Sequence[Candidate]) -> tuple[list[Candidate], int]:
    """The answers with different texts, and how many others there are."""
    first: dict[str, Candidate] = {}
    for answer in answers:
        first.setdefault(answer.text.strip(), answer)
    return list(first.values()), len(answers) - len(first)


def _groups_to_judge(
    project: Project, prompt: Prompt, answers: Sequence[Candidate], pairs: int
) -> list[list[Candidate]]:
    """Pairs, all answers together, or each alone: what an item of the task shows."""
    if project.task in (Task.PAIR, Task.CHAT):
        found = [list(pair) for pair in combinations(answers, 2)]
        # The same choice at every attempt; without a seed a resumed job would add other pairs.
        random.Random(f"{project.pk}:{prompt.digest}").shuffle(found)
        return found[:pairs]
    if project.task == Task.RANKING:
        return [list(answers)] if len(answers) > 1 else []
    return [[answer] for answer in answers]


def _candidate_sets(prompt: Prompt) -> set[frozenset[int]]:
    """The candidates of each of the prompt's items."""
    sets: dict[int, set[int]] = {}
    places = ItemCandidate.objects.filter(item__prompt=prompt)
    for item, candidate in places.values_list("item_id", "candidate_id"):
        sets.setdefault(item, set()).add(candidate)
    return {frozenset(each) for each in sets.values()}
