"""The whole loop with real models: `openpalm serve --feedback`, judgements, training, promotion."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_line import write_base
from feedback_site import OURS

HELPERS = Path(__file__).parents[1] / "helpers"


@dataclass
class Loop:
    """The command with its three processes."""

    process: subprocess.Popen[str]
    folder: Path
    chat: str
    site: str
    environment: dict[str, str] = field(default_factory=dict)

    def do(self, step: str) -> Any:
        """A step of helpers/loop_driver.py, in a process of its own."""
        done = subprocess.run(
            [sys.executable, str(HELPERS / "loop_driver.py"), step],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def child(self, *words: str) -> int:
        """The number of the command's own child with these words in its command line."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                line = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if parent == self.process.pid and set(words) <= set(line):
                return int(entry.name)
        raise AssertionError(f"no child with {words}")

    def ask(self, text: str = "p 1", *, store: bool = False) -> str:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{self.chat}/v1/chat/completions",
            json.dumps(body | {"store": store}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]


@pytest.fixture
def loop(tmp_path) -> Iterator[Loop]:
    base = write_base(tmp_path / "base", clear=True)
    clean = {name: text for name, text in os.environ.items() if not name.startswith(OURS)}
    words = ["--feedback", "--feedback-dir", tmp_path / "site", "--port", 0, "--feedback-port", 0]
    words += ["--name", "tiny"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "openpalm", "serve", str(base), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=clean,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        urls = re.findall(r"http://127\.0\.0\.1:\d+", line)
        assert line.startswith("tiny: chat page at "), (tmp_path / "errors").read_text()
        more = {
            "OPENPALM_FEEDBACK_DIR": str(tmp_path / "site"),
            "DJANGO_SETTINGS_MODULE": "openpalm.feedback.settings",
            "OPENPALM_SERVER_URL": urls[0],
            "OPENPALM_ADMIN_KEY": "known to the site's own processes only",
        }
        yield Loop(process, tmp_path / "site", urls[0], urls[1], clean | more)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=300)
        process.stdout.close()


def _steps(directory: str) -> list[int]:
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if "loss" in row]


def test_judgements_become_a_served_model(loop):
    prepared = loop.do("prepare")
    assert prepared["state"] == "done", prepared
    assert 30 <= prepared["judged"] <= 40
    loop.do("train")
    # The worker is killed in the middle of a training, and so is the training itself.
    while not (now := loop.do("running"))["process"] or not now["step"]:
        assert now["state"] in ("queued", "running"), loop.do("trained")
        time.sleep(0.2)
    os.kill(loop.child("feedback", "worker"), signal.SIGKILL)
    os.kill(now["process"]["pid"], signal.SIGKILL)
    trained = loop.do("trained")
    for verb, steps in (("reward", 40), ("dpo", 400), ("ppo", 4)):
        state, error, directory, planned = trained["runs"][verb]
        assert (state, error, planned) == ("finished", "", steps), trained
        assert _steps(directory) == list(range(1, steps + 1))
    assert trained["score"][0] == "done", trained["score"]
    assert trained["score"][2]["scored"] >= 80
    assert len(trained["models"]) == 4
    compared = loop.do("compare")
    assert compared["job"][0] == "done", compared
    assert (compared["state"], compared["judged"]) == ("decided", 200)
    result = compared["result"]
    assert result["author_kind"] == "simulated"
    assert result["decision"] == "promote", result["reason"]

    before, failures = loop.ask(), []
    ending = threading.Event()

    def keep_asking() -> None:
        while not ending.is_set():
            try:
                loop.ask()
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    promoted = loop.do("promote")
    ending.set()
    for thread in threads:
        thread.join()
    assert promoted["job"][0] == "done", promoted
    assert failures == []
    after = loop.ask()
    assert after != before
    # With consent, a conversation becomes a prompt, and its answer a candidate of that model.
    loop.ask("shared 1", store=True)
    while not (shared := loop.do("shared")):
        time.sleep(0.2)
    assert shared == [["shared 1", promoted["served"]]]
    # The model server crashes: it comes back with the model that was promoted.
    os.kill(loop.child("serve"), signal.SIGKILL)
    while True:
        try:
            assert loop.ask() == after
            break
        except OSError:
            time.sleep(0.2)
    assert loop.do("undo")["job"][0] == "done"
    assert loop.ask() == before
