"""Labelers who judge at the same time, while the site's processes are killed: is a response lost?

    python benchmarks/feedback_concurrency.py [--database sqlite|postgresql] [--labelers 8]
                                              [--items 500] [--overlap 2] [--kills 20] [--json]

Starts `openpalm feedback` with an empty database. Half of the labelers judge over the REST API,
half by the HTML forms, all without a pause. Meanwhile the web process, the worker and the command
itself are killed with SIGKILL in turn, spread over the run, and start again. At the end the
database must hold exactly `overlap` responses of different people for each item, every response
that a labeler saw acknowledged, as it was sent, and nothing else; and no labeler may have been
sent away while an item was free for them. Exits 1 on any difference. Prints requests per second,
and the time from the request of an item to the acknowledgement of its judgement.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from feedback_site import Site, feedback_site
from postgresql import postgresql_server

from openpalm.feedback.simulation.client import FeedbackClient

PASSWORD = "simulated labelers 7"
CHOICES = ("1", "2", "4", "5", "tie", "both_bad")
GIVES_UP_S = 150.0
MAY_OVERTAKE = 16
"""judgements that may follow before a kill that is due has happened"""
LOOKS_AGAIN = 3
"""how often a labeler asks once more after it was sent away"""
KINDS = ("web", "worker", "web", "worker", "command")

MAKE = """
import json
from openpalm.feedback.accounts import tokens
from openpalm.feedback.items.new_items import NewCandidate, NewItem, add_items
from openpalm.feedback.models import Membership, Project, Role, User
User.objects.create_superuser("root", password={password!r})
project = Project.objects.create(slug="load", name="Load", overlap={overlap})
made = []
for n in range({labelers}):
    user = User.objects.create_user(f"labeler-{{n}}", password={password!r}, kind="simulated")
    Membership.objects.create(project=project, user=user, role=Role.ANNOTATOR)
    made.append(tokens.issue(user, "load", ["responses:write"], project=project))
add_items(project, [
    NewItem(
        [{{"role": "user", "content": f"Question {{n}}?"}}],
        (NewCandidate(f"Answer {{n}}."), NewCandidate(f"Another answer to {{n}}.")),
        "typed",
    )
    for n in range({items})
])
print(json.dumps(made))
"""
READ = """
import json
from openpalm.feedback.models import Item, Response
rows = Response.objects.order_by("id").values(
    "assignment", "item", "user", "state", "in_force", "payload", "picked_place"
)
items = Item.objects.values_list("id", "taken", "submitted", "state")
print(json.dumps({"responses": list(rows), "items": list(items)}))
"""


@dataclass
class Tally:
    """What the labelers saw."""

    sent: dict[int, str] = field(default_factory=dict)
    """assignment -> choice of each acknowledged judgement"""
    seconds: list[float] = field(default_factory=list)
    """of each judgement that no kill disturbed"""
    requests: int = 0
    repeated: int = 0
    """requests that got no answer and were sent again"""
    waited: int = 0
    """times that a labeler was sent away although there was an item"""

    def add(self, other: "Tally") -> None:
        self.sent |= other.sent
        self.seconds += other.seconds
        self.requests += other.requests
        self.repeated += other.repeated
        self.waited += other.waited


@dataclass(frozen=True)
class Result:
    database: str
    items: int
    responses: int
    acknowledged: int
    kills: dict[str, int]
    repeated_requests: int
    wrong_counts: int
    """items without exactly `overlap` responses of different people"""
    lost: int
    """acknowledged responses that the database lacks"""
    altered: int
    extra: int
    """responses of an assignment beyond the first, surplus or out of force"""
    waited: int
    requests_per_s: float
    p50_ms: float
    p95_ms: float
    seconds: float

    @property
    def right(self) -> bool:
        return not (self.wrong_counts or self.lost or self.altered or self.extra or self.waited)


class ApiLabeler:
    """Judges over the REST API."""

    def __init__(self, site: Site, number: int, token: str, tally: Tally):
        self._client = FeedbackClient(site.url, token, patience_s=GIVES_UP_S)
        self._tally = tally

    def next(self) -> int | None:
        self._tally.requests += 1
        assignment = self._client.next("load")
        return assignment["id"] if assignment else None

    def submit(self, assignment: int, choice: str) -> None:
        self._tally.requests += 1
        self._client.submit(assignment, _payload(choice))

    def close(self) -> None:
        self._client.close()

    @property
    def repeated(self) -> int:
        return self._client.repeated


def _payload(choice: str) -> dict[str, Any]:
    if not choice.isdigit():
        return {choice: [0, 1]}
    step = int(choice) - 3
    better = int(step > 0)
    return {"better": better, "worse": 1 - better, "strength": abs(step)}


class FormLabeler:
    """Judges by the pages, without JavaScript."""

    def __init__(self, site: Site, number: int, token: str, tally: Tally):
        self._client = httpx2.Client(base_url=site.url, timeout=60)
        self._tally = tally
        self.repeated = 0
        page = self._ask("GET", "/login")
        form = {"username": f"labeler-{number}", "password": PASSWORD} | _csrf(page.text)
        self._page = self._ask("POST", "/login", data=form)
        assert self._page.status_code == 302, self._page.text[:2000]

    def next(self) -> int | None:
        self._page = self._ask("GET", "/p/load/label")
        assert self._page.status_code == 200, self._page.text[:2000]
        found = re.search(r'action="/p/load/assignments/(\d+)/submit"', self._page.text)
        return int(found[1]) if found else None

    def submit(self, assignment: int, choice: str) -> None:
        form = {"choice": choice, "elapsed_ms": "1000"} | _csrf(self._page.text)
        done = self._ask("POST", f"/p/load/assignments/{assignment}/submit", data=form)
        assert done.status_code == 302, f"{done.status_code} {done.text[:2000]}"

    def close(self) -> None:
        self._client.close()

    def _ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        self._tally.requests += 1
        give_up = time.monotonic() + GIVES_UP_S
        while True:
            try:
                return self._client.request(method, path, **options)
            except httpx2.TransportError:
                assert time.monotonic() < give_up
                self.repeated += 1
                time.sleep(0.1)


def _csrf(page: str) -> dict[str, str]:
    found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
    assert found, page[:2000]
    return {"csrfmiddlewaretoken": found[1]}


Labeler = ApiLabeler | FormLabeler


def work(make: Callable[[Tally], Labeler], seed: int, progress: "Progress") -> Tally:
    tally = Tally()
    with closing(make(tally)) as labeler:
        judge_all(labeler, tally, random.Random(seed), progress)
    tally.repeated = labeler.repeated
    return tally


def judge_all(labeler: Labeler, tally: Tally, drawn: random.Random, progress: "Progress") -> None:
    """Judges until nothing is left."""
    away = 0
    while away <= LOOKS_AGAIN:
        before, started = labeler.repeated, time.perf_counter()
        assignment = labeler.next()
        if assignment is None:
            away += 1
            time.sleep(0.1)
            continue
        # Nobody skips and no lease ends here, so an item that is free now was free before.
        tally.waited += away > 0
        away, choice = 0, drawn.choice(CHOICES)
        labeler.submit(assignment, choice)
        if labeler.repeated == before:
            tally.seconds.append(time.perf_counter() - started)
        tally.sent[assignment] = choice
        progress.step()


class Progress:
    """Counts the acknowledged judgements, and holds labelers back while kills are due."""

    def __init__(self) -> None:
        self._count, self._allowed, self._ended = 0, math.inf, False
        self._changed = threading.Condition()

    def step(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._count < self._allowed)

    def allow(self, count: float) -> None:
        with self._changed:
            self._allowed = count
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, count: int) -> bool:
        """Whether the count was reached before the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._count >= count)
            return not self._ended


def kill_in_turn(site: Site, kills: int, total: int, progress: Progress, seed: int) -> Counter[str]:
    """Kills one process after each equal part of the work, at a random moment."""
    drawn, done = random.Random(seed), Counter[str]()
    for number in range(kills):
        due = (number + 1) * total // (kills + 2)
        progress.allow(due + MAY_OVERTAKE)
        if not progress.wait(due):
            break
        time.sleep(drawn.uniform(0, 0.05))
        kind = KINDS[number % len(KINDS)]
        done[kind if kill(site, kind) else "command"] += 1
        print(f"{time.strftime('%H:%M:%S')} killed {dict(done)}", file=sys.stderr, flush=True)
    progress.allow(math.inf)
    return done


def kill(site: Site, kind: str) -> bool:
    """Kills the child of this kind; without one, kills the command and starts it again."""
    assert site.process
    for child in _children(site.process.pid):
        if kind in _words(child):
            os.kill(child, signal.SIGKILL)
            return True
    site.kill()
    deadline = time.monotonic() + GIVES_UP_S
    while True:
        try:
            site.start()
            return False
        except AssertionError:
            # The web process finishes its requests before it follows, and has the port so long.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in text.split()]


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    except OSError:
        return []


def measure(
    site: Site, database: str, *, labelers: int, items: int, overlap: int, kills: int, seed: int = 0
) -> Result:
    """Lets the labelers judge all items of a new project."""
    make = MAKE.format(password=PASSWORD, overlap=overlap, labelers=labelers, items=items)
    tokens = json.loads(site.manage("shell", "-v", "0", "-c", make).splitlines()[-1])
    progress, tally, started = Progress(), Tally(), time.monotonic()

    def labeler(number: int) -> Tally:
        kind = ApiLabeler if number % 2 else FormLabeler
        return work(lambda t: kind(site, number, tokens[number], t), seed + number, progress)

    with ThreadPoolExecutor(labelers + 1) as pool:
        killed = pool.submit(kill_in_turn, site, kills, items * overlap, progress, seed)
        try:
            for one in [pool.submit(labeler, number) for number in range(labelers)]:
                tally.add(one.result())
        finally:
            progress.end()
    seconds = time.monotonic() - started
    stored = json.loads(site.manage("shell", "-v", "0", "-c", READ).splitlines()[-1])
    return compare(stored, tally, database, overlap, dict(killed.result()), seconds)


def compare(
    stored: dict[str, Any],
    tally: Tally,
    database: str,
    overlap: int,
    kills: dict[str, int],
    seconds: float,
) -> Result:
    """What the database holds, compared with what the labelers saw."""
    counted = [r for r in stored["responses"] if r["in_force"] and r["state"] == "submitted"]
    by_assignment = {r["assignment"]: r for r in counted}
    people: dict[int, set[int]] = {}
    for r in counted:
        people.setdefault(r["item"], set()).add(r["user"])
    per_item = Counter(r["item"] for r in counted)
    wrong = sum(
        (taken, submitted, state) != (overlap, overlap, "complete")
        or not per_item[item] == len(people.get(item, ())) == overlap
        for item, taken, submitted, state in stored["items"]
    )
    kept = {a: c for a, c in tally.sent.items() if a in by_assignment}
    times = [second * 1000 for second in tally.seconds]
    return Result(
        database=database,
        items=len(stored["items"]),
        responses=len(counted),
        acknowledged=len(tally.sent),
        kills=kills,
        repeated_requests=tally.repeated,
        wrong_counts=wrong,
        lost=len(tally.sent) - len(kept),
        altered=sum(not _is_as_sent(by_assignment[a], choice) for a, choice in kept.items()),
        extra=len(stored["responses"]) - len(by_assignment),
        waited=tally.waited,
        requests_per_s=round(tally.requests / seconds, 1),
        p50_ms=round(median(times), 1),
        p95_ms=round(quantiles(times, n=20)[-1], 1),
        seconds=round(seconds, 1),
    )


def _is_as_sent(response: dict[str, Any], choice: str) -> bool:
    """The side of the screen, or tie or both bad."""
    if choice.isdigit():
        return response["picked_place"] == int(int(choice) > 3)
    return choice in response["payload"]


@contextmanager
def database_url(kind: str) -> Iterator[str | None]:
    if kind == "sqlite":
        yield None
        return
    with postgresql_server(fsync=True) as server, server.database() as url:
        yield url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--labelers", type=int, default=8)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--overlap", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    kind, as_json = options.pop("database"), options.pop("json")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        database_url(kind) as url,
        feedback_site(Path(folder) / "site", url) as site,
    ):
        result = measure(site, kind, **options)
        log = site.said()
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        for name, value in asdict(result).items():
            print(f"{name:<20}{value}")
    for line in sorted({one for one in log.splitlines() if "Error" in one})[:10]:
        print(line, file=sys.stderr)
    return 0 if result.right else 1


if __name__ == "__main__":
    sys.exit(main())
