"""What the row readers read back from an export is what they convert from the records."""

import json
from collections import Counter

import pytest
from judgements import ASK, DIALOGUE, every_kind, judge, mixed, rate

from openpalm.data.rows.exports.formats import FORMATS
from openpalm.data.rows.exports.stream import export_rows, write_export
from openpalm.data.rows.preferences import (
    Preference,
    demonstrations_from_preferences,
    labelled_completions_from_preferences,
    pairs_from_preferences,
    ratings_from_preferences,
    ties_from_preferences,
)
from openpalm.data.rows.read_result import StreamCounts
from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.rows.readers.labelled_completions import read_labelled_completions
from openpalm.data.rows.readers.pairs import read_pairs, read_ties
from openpalm.data.rows.readers.ratings import read_ratings
from openpalm.data.text.conversation import Message


def exported(tmp_path, name, records):
    path = tmp_path / f"{name}.jsonl"
    return path, write_export(path, records, name)


def multiset(items):
    return Counter(map(repr, items))


def test_records_come_back_whole(tmp_path):
    path, counts = exported(tmp_path, "records", mixed())
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [Preference.from_json(json.loads(line), "x") for line in lines] == mixed()
    assert counts.used == len(mixed())
    assert read_pairs(path).items == pairs_from_preferences(mixed()).items


@pytest.mark.parametrize("name", ["pairs", "conversations"])
def test_pairs_come_back(tmp_path, name):
    path, counts = exported(tmp_path, name, mixed())
    wanted = pairs_from_preferences(mixed())
    assert len(wanted.items) == counts.used > 20
    assert multiset(read_pairs(path).items) == multiset(wanted.items)
    assert counts.unused == wanted.unused


def test_hh_texts_come_back_or_are_counted(tmp_path):
    plain = [p for p in every_kind() if p.kind != "flag"]
    path, counts = exported(tmp_path, "hh", plain)
    assert read_pairs(path).items == pairs_from_preferences(plain).items
    assert not counts.altered

    path, counts = exported(tmp_path, "hh", mixed())
    read = Counter((p.chosen[0].content, p.rejected[0].content) for p in read_pairs(path).items)
    wanted = Counter(
        (pair.chosen[0].content.strip(), pair.rejected[0].content.strip())
        for pair in pairs_from_preferences(mixed()).items
    )
    lost = sum((wanted - read).values())
    assert not read - wanted
    assert lost == sum(
        counts.unused[reason]
        for reason in (
            "a system turn, which HH texts cannot hold",
            "a text that this format would read as other turns",
        )
    )
    assert counts.used == sum(read.values())
    (change,) = counts.altered
    assert change == "white space around a turn removed, for HH texts cannot hold it"


def test_an_hh_text_is_written_as_anthropic_writes_it():
    prompt = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Sky?"))
    record = judge(1, "compare", {"better": 1, "worse": 0, "strength": 1}, prompt=prompt)
    (row,) = export_rows([record], "hh")
    before = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant: "
    assert (row["chosen"], row["rejected"]) == (before + "blue", before + "red")


def test_labels_come_back(tmp_path):
    path, counts = exported(tmp_path, "kto", mixed())
    wanted = labelled_completions_from_preferences(mixed())
    assert read_labelled_completions(path).items == wanted.items
    assert counts.unused == wanted.unused


def test_labels_of_pairs_come_back(tmp_path):
    judged = [
        p
        for p in mixed()
        if p.kind in ("compare", "rank", "edit") and p.payload.keys() - {"both_bad"}
    ]
    path, _ = exported(tmp_path, "kto-pairs", judged)
    records, _ = exported(tmp_path, "records", judged)
    wanted = read_labelled_completions(records).items
    assert multiset(read_labelled_completions(path).items) == multiset(wanted)
    assert len(wanted) == 2 * len(pairs_from_preferences(judged).items)


@pytest.mark.parametrize("axis", ["true", "kind"])
def test_ratings_come_back(tmp_path, axis):
    path, counts = exported(tmp_path, "ratings", mixed())
    wanted = [
        rating
        for rating in ratings_from_preferences(mixed()).items
        if rating.axis == axis and rating.completion[0].content.strip()
    ]
    assert read_ratings(path, axis).items == wanted
    assert counts.unused["empty completion"] == 1
    assert counts.unused["thumb gives no rating"] == 10


def test_rankings_come_back(tmp_path):
    ranked = [p for p in mixed() if p.kind == "rank" or "tie" in p.payload]
    path, counts = exported(tmp_path, "rankings", mixed())
    compared = [p for p in mixed() if "better" in p.payload]
    wanted = multiset(pairs_from_preferences(ranked).items)
    # A ranking has no strength.
    wanted += multiset(
        pair._replace(margin=None) for pair in pairs_from_preferences(compared).items
    )
    assert multiset(read_pairs(path).items) == wanted
    assert multiset(read_ties(path)) == multiset(ties_from_preferences(ranked).items)
    assert counts.unused["both bad"] == 5


def test_scores_come_back(tmp_path):
    group = [
        rate(1, "a", true=5, kind=4),
        rate(2, "b", true=2, kind=3),
        rate(3, "c", true=5, kind=2),
    ]
    alone = rate(4, "d", author="bob", true=5, kind=1)
    path, counts = exported(tmp_path, "scores", [*group, alone, *every_kind()[:1]])
    (row,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert row["responses"] == ["a", "b", "c"]
    assert row["scores"] == [4.5, 2.5, 3.5]
    assert row["record_ids"] == ["p1", "p2", "p3"]
    assert [(r.completion[0].content, r.value) for r in read_ratings(path).items] == [
        ("a", 4.5),
        ("b", 2.5),
        ("c", 3.5),
    ]
    assert multiset(read_pairs(path).items) == multiset(pairs_from_preferences(group).items)
    assert counts.unused == {
        "no other rating to compare with": 1,
        "compare gives no score": 1,
    }


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_conversations_come_back(tmp_path, name):
    path, counts = exported(tmp_path, name, mixed())
    wanted = demonstrations_from_preferences(mixed())
    assert read_demonstrations(path).items == wanted.items
    assert counts.unused == wanted.unused
    assert counts.used == 10


@pytest.mark.parametrize(("name", "kept"), [("prompt-completion", 6), ("alpaca", 6)])
def test_texts_come_back_or_are_counted(tmp_path, name, kept):
    path, counts = exported(tmp_path, name, mixed())
    wanted = demonstrations_from_preferences(mixed()).items
    read = read_demonstrations(path).items
    assert counts.used == len(read) == kept
    assert not multiset(read) - multiset(wanted)
    assert counts.unused["a text that this format would read as other turns"] == 2
    assert sum(counts.unused.values()) + counts.used == len(mixed())


def test_alpaca_has_a_system_field(tmp_path):
    prompt = (Message("system", "Be brief."), *ASK)
    path, _ = exported(tmp_path, "alpaca", [judge(1, "write", {"text": "Blue."}, (), prompt)])
    (row,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert [row[k] for k in ("system", "instruction", "input", "output")] == [
        "Be brief.",
        "Sky?",
        "",
        "Blue.",
    ]
    assert read_demonstrations(path).items == [(*prompt, Message("assistant", "Blue."))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_names_its_records_and_their_kind_of_author(name):
    simulated = [
        Preference.from_json(p.to_json() | {"author_kind": "simulated"}, "x")
        for p in every_kind(DIALOGUE[1:])
    ]
    rows = list(export_rows(simulated, name))
    assert rows or name in ("prompt-completion", "alpaca")  # these hold one turn of the user
    assert {row["author_kind"] for row in rows} <= {"simulated"}
    ids = {p.id for p in simulated}
    assert all(
        {row["id"]} <= ids if name == "records" else {*row["record_ids"]} <= ids for row in rows
    )


@pytest.mark.parametrize("name", FORMATS)
def test_each_record_is_used_or_counted(name):
    """One record by itself gives rows or a reason."""
    for record in mixed():
        counts = StreamCounts()
        rows = list(export_rows([record], name, counts))
        assert counts.used == len(rows)
        assert rows or counts.unused
