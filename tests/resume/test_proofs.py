"""The two long proofs under benchmarks/, short: kills by the system, and damage at random places.

Both run as programs, as a reader of their figures would.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def proof(name: str, *options: str) -> tuple[int, dict[str, Any]]:
    program = [sys.executable, str(ROOT / "benchmarks" / name), *options, "--json"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_three_kills_change_no_loss():
    status, found = proof("kill.py", "--kills=3", "--steps=24", "--save-every=4")
    assert status == 0, found
    assert found["kills"] >= 2
    assert sum(found["places"].values()) == found["kills"]
    assert found["rows"] == found["rows_after_kills"] == 24 + 2
    assert found["differing_losses"] == found["differing_rows"] == 0
    assert found["equal"]


@pytest.mark.parametrize("verb", ["grpo", "ppo"])
def test_kills_change_nothing_of_a_run_on_its_own_answers(verb: str):
    """In the middle of a rollout too: answers, critic and beta go on where they were."""
    # This seed kills soon after step 4, and a rollout takes four steps: the saves of steps 3, 6
    # and 9 are each in the middle of one.
    options = ["--kills=1", "--steps=18", "--save-every=3", "--seed=3"]
    status, found = proof("kill.py", f"--verb={verb}", *options)
    assert status == 0, found
    assert found["kills"] >= 1
    assert found["rows"] == found["rows_after_kills"] == 18 + 2
    assert found["equal"]


def test_no_damage_is_loaded_silently():
    status, found = proof("damage_checkpoints.py", "--damages=30", "--seed=7")
    assert status == 0, found
    assert found["refused"] == found["fell_back_and_said_so"] == 30
    assert found["silent_loads"] == found["other_errors"] == 0


def test_a_run_with_nothing_to_fall_back_on_is_no_proof(tmp_path: Path):
    program = [sys.executable, str(ROOT / "benchmarks" / "damage_checkpoints.py"), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has 0 checkpoints, two are needed" in done.stderr


@pytest.mark.parametrize("name", ["kill.py", "damage_checkpoints.py"])
def test_the_proofs_explain_themselves(name: str):
    program = [sys.executable, str(ROOT / "benchmarks" / name), "--help"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--seed" in done.stdout
