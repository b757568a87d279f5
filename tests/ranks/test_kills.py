"""Runs under torchrun: killed, terminated from outside, their checkpoints damaged."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from rank_runs import wait_for
from train_runs import rows, step_names
from train_samples import write_dataset

from openpalm.checkpoint import directory as checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def proof(name: str, *options: str) -> dict[str, Any]:
    program = [sys.executable, str(BENCHMARKS / name), "--processes=2", *options, "--json"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_processes_change_nothing():
    found = proof("kill.py", "--kills=2", "--steps=24", "--save-every=4", "--seed=5")
    assert sum(found["places"].values()) == found["kills"] >= 1
    assert found["rows"] == found["rows_after_kills"] == 24 + 2
    assert found["differing_losses"] == found["differing_rows"] == 0
    assert found["equal"]
    assert found["nothing_left_behind"]


def test_a_damaged_checkpoint_of_two_processes_is_never_loaded():
    found = proof("damage_checkpoints.py", "--damages=30", "--seed=7")
    assert found["refused"] == found["fell_back_and_said_so"] == 30


def test_sigterm_to_the_launcher_saves_the_same_step_on_all(tmp_path: Path):
    data, out = write_dataset(tmp_path / "plain"), tmp_path / "run"
    words = "--model palm-tiny --steps 500 --sequence-length 16 --batch-tokens 64 --dtype float32"
    words += f" --save-every 500 --eval-every 500 --data {data} --out {out}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "openpalm", "train", *words.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        metrics = out / "metrics.jsonl"
        wait_for(lambda: metrics.exists() or launcher.poll() is not None)
        launcher.send_signal(signal.SIGTERM)
        said = launcher.communicate()[1]
    last = rows(out)[-1]["step"]
    assert f"stopped after step {last}; run the same command again to continue" in said
    assert step_names(out) == [checkpoint.step_name(last)]
    assert last < 500
