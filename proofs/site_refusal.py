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
import json
from openpalm.feedback.items.new_items import add_prompts
from openpalm.feedback.models import Guideline, Project
project = Project.objects.create(
    slug={project!r}, name={project!r}, scale=7, decided_by="simulated"
)
Guideline.objects.create(project=project, version=1, text="Choose the better reply.")
asked = [([{{"role": "user", "content": q}}], "typed") for q in json.loads({questions!r})]
add_prompts(project, asked, held_out=True)
"""
"""makes the project before the server starts, which would otherwise make one with other prompts"""
COMPARE = """
from openpalm.feedback.models import ModelVersion
from openpalm.feedback.training import comparisons
model = ModelVersion.objects.get(pk={model})
sampling = {{"temperature": {temperature}, "max_tokens": {tokens}}}
made = comparisons.create(model.project, model, None, sampling=sampling)
print("COMPARISON " + str(made.pk))
"""
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


def train(admin: FeedbackClient, seed: int) -> int:
    """The id of the model that the site makes of its judgements."""
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
            "author_kinds": ["simulated"],
            "settings": settings | {"seed": seed},
        },
    )
    while (run := admin.call("GET", f"runs/{run['id']}"))["state"] in ("queued", "running"):
        time.sleep(POLL_S)
    made = admin.call("GET", f"models?project={PROJECT}")["data"]
    return next(model["id"] for model in made if model["run"] == run["id"])


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
    held_out = json.dumps(run.questions(held_out=True))
    manage(folder, "migrate", "--verbosity", "0")
    manage(folder, "shell", "-c", PREPARE.format(project=PROJECT, questions=held_out))
    with serving(run.folder / PARENT, folder) as url:
        token = manage(folder, "shell", "-c", ADMIN).split("TOKEN ")[1].split()[0]
        admin = FeedbackClient(url, token)
        for begin in range(0, len(records), 100):
            items = [
                {"messages": record["prompt"], "candidates": record["candidates"]}
                for record in records[begin : begin + 100]
            ]
            admin.call("POST", "items", {"project": PROJECT, "items": items})
        lines = manage(folder, "create_labelers", PROJECT, "--count", "3").splitlines()
        clients = [FeedbackClient(url, line.split("\t")[1]) for line in lines]
        judge_items(clients, [verdicts(records)] * len(clients), len(records))
        model = train(admin, run.seed)
        words = COMPARE.format(model=model, tokens=TOKENS, temperature=TEMPERATURE)
        made = manage(folder, "shell", "-c", words)
        comparison = int(made.split("COMPARISON ")[1].split()[0])
        tastes = [lambda shown, by=by: judge(by, shown) for by in labelers(run.seed)]
        judge_items(clients, tastes, JUDGED)
        return refusal(admin, model, comparison)


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
