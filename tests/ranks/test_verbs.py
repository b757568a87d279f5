"""Every training verb on two processes gives the numbers of one process, step by step."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openpalm.align.config import SftSettings
from openpalm.checkpoint import directory as checkpoint
from openpalm.cli import common
from openpalm.cli.main import main
from openpalm.errors import CheckpointError
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.world import join
from ranks import on_ranks

STEPS = 10
TRAINING = ("--steps", str(STEPS), "--optim.lr", "1e-3", "--dtype", "float32", "--seed", "1")
VERBS: dict[str, tuple[str, ...]] = {
    "sft": ("sft", "--data", "conversations.jsonl", "--sequence-length", "32"),
    "sft-lora": (
        *("sft", "--data", "conversations.jsonl", "--sequence-length", "32"),
        *("--lora.rank", "4"),
    ),
    "dpo": ("dpo", "--data", "pairs.jsonl", "--batch-tokens", "1024", "--sequence-length", "64"),
    "reward": ("reward", "--data", "pairs.jsonl", "--batch-tokens", "768"),
    "grpo": (
        *("grpo", "--data", "prompts.jsonl", "--reward", "reward.py:score"),
        *("--max-new-tokens", "6", "--prompts-per-rollout", "4", "--num-completions", "4"),
    ),
    "ppo": (
        *("ppo", "--data", "prompts.jsonl", "--reward", "reward.py:score"),
        *("--max-new-tokens", "6", "--prompts-per-rollout", "8"),
    ),
}
LAYOUTS = {"shard-2": {}, "replicate-2": {"shard": 1}, "tensor-2": {"tensor": 2}}


@pytest.fixture(scope="module")
def folder(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every kind, and a run to start from."""
    to = tmp_path_factory.mktemp("verbs")
    rows = {
        "conversations": [
            {"messages": [user(f"say {n}"), {"role": "assistant", "content": "e " * (1 + n % 5)}]}
            for n in range(40)
        ],
        "pairs": [
            {"prompt": f"say {n}", "chosen": "e e e", "rejected": "abcd"[: 1 + n % 4]}
            for n in range(40)
        ],
        "prompts": [{"prompt": f"say {n}"} for n in range(40)],
    }
    for name, given in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in given)
        (to / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (to / "reward.py").write_text(
        "def score(prompt, completion, row):\n    return sum(map(ord, completion)) % 5\n",
        encoding="utf-8",
    )
    (to / "run").symlink_to(work / "run")
    return to


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows(folder: Path, words: tuple[str, ...], out: str) -> list[dict[str, Any]]:
    """Runs the verb and returns the rows of its metrics."""
    named = [
        str(folder / word) if (folder / word.split(":")[0]).is_file() else word for word in words
    ]
    status = main([*named, "--init", str(folder / "run"), "--out", str(folder / out), *TRAINING])
    assert status == 0
    lines = (folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_two_processes_equals_one(folder: Path, verb: str, layout: str):
    if not (folder / f"{verb}-alone").exists():
        rows(folder, VERBS[verb], f"{verb}-alone")
    lines = (folder / f"{verb}-alone" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    alone = [json.loads(line) for line in lines]
    given = LAYOUTS[layout].items()
    options = tuple(f"--parallel.{name}={value}" for name, value in given)
    found = on_ranks(2, rows, folder, VERBS[verb] + options, f"{verb}-{layout}")[0]
    assert [row.keys() for row in found] == [row.keys() for row in alone]
    for row, expected in zip(found, alone, strict=True):
        for name in expected.keys() - {"elapsed_s", "mfu"}:
            if not name.endswith("per_s"):
                assert near(row[name], expected[name], name), (verb, row["step"], name)


def found_by(folder: Path) -> str:
    """Asks for foreign weights, which only one process may convert."""

    def convert(name: str) -> Path:
        if os.environ["RANK"] == "0":
            time.sleep(0.5)
            (folder / name).touch()
        assert (folder / name).exists()
        return folder / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "checkpoint_path", convert)
        join(ParallelSettings(), torch.device("cpu"))
        return common.weights_path("model").name


def test_one_process_converts_for_all(tmp_path: Path):
    assert on_ranks(2, found_by, tmp_path) == ["model"] * 2


def start_of(init: Path) -> str:
    """The checkpoint of a run that saves another one while this process looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "resolve", lambda run: run / f"step-{os.environ['RANK']}")
        join(ParallelSettings(), torch.device("cpu"))
        settings = SftSettings(data=init, out=init, init=str(init), steps=1)
        with pytest.raises(CheckpointError) as refused:  # it is not there
            common.fine_tuning_start(settings)
        return str(refused.value)


def test_all_processes_start_from_one_checkpoint(tmp_path: Path):
    said = on_ranks(2, start_of, tmp_path)
    assert said[0] == said[1]
    assert str(tmp_path / "step-0") in said[0]


def near(found: Any, expected: Any, name: str) -> bool:
    """Within the tolerances of a layout; numbers that are differences are near zero."""
    if not isinstance(expected, float):
        return found == expected
    rel = 2e-6 if name == "loss" else 1e-5
    return math.isclose(found, expected, rel_tol=rel, abs_tol=2e-6)


def test_a_batch_that_processes_would_change_is_refused(folder: Path):
    """Two processes with one sequence each would make two pairs of a step that has one."""
    words = ("dpo", "--data", str(folder / "pairs.jsonl"), "--batch-tokens", "128")
    words += ("--sequence-length", "64", "--init", str(folder / "run"))
    found = on_ranks(2, status_of, (*words, "--out", str(folder / "odd"), *TRAINING))
    assert [status for status, _ in found] == [2, 2]
    assert "a step of one process has 1 item, of 2 processes 2" in found[0][1]
    assert found[0][1].endswith("take a multiple of 256\n")
    assert not (folder / "odd").exists()


def status_of(words: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and the last error line of a command."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(list(words))
    return status, errors.getvalue().splitlines(keepends=True)[-1] if errors.getvalue() else ""
