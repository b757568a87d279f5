"""The answers of a project's items as arrays, 58 bytes each; see response_table.py.

An item never changes its answers, and a text never changes, so that each is read once.
"""

from collections.abc import Iterator

import numpy as np

from openpalm.feedback.models import Candidate, Item, ItemCandidate, Project, Snapshot
from openpalm.feedback.quality.response_table import CHUNK, READ_AGAIN, Report
from openpalm.feedback.statistics.style import FEATURES, style_of

TEXTS = 500
"""texts that are read at once"""
UNKNOWN = -1
ANSWER = np.dtype(
    [
        ("item", np.int64),
        ("prompt", np.int64),
        ("candidate", np.int64),
        ("model", np.int64),  # or UNKNOWN
        ("position", np.int16),
        ("style", np.int32, len(FEATURES)),  # UNKNOWN until the text was read
    ]
)


class AnswerTable:
    """The answers of all items, by item and position."""

    def __init__(self, project: Project):
        self._project = project
        self.rows = np.empty(0, ANSWER)
        self._prompts: dict[int, np.ndarray] = {}

    def refresh(self, report: Report = lambda count: None) -> None:
        """Adds the answers of new items."""
        self._read_new(report)
        if self._items() != len(np.unique(self.rows["item"])):
            self.rows = self.rows[:0]  # an item was missed: it was stored long after newer ones
            self._read_new(report)

    def _items(self) -> int:
        """Items up to the last one of the table, without those that have no answers."""
        last = int(self.rows["item"][-1]) if len(self.rows) else 0
        items = Item.objects.filter(project=self._project, pk__lte=last)
        return items.count() - items.filter(places=None).count()

    def _read_new(self, report: Report) -> None:
        known = np.unique(self.rows["item"])
        last = int(known[-READ_AGAIN - 1]) if len(known) > READ_AGAIN else 0
        chunks = [self.rows[self.rows["item"] <= last]]
        items = Item.objects.filter(project=self._project).order_by("pk")
        while ids := list(items.filter(pk__gt=last).values_list("pk", flat=True)[:CHUNK]):
            chunks.append(self._answers(ids[0], ids[-1]))
            last = ids[-1]
            report(len(ids))
        self.rows = np.concatenate(chunks)

    def _answers(self, first: int, last: int) -> np.ndarray:
        found = ItemCandidate.objects.filter(
            item__project=self._project, item_id__gte=first, item_id__lte=last
        ).order_by("item_id", "position")
        columns = ("item_id", "item__prompt_id", "candidate_id", "candidate__model_id", "position")
        given = list(found.values_list(*columns))
        rows = np.empty(len(given), ANSWER)
        rows["style"] = UNKNOWN
        for name, values in zip(ANSWER.names or (), zip(*given, strict=True), strict=False):
            rows[name] = [UNKNOWN if value is None else value for value in values]
        return rows

    def find(self, items: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Index of the answer at a position of an item, (n,)."""
        most = int(self.rows["position"].max(initial=0)) + 1
        keys = self.rows["item"] * most + self.rows["position"]
        return np.searchsorted(keys, items * most + positions)

    def prompts_of(self, snapshot: Snapshot) -> np.ndarray:
        """Ids of the prompts that a model was trained on; read once, for a snapshot is frozen."""
        if snapshot.pk not in self._prompts:
            found = snapshot.rows.order_by().values_list("response__item__prompt_id", flat=True)
            prompts = np.fromiter(found.distinct().iterator(chunk_size=CHUNK), dtype=np.int64)
            self._prompts[snapshot.pk] = prompts
        return self._prompts[snapshot.pk]

    def styles(self, at: np.ndarray) -> np.ndarray:
        """Style of the answers at these indices, (n, features); reads texts for the first time."""
        wanted = np.unique(at)
        unread = wanted[self.rows["style"][wanted, 0] == UNKNOWN]
        for some in _parts(unread):
            ids = self.rows["candidate"][some].tolist()
            found = Candidate.objects.filter(pk__in=ids).values_list("pk", "text")
            style = {pk: style_of(text) for pk, text in found}
            self.rows["style"][some] = [style[pk] for pk in ids]
        return self.rows["style"][at]


def _parts(indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), TEXTS):
        yield indices[start : start + TEXTS]
