"""Pairs of answers that labelers compared, or ranked, with the outcomes of each pair."""

from dataclasses import dataclass

import numpy as np

from openpalm.feedback.quality.answer_table import AnswerTable
from openpalm.feedback.quality.counted import OUTCOMES, values_of, winners
from openpalm.feedback.quality.response_table import ResponseTable


@dataclass(frozen=True)
class JudgedPairs:
    """Arrays of n pairs, by item."""

    items: np.ndarray
    a: np.ndarray
    """indices of answers in the answer table"""
    b: np.ndarray
    outcomes: np.ndarray
    """judgements for a, for b, ties, and both bad, (n, 4)"""

    def __len__(self) -> int:
        return len(self.items)

    def chosen(self, rows: np.ndarray) -> "JudgedPairs":
        return JudgedPairs(self.items[rows], self.a[rows], self.b[rows], self.outcomes[rows])


def judged_pairs(table: ResponseTable, answers: AnswerTable, author_kind: str) -> JudgedPairs:
    """The pairs that these labelers judged, in a project with comparisons."""
    values = values_of(table, author_kind)
    if table.kind == "compare":
        values = winners(values)
        places = np.array([[0, 1]])
    elif table.kind == "rank":
        places = np.array(table.parts, dtype=np.int64).reshape(-1, 2)
    else:
        none = np.empty(0, np.int64)
        return JudgedPairs(none, none, none, np.empty((0, len(OUTCOMES)), np.int64))
    i, j = places[values.unit_parts].T if len(values.codes) else np.empty((2, 0), np.int64)
    # The outcomes in the order of OUTCOMES; a ranking has no "both bad".
    counts = np.zeros((len(values.unit_items), len(OUTCOMES)), np.int64)
    for n, category in enumerate(values.categories):
        counts[:, OUTCOMES.index(category)] = values.counts[:, n]
    items = values.unit_items
    return JudgedPairs(items, answers.find(items, i), answers.find(items, j), counts)
