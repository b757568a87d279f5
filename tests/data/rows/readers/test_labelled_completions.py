"""Verdicts from pairs, in rows and in records: the chosen answer is good, the rejected one bad."""

import json

from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.rows.readers.labelled_completions import read_labelled_completions
from openpalm.data.text.conversation import Message

PROMPT = (Message("user", "Why?"),)


def record(name, kind, payload):
    return Preference(
        id=name,
        prompt=PROMPT,
        candidates=(Candidate("Because."), Candidate("No.")),
        kind=kind,
        payload=payload,
        author="a",
        author_kind="person",
        created="2026-01-31T12:00:00Z",
    ).to_json() | {"prompt": [{"role": "user", "content": "Why?"}]}


def verdicts(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, default=vars) + "\n" for row in rows))
    found = read_labelled_completions(path)
    return [(v.completion[0].content, v.good) for v in found.items], found.unused


BOTH = [("Because.", True), ("No.", False)]
BETTER = {"better": 0, "worse": 1, "strength": 2}


def test_rows_of_pairs(tmp_path):
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    assert verdicts(tmp_path, row) == (BOTH, {})


def test_records(tmp_path):
    compared, thumb = record("1", "compare", BETTER), {"up": False, "candidate": 0}
    assert verdicts(tmp_path, compared) == (BOTH, {})
    judged, unused = verdicts(tmp_path, compared, record("2", "thumb", thumb))
    assert judged == [("Because.", False)]
    assert unused == {"compare gives no labelled completion": 1}
