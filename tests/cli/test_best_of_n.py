"""`openpalm best-of-n`: the best completions, continued after a kill; errors in one line."""

import json

import pytest
from command_line import rows, write_base

from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.rows.readers.pairs import read_pairs

REWARD = """
def vowels(prompt, answer, row):
    return sum(letter in "aeiou" for letter in answer) + row["bonus"]

def nan(prompt, answer, row):
    return float("nan") if row["bonus"] == 4 else 1.0

def fails(prompt, answer, row):
    return 1 / 0
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("best") / "base", context=64)


@pytest.fixture
def given(tmp_path):
    (tmp_path / "r.py").write_text(REWARD)
    lines = [json.dumps({"prompt": f"Question {i}?", "bonus": i}) for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(said, base, given, *words, reward="vowels"):
    return said(
        *("best-of-n", base, "--data", given / "p.jsonl", "--out", given / "b.jsonl"),
        *("--reward", f"{given / 'r.py'}:{reward}", "--n", 5, "--max-new-tokens", 24, *words),
    )


def test_the_best_is_kept(said, base, given):
    status, output, errors = run(said, base, given, "--json", "--pairs", given / "pairs.jsonl")
    assert (status, errors) == (0, [])
    told, found = json.loads(output), rows(given / "b.jsonl")
    assert len(found) == told["prompts"] == 6
    for i, row in enumerate(found):
        assert row["prompt"] == [{"role": "user", "content": f"Question {i}?"}]
        vowels = [sum(c in "aeiou" for c in row[name]) + i for name in ("completion", "worst")]
        assert vowels == [max(row["rewards"]), min(row["rewards"])]
        assert len(row["rewards"]) == 5
    assert told["reward"] == pytest.approx(sum(sum(r["rewards"]) for r in found) / 30)
    assert told["reward_best"] == pytest.approx(sum(max(r["rewards"]) for r in found) / 6)
    assert told["reward_best"] > told["reward"]
    shown = read_demonstrations(given / "b.jsonl").items
    kept = [row["completion"] for row in found if row["completion"].strip()]
    assert [messages[-1].content for messages in shown] == kept
    pairs = read_pairs(given / "pairs.jsonl").items
    assert len(pairs) == told["pairs"] > 0
    assert all(pair.margin > 0 for pair in pairs)


def test_a_torn_file_is_gone_on_with(said, base, given):
    assert run(said, base, given)[0] == 0
    out = given / "b.jsonl"
    whole = out.read_bytes()
    for size in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:size])
        status, output, _ = run(said, base, given)
        assert status == 0
        assert out.read_bytes() == whole
        assert "6 prompts" in output


def test_a_failing_reward_loses_nothing(said, base, given):
    status, _, errors = run(said, base, given, "--n", 32, reward="nan")
    assert status == 1
    assert len(errors) == 1
    assert "returned nan, which is no finite number" in errors[0]
    assert len(rows(given / "b.jsonl")) == 4
    status, _, errors = run(said, base, given, reward="fails")
    assert (status, len(errors)) == (2, 1)
    assert "has rows of another model, data, reward or settings" in errors[0]
    (given / "b.jsonl").unlink()
    status, _, errors = run(said, base, given, reward="fails")
    assert (status, len(errors)) == (1, 1)
    assert "raised ZeroDivisionError" in errors[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--n", 0], "--n 0: must be 1 to 4096"),
        (["--max-new-tokens", 0], "--max-new-tokens 0"),
        (["--max-new-tokens", 60], "longer than 4 tokens, which --max-new-tokens leaves of 64"),
        (["--temperature", 0], "--temperature 0"),
        (["--reward", "nothing"], "--reward nothing: no such run"),
        (["--out", "b.txt"], "--out b.txt: must be a .jsonl"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--pairs", "p.jsonl", "--data", "p.jsonl"], "must be another file"),
    ],
)
def test_a_wrong_request_is_one_line(said, base, given, words, says, monkeypatch):
    monkeypatch.chdir(given)
    status, _, errors = run(said, base, given, *words)
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
