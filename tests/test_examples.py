"""The example scripts: they run, and their numbers are those of the program."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import openpalm

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS = 3


def test_training_from_python_is_openpalm_train(tmp_path):
    text = " ".join(f"the word after {i} is {i + 1}." for i in range(1000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    program = [sys.executable, "-m", "openpalm"]
    subprocess.run(
        [*program, "data", "prepare", "text.txt", "--out=data", "--tokenizer=byte"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    script = [EXAMPLES / "train_from_python.py", "data", "mine", f"--steps={STEPS}"]
    done = subprocess.run(
        [sys.executable, *map(str, script)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = openpalm.train(
        model="palm-tiny",
        data=tmp_path / "data",
        out=tmp_path / "run",
        steps=STEPS,
        sequence_length=128,
        batch_tokens=16 * 128,
        dtype="float32",
        device="cpu",
    )
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    expected = [row["loss"] for row in rows if "loss" in row]
    found = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(found) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
    mine, theirs = openpalm.load(tmp_path / "mine"), openpalm.load(run)
    assert mine.config == theirs.config
    for name, weights in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], weights, rtol=1e-4, atol=1e-6)


def test_the_sbatch_file_saves_and_requeues():
    """The shell's grammar and the order of its times; docs/parallel.md has a run of it."""
    file = EXAMPLES / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(file)], check=True)
    text = file.read_text(encoding="utf-8")
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert "requeue" in directives
    assert directives["open-mode"] == "append"
    before_limit = int(directives["signal"].removeprefix("B:TERM@"))
    found = re.search(r"^grace=(\d+)$", text, re.MULTILINE)
    assert found is not None
    assert int(found[1]) + 30 < before_limit  # torchrun kills 30 seconds after the grace time
