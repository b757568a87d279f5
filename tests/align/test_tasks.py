"""A reward is learnt through the command line: proofs/even.py, made small; bounds are kept."""

import importlib.util
import json
import random
import string
from pathlib import Path

import pytest
from command_line import rows, write_base

from openpalm.align.config import rollout_rate

ROOT = Path(__file__).parents[2]
EVEN = ROOT / "examples/rewards.py"
STEPS = 40


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model that writes random letters, and questions to it."""
    from openpalm.cli.main import main

    folder = tmp_path_factory.mktemp("even")
    drawn = random.Random(0)
    texts = ("".join(drawn.choices(string.ascii_lowercase, k=40)) for _ in range(300))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    questions = ({"prompt": f"Write {i}."} for i in range(32))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    base, data, run = write_base(folder / "base"), folder / "data", folder / "run"
    prepared = ["data", "prepare", folder / "text.jsonl", "--out", data, "--tokenizer", "byte"]
    assert main([str(word) for word in prepared]) == 0
    trained = ["train", "--init", base, "--data", data, "--out", run, "--steps", 60]
    trained += ["--batch-tokens", 768, "--optim.lr", 0.01, "--dtype", "float32"]
    assert main([str(word) for word in trained]) == 0
    return folder


def learnt(said, writer, out, *words):
    """The mean reward of each step of a run."""
    status, _, errors = said(
        *("grpo", "--init", writer / "run", "--data", writer / "prompts.jsonl", "--out", out),
        *("--steps", STEPS, "--max-new-tokens", 12, "--kl-coef", 0, "--optim.lr", 0.01, *words),
    )
    assert status == 0, errors
    return [row["reward"] for row in rows(out / "metrics.jsonl") if "reward" in row]


def check_rises(rewards):
    assert abs(rewards[0]) < 0.65
    assert sum(rewards[-5:]) / 5 > 0.95


def test_even_tokens_are_learnt(said, writer, tmp_path):
    check_rises(learnt(said, writer, tmp_path / "out", "--reward", f"{EVEN}:even_bytes"))


def test_and_not_where_the_reward_says_the_opposite(said, writer, tmp_path):
    rewards = learnt(said, writer, tmp_path / "out", "--reward", f"-1*{EVEN}:even_bytes")
    with pytest.raises(AssertionError):
        check_rises([-reward for reward in rewards])
    assert sum(rewards[-5:]) / 5 > -0.05


def tasks():
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "proofs/tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("figure", "misses"),
    [(0.55, 0), (0.54, 1), (float("nan"), 1)],
)
def test_a_figure_below_its_least_misses(figure, misses):
    assert len(tasks().missed({"after": figure}, {"after": 0.55})) == misses


@pytest.mark.parametrize(("figure", "misses"), [(4.0, 0), (-1.0, 0), (4.1, 1), (float("nan"), 1)])
def test_a_figure_above_its_greatest_misses(figure, misses):
    assert len(tasks().missed({"kl": figure}, {"-kl": -4.0})) == misses


@pytest.mark.parametrize(("fine_tuning", "published"), [(2e-4, 1.41e-5), (1e-4, 3e-6)])
def test_rates_are_near_the_published_ones(fine_tuning, published):
    """GPT-2 of 124M (the sentiment example of TRL) and Pythia 1B (Huang et al. 2024)."""
    assert rollout_rate(fine_tuning) == pytest.approx(published, rel=0.15)
