"""The table of judgements, read back by Python's csv module."""

import csv
import io
import json

import pytest
from judgements import HOSTILE, every_kind, judge, mixed, rate

from openpalm.data.rows.exports.judgement_table import COLUMNS, defuse, describe_judgement
from openpalm.data.rows.exports.stream import export_lines


def table(records):
    text = b"".join(export_lines(records, "csv")).decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_every_record_is_a_line_with_its_exact_payload():
    lines = table(mixed())
    assert len(lines) == len(mixed())
    for line, record in zip(lines, mixed(), strict=True):
        assert tuple(line) == COLUMNS
        assert json.loads(line["payload"]) == record.payload
        assert (line["id"], line["author_kind"], line["elapsed_s"]) == (record.id, "person", "2.5")
        assert all(candidate.text in line["candidates"] for candidate in record.candidates)


def test_excel_sees_the_encoding():
    assert next(export_lines([], "csv")).startswith(b"\xef\xbb\xbfid,")


def test_no_cell_begins_as_a_formula():
    formulas = [*HOSTILE, "+1", "-2+3", "@SUM(A1)", "\tx", "\r=1", "\n=1", "=1"]
    records = [
        judge(i, "write", {"text": text}, (), author=text, guideline_version=text, supersedes=text)
        for i, text in enumerate(formulas)
        if text.strip()
    ]
    for line in table(records):
        for cell in line.values():
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert table(records)[-1]["author"] == "'=1"


@pytest.mark.parametrize("text", ["", "1 + 1", "a=b", "'=1", "日本"])
def test_other_cells_stay_as_they_are(text):
    assert defuse(text) == text


def test_judgements_in_words():
    assert [describe_judgement(p) for p in every_kind()] == [
        "1 better than 0, strength 2",
        "0 and 2 equal",
        "0 and 1 both bad",
        "2 > 0 = 1",
        "1 good",
        "2 bad",
        "0 edited: Azure.",
        "written: Blue.",
        "the item flagged: spam",
        "0: true 5, kind 4",
        "0: true 2, kind 3",
        "0: true 5, kind 3",
    ]
    assert describe_judgement(rate(1, "a", true=3)) == "0: true 3"
