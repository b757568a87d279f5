"""How the simulated labelers of the feedback loop judge: through the site's API, or without it.

Both ways give the same: preference records, whose first candidate is the item's `first`. Labelers
see a question and two texts, in an order drawn for each item, and nothing else.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2
from served import address_of

from openpalm.feedback.simulation.client import FeedbackClient
from openpalm.feedback.simulation.labeler import Labeler
from openpalm.feedback.simulation.session import judge
from openpalm.feedback.simulation.tastes import TASTES

ADDRESS = re.compile(r"feedback: (http://[\d.]+:\d+)/")
END_S = 60
MOST_ITEMS = 100
"""items of one request"""
ADMIN = """
from openpalm.feedback.accounts import tokens
from openpalm.feedback.models import ApiToken, User
user, _ = User.objects.get_or_create(username="proof", is_superuser=True, is_staff=True)
print("TOKEN " + tokens.issue(user, "proof", ApiToken.SCOPES))
"""


@dataclass(frozen=True)
class Item:
    """Two replies to a question."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Judged:
    """The record of a judgement, and whether the item's first reply was on the left."""

    record: dict[str, Any]
    first_left: bool


class Judging(Protocol):
    """Has each item judged once, by one of three labelers."""

    def collect(self, name: str, items: Sequence[Item], seed: int) -> list[Judged]:
        """`name`: a new name for the project; no two items have the same question."""
        ...


def labelers(seed: int) -> list[Labeler]:
    """One of each taste, with the usual noise."""
    return [Labeler(taste, f"{seed} {name}") for name, taste in TASTES.items()]


class WithoutSite:
    """The labelers judge in this process."""

    def collect(self, name: str, items: Sequence[Item], seed: int) -> list[Judged]:
        judges, drawn = labelers(seed), random.Random(f"sides {name} {seed}")
        made = []
        for number, item in enumerate(items):
            labeler, texts = judges[number % len(judges)], [item.first, item.second]
            record = {
                "id": f"{name}-{number}",
                "prompt": [{"role": "user", "content": item.question}],
                "candidates": [{"text": text} for text in texts],
                "kind": "compare",
                "payload": labeler.judge("compare", item.question, texts),
                "author": labeler.taste.name,
                "author_kind": "simulated",
                "created": "2026-01-01T00:00:00Z",
            }
            made.append(Judged(record, drawn.random() < 0.5))
        return made


class Site:
    """The labelers judge over the REST API of a running `openpalm feedback`."""

    def __init__(self, url: str, folder: Path):
        self._folder, self._url = folder, url
        token = re.search(r"TOKEN (\S+)", manage(folder, "shell", "-c", ADMIN))
        assert token is not None
        self._headers = {"Authorization": f"Bearer {token[1]}"}
        self._admin = FeedbackClient(url, token[1])

    def collect(self, name: str, items: Sequence[Item], seed: int) -> list[Judged]:
        """In a project of its own, each labeler in turn."""
        project = {"slug": name, "name": name, "task": "pair", "scale": 7}
        self._admin.call("POST", "projects", project)
        ids = self._add(name, items)
        tokens = manage(self._folder, "create_labelers", name, "--count", str(len(TASTES)))
        clients = [FeedbackClient(self._url, line.split("\t")[1]) for line in tokens.splitlines()]
        left = self._judge(name, [*zip(clients, labelers(seed), strict=True)])
        sides = {
            item.question: left[number] == item.first
            for number, item in zip(ids, items, strict=True)
        }
        return [Judged(row, sides[row["prompt"][0]["content"]]) for row in self._export(name)]

    def _add(self, project: str, items: Sequence[Item]) -> list[int]:
        """The ids of the items."""
        rows = [
            {"prompt": i.question, "candidates": [{"text": i.first}, {"text": i.second}]}
            for i in items
        ]
        ids = []
        for begin in range(0, len(rows), MOST_ITEMS):
            part = {"project": project, "items": rows[begin : begin + MOST_ITEMS]}
            ids += [row["id"] for row in self._admin.call("POST", "items", part)["data"]]
        return ids

    def _judge(
        self, project: str, pairs: Sequence[tuple[FeedbackClient, Labeler]]
    ) -> dict[int, str]:
        """Until nothing is left; returns the text on the left of each item."""
        left: dict[int, str] = {}
        for number in range(1_000_000):
            client, labeler = pairs[number % len(pairs)]
            assignment = client.next(project)
            if assignment is None:
                return left
            client.submit(assignment["id"], judge(labeler, assignment))
            left[assignment["item"]] = assignment["candidates"][0]["text"]
        return left

    def _export(self, project: str) -> list[dict[str, Any]]:
        url = f"{self._url}/api/v1/responses/export"
        answer = httpx2.get(url, params={"project": project}, headers=self._headers, timeout=60)
        answer.raise_for_status()
        return [json.loads(line) for line in answer.text.splitlines()]


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Starts `openpalm feedback` on a free port with a database in `folder`, and ends it."""
    words = [sys.executable, "-m", "openpalm", "feedback", "--port", "0", "--dir", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        yield Site(address_of(process, ADDRESS), folder)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=END_S)


def manage(folder: Path, *words: str) -> str:
    """What a management command of the site prints."""
    program = [sys.executable, "-m", "openpalm", "feedback", "manage", *words]
    environment = os.environ | {"OPENPALM_FEEDBACK_DIR": str(folder.absolute())}
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
    return done.stdout
