"""Streams of exports: bounded memory, what `datasets` loads."""

import json
import tracemalloc
from datetime import datetime

import datasets
import pytest
from judgements import every_kind, judge, rate

from openpalm.data.rows.exports.stream import (
    EXPORT_NAMES,
    MAX_GROUP,
    export_lines,
    export_rows,
    write_export,
)
from openpalm.data.rows.read_result import MAX_LISTED, StreamCounts
from openpalm.errors import DataError, StorageError


def test_ratings_that_are_not_adjacent_are_counted():
    good, bad = rate(1, "a", true=5), rate(3, "b", true=1)
    counts = StreamCounts()
    assert (
        list(export_rows([good, judge(2, "write", {"text": "x"}, ()), bad], "pairs", counts)) == []
    )
    assert counts.unused == {"no other rating to compare with": 2, "write gives no pair": 1}
    (row,) = export_rows([good, bad], "pairs")
    assert (row["chosen"][0]["content"], row["margin"]) == ("a", 4)


def test_ratings_of_one_prompt_are_limited():
    counts = StreamCounts()
    ratings = [rate(i, f"text {i}", true=1 + i % 5) for i in range(MAX_GROUP + 3)]
    list(export_rows(ratings, "scores", counts))
    assert counts.used == 1
    assert counts.unused == {f"more than {MAX_GROUP} ratings of one prompt by one author": 3}


def test_the_report_names_the_first_records():
    counts = StreamCounts()
    ties = [judge(i, "compare", {"tie": [0, 1]}) for i in range(MAX_LISTED + 1)]
    list(export_rows([*ties, judge("x", "write", {"text": "b"}, ())], "pairs", counts))
    listed = ", ".join(f"'p{i}'" for i in range(MAX_LISTED))
    assert counts.report() == [
        f"{MAX_LISTED + 1} left out: tie ({listed}, ...)",
        "1 left out: write gives no pair ('px')",
    ]


def test_an_unknown_name_is_refused():
    with pytest.raises(DataError, match=r"format 'xml': must be one of records, pairs, .*, csv"):
        export_rows([], "xml")


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be written"):
        write_export(tmp_path / "file" / "x.jsonl", [], "records")


@pytest.mark.parametrize("name", ["records", "pairs", "csv"])
def test_memory_does_not_grow(name):
    def records():
        for i in range(300):
            yield from every_kind(texts=(f"{i}" * 1200, "blue", "green"), start=100 * i)

    tracemalloc.start()
    written = sum(map(len, export_lines(records(), name)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written > 4_000_000
    assert most < written / 2


@pytest.mark.parametrize("name", EXPORT_NAMES)
def test_datasets_loads_every_export(tmp_path, name):
    path = tmp_path / ("table.csv" if name == "csv" else "rows.jsonl")
    records = [*every_kind(), *every_kind(start=20)]
    counts = write_export(path, records, name)
    kind = "csv" if name == "csv" else "json"
    loaded = datasets.load_dataset(
        kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded, datasets.Dataset)
    assert len(loaded) == counts.used > 0
    if name == "csv":
        assert loaded["id"] == [p.id for p in records]
        return
    for got, line in zip(loaded, path.read_text(encoding="utf-8").splitlines(), strict=True):
        wanted = json.loads(line)
        if name == "records":  # datasets makes a time of it
            wanted["created"] = datetime(2026, 1, 31, 12)
        assert without_nulls(got) == without_nulls(wanted)


def without_nulls(value):
    """Arrow gives every row the fields of all rows, null where a row has none."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
