"""Stands in for `python -m openpalm` where a test is about the process, not about the training.

A training takes steps, one line of metrics each, saves each, and continues where it was. Its
behaviour is in the environment: FAKE_STEPS, FAKE_STEP_S, FAKE_FAIL (a last line of the log).
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def train() -> None:
    out, steps = Path(option("--out")), int(os.environ.get("FAKE_STEPS", "3"))
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if reason := os.environ.get("FAKE_FAIL"):
        print("some progress", file=sys.stderr)
        sys.exit(f"openpalm: error: {reason}")
    (out / "run.json").write_text(json.dumps({"steps": steps}))
    with (out / "starts").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    saved = out / "saved"
    step = int(saved.read_text()) if saved.exists() else 0
    while step < steps and not ended:
        time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
        step += 1
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step, "pairs_per_s": 2.0}) + "\n")
        saved.with_suffix(".new").write_text(str(step))
        saved.with_suffix(".new").replace(saved)
    if ended:
        sys.exit(128 + ended[0])
    checkpoint = out / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    content = Path(option("--data")).read_bytes() + option("--seed").encode()
    digest = hashlib.sha256(content + sys.argv[1].encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": digest}))
    print(checkpoint)


def score() -> None:
    """The reward is the length of the completion; one that says "long" is too long."""
    lines = Path(option("--data")).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["reward"] = None if row["completion"] == "long" else float(len(row["completion"]))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(option("--out")).write_text(text, encoding="utf-8")


score() if sys.argv[1] == "score" else train()
