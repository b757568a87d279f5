"""Answers that are still to be judged, from files."""

import json

import pytest

from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.rows.readers.candidates import read_candidates
from openpalm.errors import DataError


def write(tmp_path, *rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "extra", [{}, {"rank": [1, 2]}, {"ranking": [1, 0]}, {"system": "Be brief."}]
)
@pytest.mark.parametrize("field", ["responses", "answers"])
def test_prompts_with_answers(tmp_path, field, extra):
    path = write(tmp_path, {"prompt": "Why?", field: ["So.", "Because."]} | extra)
    [row] = read_candidates(path).items
    assert [c.text for c in row.candidates] == ["So.", "Because."]
    assert row.prompt[-1].content == "Why?"
    assert len(row.prompt) == 1 + ("system" in extra)


def test_preference_records_give_their_candidates_once(tmp_path):
    def record(i, texts, kind, payload):
        return Preference(
            id=f"{i}",
            prompt=row_prompt,
            candidates=tuple(map(Candidate, texts)),
            kind=kind,
            payload=payload,
            author="someone",
            author_kind="person",
            created="2026-01-31T12:00:00Z",
        ).to_json()

    [row] = read_candidates(write(tmp_path, {"prompt": "Why?", "responses": ["a", "b"]})).items
    row_prompt = row.prompt
    path = write(
        tmp_path,
        record(1, ["a", "b"], "compare", {"tie": [0, 1]}),
        record(2, ["a", "b"], "compare", {"better": 0, "worse": 1, "strength": 1}),
        record(3, ["a"], "thumb", {"up": True, "candidate": 0}),
    )
    found = read_candidates(path)
    assert [[c.text for c in item.candidates] for item in found.items] == [["a", "b"]]
    assert found.unused == {"repeated completions": 1, "fewer than two completions": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Why?"}, r"a.jsonl:1: field \"responses\" is missing.*--model"),
        ({"prompt": "Why?", "responses": ["So."]}, "two or more texts"),
        ({"prompt": "Why?", "responses": ["So.", 3]}, r"responses\[1\]"),
        ({"text": "So."}, "openpalm data prepare"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, row, says):
    with pytest.raises(DataError, match=says):
        read_candidates(write(tmp_path, row))
