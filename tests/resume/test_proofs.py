"""The two long proofs under benchmarks/, short: kills by the system, and damage at random places.

Both run as programs, as a reader of their figures would.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
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


def test_kills_change_nothing_of_a_run_on_its_own_answers():
    """In the middle of a rollout too: answers, critic and beta go on where they were."""
    # This seed kills soon after step 4, and a rollout takes four steps: the saves of steps 3, 6
    # and 9 are each in the middle of one. PPO saves all that GRPO saves, and a critic.
    options = ["--verb=ppo", "--kills=1", "--steps=18", "--save-every=3", "--seed=3"]
    status, found = proof("kill.py", *options)
    assert status == 0, found
    assert found["kills"] >= 1
    assert found["rows"] == found["rows_after_kills"] == 18 + 2
    assert found["equal"]


def test_no_damage_is_loaded_silently():
    status, found = proof("damage_checkpoints.py", "--damages=30", "--seed=7")
    assert status == 0, found
    assert found["refused"] == found["fell_back_and_said_so"] == 30
    assert found["silent_loads"] == found["other_errors"] == 0


def main_of(name: str) -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "benchmarks" / name))["main"]


def test_a_run_with_nothing_to_fall_back_on_is_no_proof(tmp_path: Path, capsys):
    assert main_of("damage_checkpoints.py")([str(tmp_path)]) == 2
    assert "has 0 checkpoints, two are needed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kill.py", "damage_checkpoints.py"])
def test_the_proofs_explain_themselves(name: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(name)(["--help"])
    assert ended.value.code == 0
    assert "--seed" in capsys.readouterr().out
