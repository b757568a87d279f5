"""The feedback site with 100,000 items and 1,000,000 responses: every page, plans, the export.

    python benchmarks/feedback_scale.py [--database sqlite|postgresql] [--items 100000]
                                        [--responses 10] [--keep FOLDER | --url URL]
                                        [--parts pages,export,formats,statistics]
                                        [--plans FILE] [--json]

Fills a project by bulk SQL: --responses for each item, by 40 labelers; half of the items wait for
two more; answers of two models, scores of a reward model, 200,000 lines of the audit log and
100,000 jobs. Times every GET URL of the site and of the API as an administrator, the long lists
with their filters (the fastest, the median and the slowest of 5), the next item and its submission
for a labeler, for one who has had every open item, and the export of all judgements, all formats in
one pass, and the worker's statistics twice (from nothing, and again after them), with the peak
memory of their processes. Shows the plans of the queries that depend on the size. Exits 1 if a page
takes longer than 300 ms, the fastest of 5.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

LIMIT_MS = 300.0
USERS = 40
EVENTS, JOBS = 200_000, 100_000
REPEATS = 5
SLUG = "scale"
SKIPPED_VIEWS = ("logout", "download", "api-export")
"""do something else than show a page; the export is measured by itself"""
FILTERS = {
    "items": (
        "before={item}",
        "after={item}",
        "state=complete&before={item}",
        "state=withdrawn",
        "purpose=gold",
        "purpose=comparison&state=open",
        "arm=active",
        "arm=random&before={item}",
        "who=u3",
        "who=u3&before={item}",
        "who=nobody",
        "who=root",
        "only=flagged",
        "only=names",
        "only=names&who=u3&state=open",
    ),
    "responses": (
        "before={response}",
        "after={response}",
        "state=submitted&before={response}",
        "state=flagged",
        "kind=compare&before={response}",
        "kind=flag",
        "by=simulated&before={response}",
        "by=person",
        "who=u3&before={response}",
        "who=root",
        "who=u3&state=flagged",
        "who=u3&kind=compare&by=simulated&before={response}",
        "who=u3&by=person",
        "who=root&by=simulated",
        "kind=edit&state=deleted&by=model",
    ),
    "audit": ("area=job", "area=token", "who=u3", "who=nobody", "area=site&who=root"),
    "jobs": ("before=50000", "after=50000"),
}
"""queries of the long lists: common values, rare ones, and pages in the middle"""


def numbers(name: str, count: int) -> str:
    """A table of 1 ... count, on both databases."""
    return (
        f"WITH RECURSIVE {name}(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM {name} "
        f"WHERE i < {count})"
    )


def each_of(flag: str, skip: str, judgement: str) -> str:
    """Of 1,000 responses one is a flag and one is a skip."""
    return f"CASE i % 1000 WHEN 7 THEN {flag} WHEN 8 THEN {skip} ELSE {judgement} END"


class Filler:
    """Writes the rows by INSERT ... SELECT."""

    def __init__(self, items: int, responses: int):
        from django.db import connection

        self.items, self.responses = items, responses
        self.connection = connection
        self.is_postgresql = connection.vendor == "postgresql"

    def json(self, text: str) -> str:
        return f"'{text}'::jsonb" if self.is_postgresql else f"'{text}'"

    @property
    def messages(self) -> str:
        content = "'Question ' || i || ': ' || '" + "why is the sky blue at noon? " * 6 + "'"
        if self.is_postgresql:
            return f"jsonb_build_array(jsonb_build_object('role', 'user', 'content', {content}))"
        return f"json_array(json_object('role', 'user', 'content', {content}))"

    @property
    def uid(self) -> str:
        return "gen_random_uuid()" if self.is_postgresql else "lower(hex(randomblob(16)))"

    def run(self, project: int, first_user: int) -> None:
        items, each = self.items, self.responses
        self._insert(
            "prompt",
            items,
            {
                "id": "i",
                "project_id": project,
                "messages": self.messages,
                "digest": "'digest ' || i",
                "source": "'file'",
                "held_out": "false",
                "created_at": "CURRENT_TIMESTAMP",
            },
        )
        self._insert(
            "candidate",
            2 * items,
            {
                "id": "i",
                "prompt_id": "(i + 1) / 2",
                "text": "'Answer ' || i || ': ' || '"
                + "because blue light scatters more. " * 10
                + "'",
                "checkpoint": "'model-' || (i % 2)",
                "names_itself": "false",
                "created_at": "CURRENT_TIMESTAMP",
            },
        )
        self._insert(
            "item",
            items,
            {
                "id": "i",
                "project_id": project,
                "prompt_id": "i",
                "purpose": "'training'",
                "arm": "'random'",
                "priority": "0",
                "needed": f"{each} + 2 * (i % 2)",
                "taken": each,
                "submitted": each,
                "state": "CASE WHEN i % 2 = 1 THEN 'open' ELSE 'complete' END",
                "gold_kind": "''",
                "created_at": "CURRENT_TIMESTAMP",
            },
        )
        self._insert(
            "itemcandidate",
            2 * items,
            {
                "id": "i",
                "item_id": "(i + 1) / 2",
                "candidate_id": "i",
                "position": "(i + 1) % 2",
            },
        )
        item, number = f"((i - 1) / {each} + 1)", f"((i - 1) % {each})"
        user = f"({first_user} + ({item} * 7 + {number}) % {USERS})"
        self._insert(
            "assignment",
            items * each,
            {
                "id": "i",
                "item_id": item,
                "user_id": user,
                "project_id": project,
                "repeat": "0",
                "state": "'submitted'",
                "order": self.json("[0, 1]"),
                "counted": "true",
                "leased_at": "CURRENT_TIMESTAMP",
                "expires_at": "CURRENT_TIMESTAMP",
            },
        )
        left = self.json('{"better": 0, "worse": 1, "strength": 1}')
        right = self.json('{"better": 1, "worse": 0, "strength": 2}')
        picked = f"CASE WHEN i % 3 = 0 THEN {left} ELSE {right} END"
        none, reason = self.json("{}"), self.json('{"candidate": null, "reason": "broken"}')
        self._insert(
            "response",
            items * each,
            {
                "id": "i",
                "uid": self.uid,
                "project_id": project,
                "item_id": item,
                "user_id": user,
                "assignment_id": "i",
                "author_kind": "'simulated'",
                "state": each_of("'flagged'", "'skipped'", "'submitted'"),
                "kind": each_of("'flag'", "'skip'", "'compare'"),
                "payload": each_of(reason, none, picked),
                "reason": "''",
                "category": each_of("NULL", "NULL", "CASE WHEN i % 3 = 0 THEN -1 ELSE 2 END"),
                "picked_place": each_of("NULL", "NULL", "i % 2"),
                "elapsed_ms": "20000",
                "guideline_version": "1",
                "in_force": each_of("true", "false", "true"),
                "created_at": "CURRENT_TIMESTAMP",
            },
        )
        # A labeler who has had every open item.
        self._insert(
            "assignment",
            items // 2,
            {
                "id": f"{items * each} + i",
                "item_id": "2 * i - 1",
                "user_id": first_user + USERS,
                "project_id": project,
                "repeat": "0",
                "state": "'skipped'",
                "order": self.json("[0, 1]"),
                "counted": "true",
                "leased_at": "CURRENT_TIMESTAMP",
                "expires_at": "CURRENT_TIMESTAMP",
            },
        )
        self._finish()

    def run_rest(self, project: int, root: int, models: list[int]) -> None:
        """Adds everything but the judgements: authors of answers, scores, events, jobs."""
        with self.connection.cursor() as cursor:
            cursor.execute(f"UPDATE feedback_candidate SET model_id = {models[0]} + id % 2")
        score = {
            "model_id": models[2],
            "candidate_id": "i",
            "score": "(i * 7919 % 1000) / 250.0 - 2",
        }
        self._insert("modelscore", 2 * self.items, score)
        event = {
            "project_id": project,
            "user_id": root,
            "action": "CASE WHEN i % 40000 = 0 THEN 'token.issued' ELSE 'judgement.deleted' END",
            "target": "'response ' || i",
            "data": self.json("{}"),
            "created_at": "CURRENT_TIMESTAMP",
        }
        self._insert("event", EVENTS, event)
        job = {
            "project_id": project,
            "kind": "'import'",
            "arguments": self.json("{}"),
            "state": "'done'",
            "done": 1,
            "total": 1,
            "message": "''",
            "result": self.json("{}"),
            "attempts": 1,
            "worker": "''",
            "created_at": "CURRENT_TIMESTAMP",
        }
        self._insert("job", JOBS, job)
        self._finish()

    def _insert(self, table: str, count: int, columns: dict[str, Any]) -> None:
        started = time.monotonic()
        names = ", ".join(f'"{name}"' for name in columns)
        values = ", ".join(str(value) for value in columns.values())
        with self.connection.cursor() as cursor:
            cursor.execute(
                f"INSERT INTO feedback_{table} ({names}) {numbers('n', count)} "
                f"SELECT {values} FROM n"
            )
        print(f"{count:>9} {table} in {time.monotonic() - started:.0f} s", file=sys.stderr)

    def _finish(self) -> None:
        from django.apps import apps
        from django.core.management.color import no_style

        models = apps.get_app_config("feedback").get_models()
        with self.connection.cursor() as cursor:
            for statement in self.connection.ops.sequence_reset_sql(no_style(), list(models)):
                cursor.execute(statement)
            if self.is_postgresql:  # as its autovacuum would; nothing does it for SQLite
                cursor.execute("VACUUM ANALYZE")


def fill(items: int, responses: int) -> None:
    from openpalm.feedback.models import Guideline, Membership, Project, Role, User

    root = User.objects.create_superuser("root")
    project = Project.objects.create(slug=SLUG, name="Scale", overlap=responses, gold_share=0.1)
    Guideline.objects.create(project=project, version=1, text="# Be kind", author=root)
    users = [User.objects.create(username=f"u{n}", kind="simulated") for n in range(USERS + 1)]
    assert [user.pk for user in users] == list(range(users[0].pk, users[0].pk + USERS + 1))
    Membership.objects.bulk_create(
        Membership(project=project, user=user, role=Role.ANNOTATOR) for user in users
    )
    Filler(items, responses).run(project.pk, users[0].pk)


def fill_rest(items: int, responses: int) -> None:
    from openpalm.feedback.models import ModelVersion, Project, User

    project = Project.objects.get(slug=SLUG)
    names = (("model-0", "policy"), ("model-1", "policy"), ("reward-1", "reward"))
    made = [ModelVersion.objects.create(project=project, name=n, kind=kind) for n, kind in names]
    ModelVersion.objects.filter(pk=made[1].pk).update(parent=made[0])
    root = User.objects.get(username="root")
    Filler(items, responses).run_rest(project.pk, root.pk, [model.pk for model in made])


# What is timed.


def timed(name: str, call: Callable[[], Any]) -> tuple[float, float, float, float]:
    """Fastest, median and slowest of some calls, and the median of this process's processor time,
    in ms, after one that warms the caches."""
    call()
    times, cpu = [], []
    for _ in range(REPEATS):
        started, before = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - started) * 1000)
        cpu.append((time.process_time() - before) * 1000)
    found = min(times), median(times), max(times), median(cpu)
    print("".join(f"{ms:>9.1f}" for ms in found), name, file=sys.stderr, flush=True)
    return round(found[0], 1), round(found[1], 1), round(found[2], 1), round(found[3], 1)


def urls(patterns: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, route) of every URL."""
    for one in patterns:
        route = prefix + str(one.pattern)
        if hasattr(one, "url_patterns"):
            yield from urls(one.url_patterns, route)
        else:
            yield one.name or route, route


def pages(ids: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(name, path) of every URL, filled with ids of rows in the middle."""
    from django.urls import get_resolver

    for name, route in urls(get_resolver().url_patterns):
        path = re.sub(r"<(?:\w+:)?(\w+)>", lambda found: ids.get(found[1], "1"), route)
        if name not in SKIPPED_VIEWS and "(" not in path and "^" not in path:
            yield name, f"/{path}"
    for page, queries in FILTERS.items():
        for query in queries:
            query = query.format(item=ids["item_id"], response=ids["response_id"])
            yield f"{page}, filtered", f"/p/{SLUG}/{page}?{query}"
    project = f"project={SLUG}"
    middle = f"{project}&after={int(ids['item_id'])}&limit=500"
    yield "api-items, a full page", f"/api/v1/items?{middle}"
    yield "api-items, complete ones", f"/api/v1/items?{middle}&state=complete"
    yield "api-responses, a full page", f"/api/v1/responses?{middle}"
    yield "api-responses of a labeler", f"/api/v1/responses?{middle}&author=u3"
    yield "api-responses of nobody", f"/api/v1/responses?{middle}&author=root"
    yield "api-responses of an item", f"/api/v1/responses?{project}&item={ids['item_id']}"


def time_pages(result: dict[str, Any]) -> None:
    from django.test import Client

    from openpalm.feedback.accounts import tokens
    from openpalm.feedback.models import ApiToken, Response, User

    root = User.objects.get(username="root")
    client = Client(headers={"Authorization": f"Bearer {tokens.issue(root, 'x', ApiToken.SCOPES)}"})
    client.force_login(root)
    row = Response.objects.order_by("id")[Response.objects.count() // 2]
    ids = {
        "slug": SLUG,
        "item_id": str(row.item_id),
        "response_id": str(row.pk),
        "uid": str(row.uid),
        "prompt_id": str(row.item_id),
        "assignment_id": str(row.assignment_id),
        "object_id": str(row.pk),
        "app_label": "feedback",
    }
    for name, path in pages(ids):
        # A list of the API needs its project.
        if path.startswith("/api/v1/") and path.count("/") == 3 and "?" not in path:
            path += "" if path.endswith(("projects", ".json")) else f"?project={SLUG}"
        first = client.get(path)
        if first.status_code >= 400:
            result["skipped"].append(f"{name} ({first.status_code})")
            continue

        def show(path: str = path) -> None:
            answer = client.get(path)
            b"".join(answer) if answer.streaming else answer.content

        known = f"{name} {path}"[:100]
        result["pages"][known] = timed(known, show)


def time_judging(result: dict[str, Any]) -> None:
    from openpalm.feedback.judgements import queue, submission
    from openpalm.feedback.judgements.submission import Judgement
    from openpalm.feedback.models import Project, User

    project = Project.objects.get(slug=SLUG)
    labeler, worn = User.objects.get(username="u3"), User.objects.get(username=f"u{USERS}")
    tie = Judgement("compare", {"tie": [0, 1]})

    def leave() -> None:
        assignment = queue.next_assignment(project, labeler)
        assert assignment
        submission.skip(assignment.pk, labeler, "")

    def judge() -> None:
        assignment = queue.next_assignment(project, labeler)
        assert assignment
        submission.submit(assignment.pk, labeler, tie)

    calls: dict[str, Callable[[], Any]] = {
        "next item and skip": leave,
        "next item and submission": judge,
        "next item, nothing left": lambda: queue.next_assignment(project, worn),
        "next item, a repetition": leave,
    }
    for name, call in calls.items():
        project.repeat_share = float("repetition" in name)
        result["pages"][name] = timed(name, call)


def plans() -> dict[str, str]:
    """The plans of the queries of the queue, of lists and of the export."""
    from django.db import connection
    from django.test import RequestFactory

    from openpalm.feedback.judgements import queue
    from openpalm.feedback.judgements.records import with_texts
    from openpalm.feedback.manage import items, responses
    from openpalm.feedback.models import Item, Project, Response, User

    project = Project.objects.get(slug=SLUG)
    item, last = Item.objects.order_by("pk").last(), Response.objects.order_by("pk").last()
    assert item
    assert last
    middle = {"item": item.pk // 2, "response": last.pk // 2}
    labeler, worn = User.objects.get(username="u3"), User.objects.get(username=f"u{USERS}")
    queries: dict[str, Any] = {
        "next item": queue.open_items(project, labeler)[: queue.FIRST],
        "next item, nothing left": queue.open_items(project, worn)[: queue.FIRST],
    }
    for page, filtered in (("items", items._filtered), ("responses", responses._filtered)):
        for text in FILTERS[page]:
            request: Any = RequestFactory().get(f"/?{text.format(**middle)}")
            request.project, before = project, request.GET.get("before")
            rows = filtered(request).filter(**{"pk__lt": before} if before else {})
            queries[f"{page}?{text}"] = rows.order_by("-pk")[:51]
    of_project = Response.objects.filter(project=project, pk__gt=middle["response"])
    queries["export, a chunk"] = with_texts(of_project).order_by("pk")[:500]
    options = {"analyze": True, "buffers": True} if connection.vendor == "postgresql" else {}
    return {name: query.explain(**options) for name, query in queries.items()}


# The export and the statistics.


class Seconds(NamedTuple):
    wall: int
    cpu: int
    """of the command, without the database's server"""


def run_measured(words: list[str], written: Path) -> tuple[Seconds, list[tuple[int, float]]]:
    """The time of a command, and (bytes that its files in `written` had, its peak memory in MB)."""
    started, before, seen = time.monotonic(), os.times(), []
    with subprocess.Popen([sys.executable, *words]) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            if peak := re.search(r"VmHWM:\s+(\d+)", status):
                size = sum(file.stat().st_size for file in written.iterdir())
                seen.append((size, int(peak[1]) / 1024))
            time.sleep(0.1)
    assert process.returncode == 0, words
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return Seconds(round(time.monotonic() - started), round(cpu)), seen


def time_export(folder: Path, result: dict[str, Any]) -> None:
    """By `openpalm feedback export`, in a process of its own."""
    out = folder / "exported" / "export.jsonl"
    out.parent.mkdir(exist_ok=True)
    words = ["-m", "openpalm", "feedback", "export", SLUG, "--format", "records"]
    words += ["--out", str(out), "--dir", os.environ["OPENPALM_FEEDBACK_DIR"]]
    seconds, seen = run_measured(words, out.parent)
    with out.open("rb") as file:
        rows = sum(1 for _ in file)
    size = out.stat().st_size
    result["export"] = {
        "rows": rows,
        **seconds._asdict(),
        "rows_per_cpu_s": round(rows / seconds.cpu),
        "megabytes": round(size / 2**20),
        "peak_rss_megabytes_at_a_tenth": round(max(m for s, m in seen if s <= size / 10)),
        "peak_rss_megabytes": round(max(m for _, m in seen)),
    }
    out.unlink()


EVERY = 5
FORMATS = """
import json, os, resource, sys
import django
django.setup()
from itertools import islice
from openpalm.data.rows.exports.stream import EXPORT_NAMES, export_lines
from openpalm.feedback.judgements.records import project_records
from openpalm.feedback.models import Project

def cpu():
    return sum(os.times()[:2])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

records = project_records(Project.objects.get(slug="{slug}"))
found = dict((name, dict(cpu_s=0.0, records=0, rows=0, bytes=0)) for name in EXPORT_NAMES)
total, peaks, started = 0, [], cpu()
while chunk := list(islice(records, 5000)):
    for number, (name, one) in enumerate(found.items()):
        if (total // 5000 + number) % {every}:
            continue
        before = cpu()
        one["records"] += len(chunk)
        for line in export_lines(chunk, name):
            one["rows"] += 1
            one["bytes"] += len(line)
        one["cpu_s"] += cpu() - before
    total += len(chunk)
    peaks.append(peak())
    print(total, peaks[-1], file=sys.stderr, flush=True)
formats = dict((n, one | dict(cpu_s=round(one["cpu_s"], 1))) for n, one in found.items())
reading = cpu() - started - sum(one["cpu_s"] for one in formats.values())
tenth = peaks[(len(peaks) - 1) // 10]
text = json.dumps(dict(
    records=total, reading_cpu_s=round(reading, 1), formats=formats,
    peak_rss_megabytes_at_a_tenth=tenth, peak_rss_megabytes=peaks[-1],
))
open("{out}", "w", encoding="utf-8").write(text)
"""


def time_formats(folder: Path, result: dict[str, Any]) -> None:
    """Every format of the export, from one pass over all records; each gets every fifth chunk."""
    out = folder / "formats.json"
    code = FORMATS.format(slug=SLUG, out=out, every=EVERY)
    subprocess.run([sys.executable, "-c", code], check=True)
    result["formats"] = json.loads(out.read_text(encoding="utf-8"))


STATISTICS = """
import os, sys, time
import django
django.setup()
from openpalm.feedback.models import Job, Project
from openpalm.feedback.quality.job import run
from openpalm.feedback.worker.progress import Progress
project = Project.objects.get(slug="{slug}")
for name in ("first", "again"):
    job = Job.objects.create(kind="statistics", project=project, state="running")
    before, started = sum(os.times()[:2]), time.monotonic()
    run(job, Progress(job))
    cpu = sum(os.times()[:2]) - before
    print(name, round(cpu, 1), "CPU s", round(time.monotonic() - started), "s", file=sys.stderr)
    job.delete()
"""


def time_statistics(folder: Path, result: dict[str, Any]) -> None:
    """What the worker does in a job of the kind `statistics`, and in the next one."""
    nothing = folder / "exported"
    nothing.mkdir(exist_ok=True)
    seconds, seen = run_measured(["-c", STATISTICS.format(slug=SLUG)], nothing)
    peak = max(m for _, m in seen)
    result["statistics"] = {**seconds._asdict(), "peak_rss_megabytes": round(peak)}


@contextmanager
def database(kind: str, folder: Path, url: str | None = None) -> Iterator[None]:
    os.environ["OPENPALM_FEEDBACK_DIR"] = str(folder / "site")
    os.environ["DJANGO_SETTINGS_MODULE"] = "openpalm.feedback.settings"
    os.environ["OPENPALM_FEEDBACK_HOSTS"] = "testserver"
    os.environ.pop("DATABASE_URL", None)
    if url or kind == "sqlite":
        os.environ |= {"DATABASE_URL": url} if url else {}
        yield
        return
    from postgresql import postgresql_server

    with postgresql_server() as server, server.database() as url:
        os.environ["DATABASE_URL"] = url
        try:
            yield
        finally:
            from django.db import connections

            connections.close_all()


def measure(folder: Path, items: int, responses: int, parts: str) -> dict[str, Any]:
    import django

    django.setup()
    logging.disable(logging.WARNING)  # pages that need something else than a GET
    from openpalm.feedback.manage_command import manage
    from openpalm.feedback.models import ModelVersion, Project

    manage(["migrate", "-v", "0"])
    if not Project.objects.filter(slug=SLUG).exists():
        fill(items, responses)
    if not ModelVersion.objects.exists():
        fill_rest(items, responses)
    result: dict[str, Any] = {"pages": {}, "skipped": [], "plans": plans()}
    if "pages" in parts:
        time_judging(result)
        time_pages(result)
    if "export" in parts:
        time_export(folder, result)
    if "formats" in parts:
        time_formats(folder, result)
    if "statistics" in parts:
        time_statistics(folder, result)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--responses", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="folder whose SQLite database is used again")
    parser.add_argument("--url", help="of a PostgreSQL database that is used again")
    parser.add_argument("--parts", default="pages,export,formats,statistics")
    parser.add_argument("--plans", type=Path, help="file for the plans; else they are printed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = options.keep or Path(made)
        with database(options.database, folder, options.url):
            result = measure(folder, options.items, options.responses, options.parts)
    plans = "\n".join(f"{name}\n{plan}\n" for name, plan in result.pop("plans").items())
    if options.plans:
        options.plans.write_text(plans, encoding="utf-8")
    else:
        print(plans, file=sys.stderr if options.json else sys.stdout)
    slow = [name for name, times in result["pages"].items() if times[0] > LIMIT_MS]
    if options.json:
        print(json.dumps(result))
        return 1 if slow else 0
    for name, times in sorted(result["pages"].items(), key=lambda one: -one[1][0]):
        print("".join(f"{ms:>10}" for ms in times), name)
    print(f"not pages: {', '.join(result['skipped'])}")
    for name in ("export", "formats", "statistics"):
        if name in result:
            print(f"{name}: {result[name]}")
    print(f"{len(slow)} over {LIMIT_MS:g} ms" if slow else f"none over {LIMIT_MS:g} ms")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
