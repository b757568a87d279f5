"""The site's own refusal: it trains on shuffled verdicts, compares and refuses the promotion.

    python proofs/site_refusal.py runs/prove/feedback_loop/seed-0

Reads what proofs/feedback_loop.py left there: the parent and the records with shuffled verdicts.
`openpalm serve PARENT --feedback` runs the model server, the site and its worker. Labelers submit
the verdicts over the REST API, `POST /runs` trains, labelers of known taste judge the comparison
that the worker prepares, and `POST /models/ID/promote` is answered with a refusal.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from feedback_loop import CONTROL, DPO, JUDGED, PAIRS, TEMPERATURE, TOKENS, Seed
from simulated_judging import ADMIN, END_S, labelers, manage

from openpalm.errors import WorkError
from openpalm.feedback.simulation.client import FeedbackClient
from openpalm.feedback.simulation.session import judge

PROJECT, PARENT = "control", "parent"
POLL_S = 1.0
ADDRESSES = re.compile(r"http://[\d.]+:\d+")
PREPARE = """
from openpalm.feedback.models import Guideline, Project
project = Project.objects.create(
    slug={project!r}, name={project!r}, scale=7, decided_by="simulated"
)
Guideline.objects.create(project=project, version=1, text="Choose the better reply.")
"""
"""makes the project before the server starts, which would otherwise make one with other prompts"""
Judge = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def serving(parent: Path, folder: Path) -> Iterator[str]:
    """The model server, the site and its worker; gives the site's address."""
    words = ["-m", "openpalm", "serve", str(parent), "--name", PARENT, "--port", "0"]
    words += ["--dtype", "float32", "--max-queue", "1024"]
    words += ["--feedback", "--feedback-port", "0", "--feedback-dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "500"},
    )
    assert process.stdout is not None
    try:
        yield ADDRESSES.findall(process.stdout.readline())[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=END_S)


def in_parts(rows: list[Any]) -> Iterator[list[Any]]:
    """What fits into one request each."""
    for begin in range(0, len(rows), 100):
        yield rows[begin : begin + 100]


def verdicts(records: list[dict[str, Any]]) -> Judge:
    """A judge that gives the verdicts of these records."""
    given = {record["prompt"][0]["content"]: record for record in records}

    def answer(assignment: dict[str, Any]) -> dict[str, Any]:
        record = given[assignment["messages"][-1]["content"]]
        payload = record["payload"]
        shown = assignment["candidates"][0]["text"]
        if "better" in payload and shown != record["candidates"][0]["text"]:
            return payload | {"better": payload["worse"], "worse": payload["better"]}
        return payload

    return answer


def judge_items(clients: list[FeedbackClient], judges: list[Judge], count: int) -> None:
    """Each labeler in turn, until `count` judgements are made."""
    made = 0
    for client, answer in cycle(zip(clients, judges, strict=True)):
        if made == count:
            return
        if (assignment := client.next(PROJECT)) is None:
            time.sleep(POLL_S)
            continue
        client.submit(assignment["id"], answer(assignment))
        made += 1


def train(admin: FeedbackClient, seed: int) -> dict[str, Any]:
    """The model that the site makes of its judgements."""
    words = (*PAIRS, *DPO)
    settings = {
        str(name).removeprefix("--").replace("-", "_"): value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
    run = admin.call(
        "POST",
        "runs",
        {
            "project": PROJECT,
            "verb": "dpo",
            "parent": PARENT,
            "settings": settings | {"seed": seed},
        },
    )
    while (run := admin.call("GET", f"runs/{run['id']}"))["state"] in ("queued", "running"):
        time.sleep(POLL_S)
    made = admin.call("GET", f"models?project={PROJECT}")["data"]
    return next(model for model in made if model["run"] == run["id"])


def compare(admin: FeedbackClient, model: dict[str, Any]) -> int:
    """The id of the comparison of this model with its parent."""
    sampling = {"temperature": TEMPERATURE, "max_tokens": TOKENS}
    asked = {"project": PROJECT, "model": model["name"], "sampling": sampling}
    return admin.call("POST", "comparisons", asked)["id"]


def refusal(admin: FeedbackClient, model: int, comparison: int) -> str:
    """The site's answer to the wish to promote, once the comparison is decided."""
    while True:
        try:
            admin.call("POST", f"models/{model}/promote", {"comparison": comparison})
        except WorkError as error:
            if "not decided" not in f"{error}":
                return f"{error}"
            time.sleep(POLL_S)
        else:
            return ""


def ask(run: Seed, folder: Path) -> str:
    """Why the site does not promote the control; empty if it does."""
    text = (run.folder / f"{CONTROL}.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    manage(folder, "migrate", "--verbosity", "0")
    manage(folder, "shell", "-c", PREPARE.format(project=PROJECT))
    with serving(run.folder / PARENT, folder) as url:
        token = manage(folder, "shell", "-c", ADMIN).split("TOKEN ")[1].split()[0]
        admin = FeedbackClient(url, token)
        held_out = [{"prompt": q, "held_out": True} for q in run.questions(held_out=True)]
        for part in in_parts(held_out):
            admin.call("POST", "prompts", {"project": PROJECT, "prompts": part})
        items = [{"messages": r["prompt"], "candidates": r["candidates"]} for r in records]
        for part in in_parts(items):
            admin.call("POST", "items", {"project": PROJECT, "items": part})
        lines = manage(folder, "create_labelers", PROJECT, "--count", "3").splitlines()
        clients = [FeedbackClient(url, line.split("\t")[1]) for line in lines]
        judge_items(clients, [verdicts(records)] * len(clients), len(records))
        model = train(admin, run.seed)
        comparison = compare(admin, model)
        tastes = [lambda shown, by=by: judge(by, shown) for by in labelers(run.seed)]
        judge_items(clients, tastes, JUDGED)
        return refusal(admin, model["id"], comparison)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a seed's folder, named seed-N")
    asked = parser.parse_args()
    run = Seed(asked.folder, int(asked.folder.name.rpartition("-")[2]))
    folder = run.folder / "refusal"
    shutil.rmtree(folder, ignore_errors=True)
    answer = ask(run, folder)
    print(answer or "site_refusal: the control is promoted")
    return 0 if "refused" in answer else 1


if __name__ == "__main__":
    sys.exit(main())
