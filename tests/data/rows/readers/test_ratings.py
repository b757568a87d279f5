import json

import pytest

from openpalm.data.rows.preferences import Candidate, Preference, Rating
from openpalm.data.rows.readers.ratings import read_ratings
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

ASK = (Message("user", "Sky?"),)
ROW = {"prompt": "Sky?", "response": "Blue.", "rating": 4}


def save(tmp_path, *rows):
    path = tmp_path / "ratings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rate(number, text, **axes):
    return Preference(
        id=f"r{number}",
        prompt=ASK,
        candidates=(Candidate(text),),
        kind="rate",
        payload={"ratings": axes, "candidate": 0},
        author="ann",
        author_kind="person",
        created="2026-01-31T12:00:00Z",
    ).to_json()


@pytest.mark.parametrize("answer", ["response", "completion"])
@pytest.mark.parametrize("value", ["rating", "label", "score"])
def test_every_spelling(tmp_path, answer, value):
    turns = [{"role": "user", "content": "Sky?"}]
    rows = [{"prompt": asked, answer: "Blue.", value: 2.5} for asked in ("Sky?", turns)]
    found = read_ratings(save(tmp_path, *rows))
    assert found[:2] == ([Rating(ASK, (Message("assistant", "Blue."),), "", 2.5)] * 2, {})


def test_preference_records(tmp_path):
    thumb = rate(3, "c", true=1) | {"kind": "thumb", "payload": {"up": True, "candidate": 0}}
    found = read_ratings(save(tmp_path, rate(1, "a", true=5), rate(2, "b", true=1), thumb))
    assert [(rating.value, rating.axis) for rating in found.items] == [(5, "true"), (1, "true")]
    assert found.unused == {"thumb gives no rating": 1}


def test_one_axis_is_read_at_a_time(tmp_path):
    path = save(tmp_path, rate(1, "a", true=5, kind=2))
    with pytest.raises(DataError, match=r"rates 2 axes \('kind', 'true'\); say which with --axis"):
        read_ratings(path)
    found = read_ratings(path, "kind")
    assert [rating.value for rating in found.items] == [2]
    assert found.unused == {"another axis": 1}
    with pytest.raises(DataError, match="--axis 'wit'"):
        read_ratings(path, "wit")
    with pytest.raises(DataError, match="no axis"):
        read_ratings(save(tmp_path, ROW), "wit")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"rating": None},
            "this row is prompt, completion, the first row is prompt, response, rating; write",
        ),
        ({"score": 1}, 'fields "rating" and "score" have the same role'),
        ({"completion": "x"}, 'fields "completion" and "response" have the same role'),
        ({"rating": True}, 'field "rating" is True; it must be a number'),
        ({"rating": "4"}, 'field "rating"'),
        ({"rating": 1e301}, 'field "rating"'),
        ({"rating": None, "ratings": {"wit": "4"}}, 'field "ratings.wit"'),
        ({"response": 4}, 'field "response"'),
        ({"prompt": None}, "match no known format"),
        ({"kind": "rate", "payload": {}}, "split the file"),
    ],
)
def test_rows_that_are_not_ratings(tmp_path, change, says):
    path = save(tmp_path, ROW, ROW | change)
    with pytest.raises(DataError, match=f"{path}:2") as caught:
        read_ratings(path)
    assert says in str(caught.value)


def test_files_without_ratings(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        read_ratings(save(tmp_path))
    thumb = rate(3, "c", true=1) | {"kind": "thumb", "payload": {"up": True, "candidate": 0}}
    with pytest.raises(
        DataError, match=r"no rating can be used: thumb gives no rating \(1; line 1\)"
    ):
        read_ratings(save(tmp_path, thumb))
    with pytest.raises(
        DataError, match="this row is a Preference record, the first is prompt, response, rating"
    ):
        read_ratings(save(tmp_path, ROW, rate(1, "a", true=5)))
    with pytest.raises(DataError, match=r"from .jsonl or .jsonl.gz"):
        read_ratings(tmp_path / "ratings.csv")


def test_rows_without_a_completion_are_left_out(tmp_path):
    found = read_ratings(save(tmp_path, ROW, ROW | {"response": " "}, ROW | {"prompt": ""}))
    assert [rating.value for rating in found.items] == [4]
    assert found.report() == [
        "1 left out: empty completion (line 2)",
        "1 left out: empty prompt (line 3)",
    ]


def test_a_row_rates_several_axes(tmp_path):
    row = {"prompt": "Sky?", "response": "Blue.", "ratings": {"wit": 1, "truth": 5}}
    found = read_ratings(save(tmp_path, row, row), "truth")
    assert [(rating.value, rating.axis) for rating in found.items] == [(5, "truth")] * 2
    assert found.report() == ["2 left out: another axis (lines 1, 2)"]
