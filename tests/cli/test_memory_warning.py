"""Every verb that trains warns before step 1 of a run that needs more memory than there is."""

import json
from pathlib import Path

import pytest
from command_line import write_base

from openpalm.errors import TrainingError

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
REWARD = "def reward(prompt, completion):\n    return 0.0\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint and data in a folder; training itself ends at once."""
    write_base(tmp_path / "base")
    for name, row in (("m", {"messages": MESSAGES}), ("p", PAIR), ("q", {"prompt": "a"})):
        text = f"{json.dumps(row)}\n" * 8
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "r.py").write_text(REWARD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run_training(settings: object, spec: object) -> None:
        raise TrainingError("step 1 is next")

    monkeypatch.setattr("openpalm.train.run.run_training", run_training)
    return tmp_path


ROLLOUTS = ("--data", "q.jsonl", "--reward", "r.py:reward", "--max-new-tokens", "4")
VERBS = {
    "sft": ("--data", "m.jsonl"),
    "dpo": ("--data", "p.jsonl"),
    "reward": ("--data", "p.jsonl"),
    "ppo": ROLLOUTS,
    "grpo": ROLLOUTS,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("memory", [1e6, 1e9])
def test_the_warning(said, folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str, memory: float):
    monkeypatch.setattr("openpalm.base.device.physical_memory", lambda: memory)
    words = ("--init", "base", "--out", "run", "--steps", "2", "--device", "cpu")
    status, _, errors = said(verb, *words, *VERBS[verb])
    assert status == 1
    assert errors[-1].endswith("step 1 is next")
    warned = " ".join(errors)
    if memory < 1e7:
        assert f"{verb}: warning: needs about" in warned
        assert "of the 0.000931 GiB of this machine" in warned
    else:
        assert "warning" not in warned


def test_a_reference_policy_counts(said, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With LoRA it is the policy without its adapter, and no second model."""
    needs = []
    for more in ((), ("--lora.rank", "2")):
        monkeypatch.setattr("openpalm.base.device.physical_memory", lambda: 1e5)
        words = ("--init", "base", "--out", "run", "--steps", "2", "--dtype", "float32")
        _, _, errors = said("grpo", *words, *ROLLOUTS, *more)
        said_of = " ".join(errors).split("needs about ")[1]
        needs.append(float(said_of.split()[0]))
    assert needs[1] < needs[0]
