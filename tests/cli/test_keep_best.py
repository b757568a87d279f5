"""`--keep-best` and `--keep-every` of every verb that fine-tunes."""

import json

import pytest
from command_line import rows, write_base

from openpalm.checkpoint import directory as checkpoint

REWARD = """
def letters(prompt, answer, row):
    return sum(c.islower() for c in answer) / 12
"""
KEEP = ("--keep-best", "--keep-every", 5, "--keep-checkpoints", 1, "--eval-every", 1, "--steps", 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("keep") / "base", context=64)


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "pay.py").write_text(REWARD, encoding="utf-8")
    return ("--reward", f"{tmp_path / 'pay.py'}:letters", "--max-new-tokens", 8)


def write(path, count, **row):
    lines = [json.dumps({k: v.format(i) for k, v in row.items()}) for i in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def check_kept(out, column, best_of):
    """The best evaluation of the run has a checkpoint, which the link names."""
    found = {r["step"]: r[column] for r in rows(out / "metrics.jsonl") if column in r}
    step = best_of(found, key=found.__getitem__)
    assert checkpoint.resolve(out / "checkpoints" / "best").name == checkpoint.step_name(step)
    kept = [path.name for path in checkpoint.steps(out)]
    assert kept == [checkpoint.step_name(n) for n in sorted({step, 5, 6})]


PAIRS = {"prompt": "Question {}?", "chosen": "Yes, {}.", "rejected": "No idea."}
FINE_TUNING = {
    "sft": {"prompt": "Question {}?", "completion": "Yes, {}."},
    "dpo": PAIRS,
    "reward": PAIRS,
}


@pytest.mark.parametrize("verb", FINE_TUNING)
def test_the_lowest_loss(said, base, tmp_path, verb):
    data = write(tmp_path / "data.jsonl", 40, **FINE_TUNING[verb])
    words = ("--init", base, "--data", data, "--out", tmp_path / "out", "--dtype", "float32")
    # A rate this high makes the loss rise again before the last step.
    status, _, errors = said(verb, *words, *KEEP, "--optim.lr", 0.3)
    assert status == 0, errors
    check_kept(tmp_path / "out", "val_loss", min)


@pytest.mark.parametrize("verb", ["grpo", "ppo"])
def test_the_highest_reward(said, base, reward, tmp_path, verb):
    data = write(tmp_path / "data.jsonl", 8, prompt="Q{}")
    words = ("--init", base, "--data", data, "--out", tmp_path / "out", "--dtype", "float32")
    status, _, errors = said(verb, *words, *reward, *KEEP, "--optim.lr", 0.1)
    assert status == 0, errors
    check_kept(tmp_path / "out", "val_reward", max)


def test_nothing_held_out(said, base, tmp_path):
    data = write(tmp_path / "data.jsonl", 4, **FINE_TUNING["sft"])
    words = ("--init", base, "--data", data, "--out", tmp_path / "out")
    status, _, errors = said("sft", *words, *KEEP)
    assert status == 2
    assert errors[-1].startswith("openpalm: error: --keep-best: no data is held out")
    assert not (tmp_path / "out").exists()
