"""The rows "reward_agreement", "calibration" and "disagreements": reward models against people.

A reward model is measured on the random arm only: pairs that active selection chose for their
uncertainty would show it worse than it is. And only on prompts that are in no snapshot which it or
its ancestors were trained on.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from openpalm.feedback.models import Item, ModelScore, ModelVersion
from openpalm.feedback.quality.agreement import as_json, people_on_items
from openpalm.feedback.quality.answer_table import AnswerTable
from openpalm.feedback.quality.pairs import judged_pairs
from openpalm.feedback.quality.response_table import CHUNK, ResponseTable
from openpalm.feedback.statistics.calibration import Calibration, accuracy_limit, calibration
from openpalm.feedback.training.lineage import snapshots_of

DISAGREEMENTS = 20
NEWEST = 30
"""reward models that are measured; the trend of older ones is of no use"""
CHOICES = np.array([1.0, 0.0, 0.5])
"""a, b, tie, as `calibration` wants them"""


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of answers that labelers compared, as arrays: (n,), or (n, 3) for `outcomes`."""

    items: np.ndarray
    prompts: np.ndarray
    a: np.ndarray
    """ids of candidates"""
    b: np.ndarray
    outcomes: np.ndarray
    """judgements for a, for b, and ties; "both bad" says nothing about the order"""

    def __len__(self) -> int:
        return len(self.items)

    def chosen(self, rows: np.ndarray) -> "ScoredPairs":
        return ScoredPairs(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @cached_property
    def candidates(self) -> np.ndarray:
        return np.unique(np.concatenate([self.a, self.b]))


def pairs_of_arm(
    table: ResponseTable, answers: AnswerTable, author_kind: str, arm: str
) -> ScoredPairs:
    found = judged_pairs(table, answers, author_kind)
    items = Item.objects.filter(
        project=table.project, arm=arm, purpose=Item.Purpose.TRAINING
    ).values_list("pk", flat=True)
    of_arm = np.fromiter(items.iterator(chunk_size=CHUNK), dtype=np.int64)
    found = found.chosen(np.isin(found.items, of_arm) & found.outcomes[:, :3].any(axis=1))
    a, b = answers.rows[found.a], answers.rows[found.b]
    return ScoredPairs(
        found.items, a["prompt"], a["candidate"], b["candidate"], found.outcomes[:, :3]
    )


class RewardAgreement:
    """All three rows, for the judgements of one kind of labelers."""

    def __init__(self, table: ResponseTable, answers: AnswerTable, author_kind: str):
        self._project, self._answers = table.project, answers
        self.author_kind = author_kind
        self.arm = "random"
        self.pairs = pairs_of_arm(table, answers, author_kind, self.arm)
        if not len(self.pairs):
            # Before the first selection no item was chosen for its uncertainty either.
            self.arm = ""
            self.pairs = pairs_of_arm(table, answers, author_kind, self.arm)
        self.newest: tuple[ModelVersion, Calibration, list[dict[str, Any]]] | None = None
        """the newest reward model with an accuracy"""
        found = ModelVersion.objects.filter(project=self._project, kind=ModelVersion.Kind.REWARD)
        self._models = [self._measure(model) for model in found.order_by("-id")[:NEWEST]]

    def to_json(self) -> dict[str, Any]:
        people = people_on_items(self.pairs.outcomes[:, :2])
        return {
            "arm": self.arm,
            "people": as_json(people),
            "limit": as_json(people and accuracy_limit(people)),
            "models": self._models[::-1],
        }

    def _measure(self, model: ModelVersion) -> dict[str, Any]:
        unseen, trained_on = self._unseen(model)
        margins = _margins(model, unseen)
        scored = ~np.isnan(margins)
        pairs, margins = unseen.chosen(scored), margins[scored]
        found = _calibration(pairs, margins)
        if found is not None and found.accuracy is not None and self.newest is None:
            self.newest = model, found, disagreements(pairs, margins)
        return {
            "model": model.pk,
            "name": model.name,
            "created_at": model.created_at.isoformat(),
            "accuracy": as_json(found and found.accuracy),
            "judgements": found.judgements if found else 0,
            "items": len(np.unique(pairs.items)),
            "expected_error": found and found.expected_error,
            "brier": found and found.brier,
            "log_loss": found and found.log_loss,
            "trained_on": trained_on,
            "unscored": int((~scored).sum()),
            "reason": None if found and found.accuracy else self._reason(unseen, found),
        }

    def _unseen(self, model: ModelVersion) -> tuple[ScoredPairs, int]:
        """The pairs of prompts that the model was not trained on, and the number of the others."""
        seen = np.zeros(len(self.pairs), bool)
        for snapshot in snapshots_of(model):
            seen |= np.isin(self.pairs.prompts, self._answers.prompts_of(snapshot))
        return self.pairs.chosen(~seen), int(seen.sum())

    def _reason(self, unseen: ScoredPairs, found: Calibration | None) -> str:
        """Why there is no accuracy."""
        where = "in the random arm" if self.arm else "(none was selected yet)"
        if not len(self.pairs):
            return f"no comparison {where} has been judged"
        if not len(unseen):
            return f"it was trained on the prompts of all {len(self.pairs)} judged pairs {where}"
        if found is None:
            return f"it has scored none of the {len(unseen)} judged pairs {where}"
        return "every judgement is a tie"


def _margins(model: ModelVersion, pairs: ScoredPairs) -> np.ndarray:
    """Reward of a - reward of b, (n,); nan where one of them has no score."""
    if not len(pairs):
        return np.zeros(0)
    wanted = pairs.candidates
    scores = np.full(len(wanted), np.nan)
    found = ModelScore.objects.filter(model=model).values_list("candidate_id", "score")
    rows = np.fromiter(
        found.iterator(chunk_size=CHUNK), dtype=[("candidate", np.int64), ("score", float)]
    )
    place = np.searchsorted(wanted, rows["candidate"]).clip(max=len(wanted) - 1)
    is_wanted = wanted[place] == rows["candidate"]
    scores[place[is_wanted]] = rows["score"][is_wanted]
    a, b = np.searchsorted(wanted, pairs.a), np.searchsorted(wanted, pairs.b)
    return scores[a] - scores[b]


def _calibration(pairs: ScoredPairs, margins: np.ndarray) -> Calibration | None:
    """Each judgement is one row: the sums are written out again."""
    numbers = pairs.outcomes.ravel()
    probabilities = 0.5 * (1 + np.tanh(margins / 2))
    return calibration(
        np.repeat(np.repeat(probabilities, 3), numbers),
        np.repeat(np.tile(CHOICES, len(pairs)), numbers),
        np.repeat(np.repeat(pairs.prompts, 3), numbers),
    )


def disagreements(pairs: ScoredPairs, margins: np.ndarray) -> list[dict[str, Any]]:
    """Where most labelers preferred the answer with the lower reward, the surest first."""
    numbers = pairs.outcomes.sum(axis=1)
    shares = pairs.outcomes @ CHOICES / numbers
    against = np.flatnonzero((shares - 0.5) * margins < 0)
    first = against[np.argsort(-np.abs(margins[against]), kind="stable")][:DISAGREEMENTS]
    return [
        {
            "item": int(pairs.items[n]),
            "margin": float(margins[n]),
            "people": float(shares[n]),
            "judgements": int(numbers[n]),
        }
        for n in first
    ]
