"""Several simulated labelers that judge at the same time, each with its own token."""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openpalm.feedback.simulation.client import FeedbackClient
from openpalm.feedback.simulation.labeler import Labeler


class Quota:
    """How many judgements are left to make, over all labelers."""

    def __init__(self, count: int | None):
        self._left = count
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self._left is None:
                return True
            self._left -= 1
            return self._left >= 0


def simulate(
    url: str, project: str, pairs: Sequence[tuple[str, Labeler]], count: int | None = None
) -> Counter[str]:
    """Judges until `count` judgements are made or nothing is left. `pairs`: token and labeler.

    Returns how many judgements were counted and how many were surplus. Raises WorkError.
    """
    quota = Quota(count)
    clients = [FeedbackClient(url, token) for token, _ in pairs]
    try:
        with ThreadPoolExecutor(len(pairs)) as pool:
            works = [
                pool.submit(_work, client, project, labeler, quota)
                for client, (_, labeler) in zip(clients, pairs, strict=True)
            ]
            return sum((work.result() for work in works), Counter())
    finally:
        for client in clients:
            client.close()


def _work(client: FeedbackClient, project: str, labeler: Labeler, quota: Quota) -> Counter[str]:
    made: Counter[str] = Counter()
    while quota.take() and (assignment := client.next(project)):
        response = client.submit(assignment["id"], judge(labeler, assignment))
        made["counted" if response["counted"] else "surplus"] += 1
    return made


def judge(labeler: Labeler, assignment: dict[str, Any]) -> dict[str, Any]:
    """The payload of a labeler for an assignment as the API shows it."""
    question = assignment["messages"][-1]["content"]
    replies = [candidate["text"] for candidate in assignment["candidates"]]
    return labeler.judge(
        assignment["kind"],
        question,
        replies,
        strengths=assignment["scale"] // 2,
        axes=assignment["axes"],
    )
