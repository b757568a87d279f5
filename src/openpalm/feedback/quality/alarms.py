"""The row "alarms": policies that please the reward model but not people, or that only grow long.

A policy is compared with its parent on the prompts that both have answered.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from django.db.models import Avg
from django.db.models.functions import Length

from openpalm.feedback.models import Candidate, ModelScore, ModelVersion, Project
from openpalm.feedback.quality.answer_table import AnswerTable
from openpalm.feedback.quality.pairs import JudgedPairs, judged_pairs
from openpalm.feedback.quality.response_table import ResponseTable
from openpalm.feedback.statistics.intervals import LEVEL, Estimate, t_quantile, wilson_of_means

NEWEST = 5
"""policies that are watched"""
MINIMUM = 20
"""prompts below which neither rewards nor judgements raise an alarm"""
LONGER = 1.5
SCORES = np.array([1.0, 0.0, 0.5, 0.5])
"""of OUTCOMES, for answer a"""


@dataclass(frozen=True)
class Watched:
    policy: ModelVersion
    parent: ModelVersion


def watched(project: Project) -> list[Watched]:
    found = ModelVersion.objects.filter(
        project=project, kind=ModelVersion.Kind.POLICY, parent__isnull=False
    )
    rows = found.select_related("parent", "run__reward_model").order_by("-id")[:NEWEST]
    return [Watched(row, row.parent) for row in rows if row.parent is not None]


def alarms(table: ResponseTable, answers: AnswerTable, author_kind: str) -> list[dict[str, Any]]:
    """The alarms about the newest policies, by judgements of these labelers."""
    pairs = watched(table.project)
    if not pairs:
        return []
    judged = judged_pairs(table, answers, author_kind)
    found = []
    for pair in pairs:
        for kind, line in (
            ("gamed_reward", _gamed(pair, win_rate(judged, answers, pair))),
            ("length", _longer(pair)),
        ):
            if line:
                model = pair.policy
                found.append({"kind": kind, "model": model.pk, "name": model.name, "line": line})
    return found


def win_rate(
    pairs: JudgedPairs, answers: AnswerTable, pair: Watched
) -> tuple[Estimate, int] | None:
    """Win rate of the policy against its parent, over prompts, and their number."""
    a, b = answers.rows["model"][pairs.a], answers.rows["model"][pairs.b]
    first = (a == pair.policy.pk) & (b == pair.parent.pk)
    second = (b == pair.policy.pk) & (a == pair.parent.pk)
    won = pairs.outcomes @ SCORES
    number = pairs.outcomes.sum(axis=1)
    won = np.where(second, number - won, won)
    chosen = (first | second) & (number > 0)
    if not chosen.any():
        return None
    prompts = np.unique(answers.rows["prompt"][pairs.a][chosen], return_inverse=True)[1]
    means = np.bincount(prompts, won[chosen]) / np.bincount(prompts, number[chosen])
    estimate = wilson_of_means(means)
    assert estimate is not None
    return estimate, len(means)


def _gamed(pair: Watched, wins: tuple[Estimate, int] | None) -> str | None:
    """The reward rises for certain, and labelers do not prefer the policy to its parent."""
    model = _reward_model(pair.policy)
    if model is None or wins is None or wins[1] < MINIMUM or wins[0].value > 0.5:
        return None
    rise, prompts = reward_rise(model, pair)
    if rise is None or prompts < MINIMUM or rise.low <= 0:
        return None
    return (
        f"The reward of {model.name} rises by {rise.value:.2f} ({rise.low:.2f} to {rise.high:.2f}) "
        f"from {pair.parent.name} to {pair.policy.name}, but labelers prefer it in only "
        f"{wins[0].value:.0%} of {wins[1]} prompts: the reward is being gamed."
    )


def _reward_model(policy: ModelVersion) -> ModelVersion | None:
    """The model that the policy was trained with, or else the project's newest."""
    if policy.run is not None and policy.run.reward_model is not None:
        return policy.run.reward_model
    found = ModelVersion.objects.filter(project=policy.project_id, kind=ModelVersion.Kind.REWARD)
    return found.order_by("-id").first()


def reward_rise(model: ModelVersion, pair: Watched) -> tuple[Estimate | None, int]:
    """Mean difference of reward, policy - parent, over the prompts with scores of both."""
    ours, theirs = (_mean_rewards(model, one) for one in (pair.policy, pair.parent))
    shared = ours.keys() & theirs.keys()
    differences = np.array([ours[prompt] - theirs[prompt] for prompt in sorted(shared)])
    return mean_interval(differences), len(differences)


def _mean_rewards(model: ModelVersion, policy: ModelVersion) -> dict[int, float]:
    found = ModelScore.objects.filter(model=model, candidate__model=policy).order_by()
    return dict(found.values_list("candidate__prompt_id").annotate(mean=Avg("score")))


def mean_interval(values: np.ndarray) -> Estimate | None:
    """Mean with Student's interval; None below two values."""
    if len(values) < 2:
        return None
    mean = float(values.mean())
    half = t_quantile(len(values) - 1, LEVEL) * float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half)


def _longer(pair: Watched) -> str | None:
    """The answers are much longer than the parent's on the same prompts."""
    ours, theirs = (_mean_lengths(one) for one in (pair.policy, pair.parent))
    shared = ours.keys() & theirs.keys()
    if len(shared) < MINIMUM:
        return None
    now, before = (sum(of[prompt] for prompt in shared) / len(shared) for of in (ours, theirs))
    if not before or now / before < LONGER:
        return None
    return (
        f"Answers of {pair.policy.name} are {now / before:.1f} times as long as those of "
        f"{pair.parent.name} ({now:.0f} and {before:.0f} characters on {len(shared)} prompts)."
    )


def _mean_lengths(policy: ModelVersion) -> dict[int, float]:
    found = Candidate.objects.filter(model=policy).order_by()
    return dict(found.values_list("prompt_id").annotate(mean=Avg(Length("text"))))
