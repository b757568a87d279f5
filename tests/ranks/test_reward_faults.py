"""A reward that fails on one process of several stops all of them; corrected, the run continues."""

import json
from pathlib import Path

from command_line import write_base
from rank_runs import LIMIT_S, command

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


def test_a_reward_that_fails_on_one_process_stops_all(tmp_path: Path):
    base = write_base(tmp_path / "base")
    prompts = "".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(8))
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    reward = tmp_path / "pay.py"
    reward.write_text(FAILS_ON_ONE, encoding="utf-8")
    words = ["grpo", f"--init={base}", f"--data={tmp_path / 'prompts.jsonl'}"]
    words += [f"--reward={reward}:letters", f"--out={tmp_path / 'run'}", "--max-new-tokens=4"]
    words += ["--steps=2", "--prompts-per-rollout=2", "--num-completions=2", "--dtype=float32"]
    found = on_ranks(2, command, words, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [1, 1]
    lines = [line for line in found[0][1].splitlines() if line.startswith("openpalm: error:")]
    assert len(lines) == 1
    assert "letters" in lines[0]
    assert "no letters here" in lines[0]
    reward.write_text(CORRECTED, encoding="utf-8")
    found = on_ranks(2, command, words, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [0, 0], found
    assert "the reward has changed since it failed; the run continues with it" in found[0][1]
