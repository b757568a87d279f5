"""A rollout that fails on one process of several stops all of them: by its reward, which may be
corrected, or while it is evaluated, when the others wait for the tensors of that process."""

import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from command_line import write_base
from rank_runs import LIMIT_S, command, rank

from openpalm.align.rollouts.rollout import RolloutLoader
from ranks import on_ranks

FAILS_ON_ONE = """
import os

def letters(prompt, answer, row):
    if os.environ.get("RANK") == "1":
        raise ValueError("no letters here")
    return sum(c.islower() for c in answer)
"""
CORRECTED = """
def letters(prompt, answer, row):
    return sum(c.islower() for c in answer)
"""


def words(folder: Path) -> list[str]:
    base = write_base(folder / "base")
    prompts = "".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(8))
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    given = ["grpo", f"--init={base}", f"--data={folder / 'prompts.jsonl'}"]
    given += [f"--reward={folder / 'pay.py'}:letters", f"--out={folder / 'run'}"]
    given += ["--max-new-tokens=4", "--parallel.timeout-s=30"]
    return [*given, "--steps=2", "--prompts-per-rollout=2", "--num-completions=2"]


def test_a_reward_that_fails_on_one_process_stops_all(tmp_path: Path):
    given, reward = words(tmp_path), tmp_path / "pay.py"
    reward.write_text(FAILS_ON_ONE, encoding="utf-8")
    found = on_ranks(2, command, given, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [1, 1]
    lines = [line for line in found[0][1].splitlines() if line.startswith("openpalm: error:")]
    assert len(lines) == 1
    assert "letters" in lines[0]
    assert "no letters here" in lines[0]
    reward.write_text(CORRECTED, encoding="utf-8")
    found = on_ranks(2, command, given, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [0, 0], found
    assert "the reward has changed since it failed; the run continues with it" in found[0][1]


def no_memory(*_: object) -> NoReturn:
    raise torch.OutOfMemoryError("no memory is left")


def no_memory_on_one(patch: pytest.MonkeyPatch) -> None:
    if rank() == 1:
        patch.setattr(RolloutLoader, "_evaluate", no_memory)


def test_a_rollout_that_fails_between_two_exchanges_is_named_at_once(tmp_path: Path):
    given = words(tmp_path)
    (tmp_path / "pay.py").write_text(CORRECTED, encoding="utf-8")
    found = on_ranks(2, command, given, no_memory_on_one, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [1, 1]
    line = found[0][1].splitlines()[-1]
    assert "step 1: process 1 failed: OutOfMemoryError: no memory is left" in line
