"""`openpalm judge`: preference records, continued after a stop; errors in one line."""

import json

import pytest
from command_line import rows, write_base
from judge_server import fails, judging, says

from openpalm.align.judging import model_judge
from openpalm.data.rows.preferences import Preference
from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.rows.readers.pairs import read_pairs, read_ties


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("judge") / "base", context=640)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def given(tmp_path):
    """Completions; the one with more stars is better."""
    write(
        tmp_path / "a.jsonl",
        *({"prompt": f"Question {i}?", "responses": ["*", "***", "**"]} for i in range(3)),
    )
    write(tmp_path / "p.jsonl", *({"prompt": f"Question {i}?"} for i in range(4)))
    (tmp_path / "c.yaml").write_text("principles:\n  - More stars.\n  - {text: Many., weight: 2}\n")
    return tmp_path


def stars(text, _):
    """Prefers stars, by their number."""
    a, b = (text.split(f"Answer {x}:\n")[1].split("\n")[0].count("*") for x in "AB")
    return says("A" if a > b else "B")


def over_http(said, given, seen, *words):
    return said(
        *("judge", "--data", given / "a.jsonl", "--constitution", given / "c.yaml"),
        *("--out", given / "j.jsonl", "--endpoint", seen.url, "--judge-model", "stars", *words),
    )


def with_ours(said, base, given, *words):
    return said(
        *("judge", "--data", given / "p.jsonl", "--model", base, "--constitution"),
        *(given / "c.yaml", "--out", given / "j.jsonl", "--judge", base),
        *("--max-new-tokens", 12, "--json", *words),
    )


def test_records_are_as_a_persons(said, base, given, monkeypatch):
    monkeypatch.setenv("OPENPALM_JUDGE_KEY", "secret")
    with judging(stars) as seen:
        status, output, errors = over_http(said, given, seen)
    assert (status, errors) == (0, [])
    assert "9 compared, 0 of them ties" in output
    assert len(seen.requests) == 3 * 3 * 2 * 2  # prompts, pairs, principles, orders
    assert {headers["authorization"] for headers in seen.headers} == {"Bearer secret"}
    text = (given / "j.jsonl").read_text()
    assert "secret" not in text
    records = [Preference.from_json(row, "j") for row in rows(given / "j.jsonl")]
    assert {(r.author, r.author_kind, r.kind) for r in records} == {("stars", "model", "compare")}
    [version] = {record.guideline_version for record in records}
    assert version.startswith("constitution-")
    pairs = read_pairs(given / "j.jsonl").items
    assert len(pairs) == 9
    assert all(len(p.chosen[0].content) > len(p.rejected[0].content) for p in pairs)
    assert {pair.margin for pair in pairs} == {3.0}
    for verb in ("dpo", "reward"):
        words = ("--init", base, "--data", given / "j.jsonl", "--out", given / verb, "--steps", 1)
        assert said(verb, *words, "--batch-tokens", 1280, "--dtype", "float32")[0] == 0


def test_orders_that_disagree_are_a_tie(said, given):
    with judging(lambda *_: says("A")) as seen:
        status, output, _ = over_http(said, given, seen, "--json")
    told = json.loads(output)
    assert (status, told["ties"], told["first_place"]) == (0, 9, 1.0)
    assert len(read_ties(given / "j.jsonl")) == 9
    assert read_pairs(given / "j.jsonl").items == []


def test_what_is_judged_is_not_judged_again(said, given):
    with judging(lambda text, n: fails(401, "no credit") if n == 14 else stars(text, n)) as seen:
        status, _, errors = over_http(said, given, seen, "--parallel", 1)
        assert (status, len(errors)) == (1, 1)
        assert "no credit" in errors[0]
        before = (given / "j.jsonl").read_bytes()
        assert len(before.splitlines()) == 3
        with (given / "j.jsonl").open("ab") as file:
            file.write(b'{"id": "judged-tor')
        status, output, _ = over_http(said, given, seen, "--json")
        assert status == 0
        asked = len(seen.requests)
        assert 15 + 6 * 4 <= asked <= 16 + 6 * 4  # one may have been on its way
        assert (json.loads(output)["written"], json.loads(output)["known"]) == (6, 3)
        assert (given / "j.jsonl").read_bytes().startswith(before)
        status, output, _ = over_http(said, given, seen, "--json")
        assert (json.loads(output)["written"], json.loads(output)["known"]) == (0, 9)
        assert len(seen.requests) == asked
        (given / "c.yaml").write_text("principles: [Fewer stars.]")
        status, output, _ = over_http(said, given, seen, "--json")
        assert json.loads(output)["written"] == 9
    assert len(rows(given / "j.jsonl")) == 18


def test_a_judge_that_would_say_neither_gives_no_verdict(said, base, given):
    """Random weights: A and B are two ids of 265."""
    status, output, errors = with_ours(said, base, given, "--num-completions", 2)
    assert (status, errors) == (0, [])
    told = json.loads(output)
    assert (told["written"], rows(given / "j.jsonl")) == (0, [])
    told["left_out"].pop("empty completion", None)
    assert list(told["left_out"]) == ["the judge's reply is neither label (below 10%)"]


def test_ours_writes_and_judges(said, base, given, monkeypatch):
    monkeypatch.setattr(model_judge, "MIN_LABEL_MASS", 0.0)  # of random weights
    status, output, errors = with_ours(said, base, given, "--num-completions", 3)
    assert (status, errors) == (0, [])
    told, found = json.loads(output), rows(given / "j.jsonl")
    assert len(found) == told["written"] > 6
    assert told["written"] + sum(told["left_out"].values()) == 12
    assert told["judge"].startswith("openpalm-")
    for row in found:
        sides = row["candidates"]
        assert sides[0]["sampling"]["draw"] < sides[1]["sampling"]["draw"]
        assert len(sides[0]["checkpoint"]) == 64
    status, output, _ = with_ours(said, base, given, "--num-completions", 3)
    assert (status, json.loads(output)["written"]) == (0, 0)
    assert rows(given / "j.jsonl") == found


def test_revisions_are_edits(said, given):
    def reply(text, _):
        return says(" **** ") if "Write the improved answer alone" in text else says("Too few.")

    with judging(reply) as seen:
        status, output, errors = over_http(said, given, seen, "--revise", "--json")
        assert (status, errors) == (0, [])
        assert json.loads(output)["written"] == 3
        critiques = [
            text for r in seen.requests if "Too few." in (text := r["messages"][0]["content"])
        ]
        assert len(seen.requests) == 6
        assert len(critiques) == 3
        over_http(said, given, seen, "--revise")
        assert len(seen.requests) == 6
    shown = read_demonstrations(given / "j.jsonl").items
    assert [messages[-1].content for messages in shown] == ["****"] * 3
    pairs = read_pairs(given / "j.jsonl").items
    assert {(p.chosen[0].content, p.rejected[0].content) for p in pairs} == {("****", "*")}


def test_ours_revises(said, base, given):
    status, output, errors = with_ours(said, base, given, "--revise")
    assert (status, errors) == (0, [])
    told = json.loads(output)
    assert told["written"] + sum(told["left_out"].values()) == 4
    assert {row["kind"] for row in rows(given / "j.jsonl")} <= {"edit"}


def test_what_cannot_be_judged_is_told(said, base, given, monkeypatch):
    monkeypatch.setattr(model_judge, "MIN_LABEL_MASS", 0.0)  # of random weights
    many = "x" * 600
    rows_ = [["", "*"], ["*", " * "], [many, "*"], ["*", "**"]]
    write(given / "a.jsonl", *({"prompt": "Why?", "responses": pair} for pair in rows_))
    status, output, _ = said(
        *("judge", "--data", given / "a.jsonl", "--constitution", given / "c.yaml"),
        *("--out", given / "j.jsonl", "--judge", base, "--json"),
    )
    told = json.loads(output)
    assert (status, told["written"]) == (0, 1)
    assert told["left_out"] == {
        "empty completion": 1,
        "equal completions": 1,
        "longer than the judge's context": 1,
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give either --judge or --endpoint"),
        (["--judge", "x", "--endpoint", "http://x"], "give either --judge or --endpoint"),
        (["--endpoint", "http://x"], "--endpoint and --judge-model: give both"),
        (["--endpoint", "ftp://x", "--judge-model", "m"], "--endpoint ftp://x: must be an http"),
        (["--judge", "x"], "x: no such checkpoint or run"),
        (["--judge", "x", "--num-completions", 1], "--num-completions 1: must be 2"),
        (["--judge", "x", "--timeout", 0], "--timeout 0"),
        (["--judge", "x", "--parallel", 0], "--parallel 0"),
        (["--judge", "x", "--data", "p.jsonl"], 'field "responses" is missing'),
        (["--judge", "x", "--constitution", "none.yaml"], "none.yaml: no such file"),
        (["--judge", "x", "--out", "a.jsonl"], "must be another file"),
        (
            ["--endpoint", "http://127.0.0.1:9", "--judge-model", "m", "--out", "p.jsonl"],
            "p.jsonl:1",
        ),
    ],
)
def test_a_wrong_request_is_one_line(said, given, words, says, monkeypatch):
    monkeypatch.chdir(given)
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    words = ["--data", "a.jsonl", "--constitution", "c.yaml", "--out", "j.jsonl", *words]
    status, _, errors = said("judge", *words)
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
