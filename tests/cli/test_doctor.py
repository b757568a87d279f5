"""`openpalm doctor`: a table of checks, or one error line and status 1."""

import json
from pathlib import Path

import pytest
from command_line import rows, write_base

from openpalm.cli.doctor import DoctorSettings, planned_run
from openpalm.train.config import LoraSettings

REWARD = """
def vowels(prompt, answer, row):
    return sum(letter in "aeiou" for letter in answer)

def shorter(prompt, answer, row):
    return -len(answer)

def same(prompt, answer, row):
    return 1.0

def nan(prompt, answer, row):
    return float("nan")

def fails(prompt, answer, row):
    return 1 / 0
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("doctor") / "base", context=96)


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, make):
        lines = [json.dumps(make(i)) + "\n" for i in range(6)]
        (tmp_path / name).write_text("".join(lines))

    write("prompts.jsonl", lambda i: {"prompt": f"Question {i}?"})
    pair = {"chosen": "A long and winding answer.", "rejected": "No."}
    write("pairs.jsonl", lambda i: {"prompt": f"Question {i}?", **pair})
    write("shown.jsonl", lambda i: {"prompt": f"Question {i}?", "completion": "Yes."})
    turns = [("user", "Who?"), ("assistant", "I."), ("user", "Why?"), ("assistant", "So.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    write("talk.jsonl", lambda i: {"messages": messages})
    texts = {
        "chosen": "\n\nHuman: a?\n\nAssistant: yes",
        "rejected": "\n\nHuman: a?\n\nAssistant: no",
    }
    write("hh.jsonl", lambda i: texts)
    (tmp_path / "r.py").write_text(REWARD)
    return tmp_path


def doctor(said, base, data, *words):
    return said("doctor", "--init", base, "--data", data, "--device", "cpu", *words)


@pytest.mark.parametrize("data", ["prompts", "pairs", "shown", "talk", "hh"])
def test_all_is_well(said, base, given, data):
    status, output, errors = doctor(said, base, f"{data}.jsonl", "--json")
    assert (status, errors) == (0, [])
    checks = json.loads(output)
    assert all(check["ok"] for check in checks)
    assert len(checks) == (12 if data in ("pairs", "hh") else 10)
    assert not (given / "doctor").exists()


def test_rewards_and_an_adapter(said, base, given):
    words = ("--reward", "r.py:vowels", "--lora.rank", 4)
    status, output, errors = doctor(said, base, "pairs.jsonl", *words)
    assert (status, errors) == (0, [])
    assert output.count(" ok ") == 18
    assert "chosen and rejected are not swapped" in output


@pytest.mark.parametrize("rank", [0, 4])
def test_its_step_is_the_runs(said, base, given, rank):
    """The doctor's step has the default learning rate of RL runs."""
    planned = planned_run(DoctorSettings(str(base), Path("prompts.jsonl"), lora=LoraSettings(rank)))
    words = ["--reward", "r.py:vowels", "--steps", 1, "--lora.rank", rank, "--out", given / "out"]
    words += ["--optim.warmup", 0, "--optim.final-lr", 1, "--max-new-tokens", 8]
    status, _, errors = said("grpo", "--init", base, "--data", "prompts.jsonl", *words)
    assert status == 0, errors
    [rate] = {group["lr"] for group in planned.optimizer.parts[0].param_groups}
    assert rate == pytest.approx(rows(given / "out" / "metrics.jsonl")[0]["lr"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["pairs.jsonl", "--reward", "r.py:shorter"],
            "not swapped: failed: of ",
        ),
        (["prompts.jsonl", "--reward", "r.py:same"], "rewards vary: failed: 6 of 6 prompts"),
        (["prompts.jsonl", "--reward", "r.py:nan"], "returned nan, which is no finite number"),
        (["prompts.jsonl", "--reward", "r.py:fails"], "raised ZeroDivisionError"),
        (
            ["prompts.jsonl", "--max-new-tokens", 1, "--seed", 3],
            "model ends its completions: failed",
        ),
    ],
)
def test_a_failure_is_named_with_its_remedy(said, base, given, words, says):
    status, output, errors = doctor(said, base, *words)
    assert (status, len(errors)) == (1, 1)
    assert says in errors[0]
    assert output.count("failed") == ("failed" in says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.jsonl"], "none.jsonl"),
        (["r.py"], ".jsonl or .jsonl.gz"),
        (["prompts.jsonl", "--reward", "nothing"], "--reward nothing: no such run"),
        (["prompts.jsonl", "--num-completions", 1], "--num-completions 1"),
        (["prompts.jsonl", "--lora.rank", 10_000], "rank"),
        (
            ["prompts.jsonl", "--max-new-tokens", 96],
            "longer than 0 tokens, which --max-new-tokens leaves of 96",
        ),
        (["prompts.jsonl", "--init", "nowhere"], "nowhere: no such checkpoint"),
    ],
)
def test_a_wrong_request_is_one_line(said, base, given, words, says):
    status, output, errors = doctor(said, base, *words)
    assert (status, output, len(errors)) == (2, "", 1)
    assert says in errors[0]
