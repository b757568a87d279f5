"""Tables that are kept and refreshed equal tables that are read from the beginning."""

import random

import numpy as np
import pytest
from pair_payloads import BOTH_BAD, TIE, A, B

from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Item, ItemCandidate, Response
from openpalm.feedback.quality import answer_table, response_table
from openpalm.feedback.quality.answer_table import AnswerTable
from openpalm.feedback.quality.counted import values_of
from openpalm.feedback.quality.response_table import ResponseTable


@pytest.fixture
def small(monkeypatch):
    """Several chunks and known rows that are not read again, with few rows."""
    for module in (response_table, answer_table):
        monkeypatch.setattr(module, "CHUNK", 7)
        monkeypatch.setattr(module, "READ_AGAIN", 3)


def contents(table):
    """The rows with names instead of numbers, which depend on the order of reading."""
    plain = [
        {name: row[name].item() for name in row.dtype.names} | {"rater": table.raters[row["rater"]]}
        for row in table.rows
    ]
    parts = [(row, table.parts[part], value) for row, part, value in table.values.tolist()]
    return plain, parts, table.gold.tolist()


def refreshed(table):
    """The table after a refresh, compared with a new one."""
    table.refresh()
    new = ResponseTable(table.project)
    new.refresh()
    assert contents(table) == contents(new)
    return new


@pytest.fixture
def reads(monkeypatch):
    """Numbers of the rows that were read."""
    found = []
    encoded = ResponseTable._encoded

    def counted(self, columns):
        found.append(len(columns[0]))
        return encoded(self, columns)

    monkeypatch.setattr(ResponseTable, "_encoded", counted)
    return found


def test_any_changes_are_found(small, project, member, make_item, judge, lease):
    """Judgements, changes, undoing, deletions, skips, flags and their resolution, at random."""
    drawn, table = random.Random(3), ResponseTable(project)
    users = [member(f"user {n}") for n in range(4)]
    for step in range(60):
        user, payload = drawn.choice(users), drawn.choice([A, B, TIE, BOTH_BAD])
        old = drawn.choice([None, *Response.objects.all()])
        match drawn.choice(["judge", "judge", "change", "undo", "delete", "skip", "flag"]):
            case "judge":
                judge(user, make_item(f"q{step}", "x", "y", needed=3), payload)
            case "change" if old and old.in_force and old.state == "submitted":
                submission.change(old.assignment_id, old.user, Judgement("compare", payload))
            case "undo":
                submission.undo(project, user)
            case "delete" if old:
                submission.delete(old.pk)
            case "skip":
                submission.skip(lease(user, make_item(f"q{step}", "x", "y")).pk, user, "")
            case "flag":
                flag = submission.flag(lease(user, make_item(f"q{step}", "x", "y")).pk, user, "odd")
                if drawn.random() < 0.5:
                    Response.objects.filter(pk=flag.pk).update(in_force=False)
        if drawn.random() < 0.4:
            refreshed(table)
    assert len(refreshed(table)) > 20


def test_only_new_rows_are_read(small, project, member, make_item, judge, reads):
    ann, table = member("ann"), ResponseTable(project)
    for n in range(20):
        judge(ann, make_item(f"q{n}", "x", "y"), A)
    table.refresh()
    assert reads == [7, 7, 6]
    judge(ann, make_item("new", "x", "y"), A)
    submission.delete(int(table.rows["id"][0]))
    reads.clear()
    table.refresh()
    assert reads == [response_table.READ_AGAIN + 1]


def test_a_row_that_was_stored_late_is_found(small, project, member, make_item, judge):
    """Its transaction began before, and ended after, those of newer rows."""
    ann, table = member("ann"), ResponseTable(project)
    for n in range(20):
        judge(ann, make_item(f"q{n}", "x", "y"), A)
    late = Response.objects.order_by("pk")[5]
    fields = {f.attname: getattr(late, f.attname) for f in Response._meta.concrete_fields}
    Response.objects.filter(pk=late.pk).delete()
    table.refresh()
    assert len(table) == 19
    Response.objects.bulk_create([Response(**fields)])
    assert len(refreshed(table)) == 20


def test_another_database_is_read_from_the_beginning(small, project, member, make_item, judge):
    ann, table = member("ann"), ResponseTable(project)
    for n in range(9):
        judge(ann, make_item(f"q{n}", "x", "y"), A)
    table.refresh()
    Response.objects.filter(pk__gt=int(table.rows["id"][4])).delete()
    assert len(refreshed(table)) == 5


@pytest.mark.parametrize(
    ("task", "kind", "payloads"),
    [
        ("rating", "rate", [{"ratings": {"b": 3, "a": 1}}, {"ratings": {"a": 5}}]),
        ("ranking", "rank", [{"order": [[1], [0]]}, {"order": [[0, 1]]}]),
    ],
)
def test_parts(small, project, member, make_item, judge, task, kind, payloads):
    project.task = task
    project.save()
    table = ResponseTable(project)
    items = [make_item(f"q{n}", "x", "y", needed=9) for n in range(3)]
    for n, payload in enumerate(payloads * 5):
        judge(member(f"user {n}"), items[n % 3], payload, kind)
        if n == 4:
            table.refresh()
    refreshed(table)
    values = values_of(table, "person")
    assert values.counts.sum() == len(table.values) == len(values.codes)
    submission.delete(int(table.rows["id"][0]))
    table.refresh()
    gone = len(payloads[0].get("ratings", "x"))
    assert len(values_of(table, "person").codes) == len(values.codes) - gone


def test_answers_of_new_items_are_added(small, project, make_item):
    table = AnswerTable(project)
    for n in range(17):
        make_item(f"q{n}", *(f"answer {n} {k}" for k in range(1 + n % 3)))
        if n in (2, 9, 16):
            table.refresh()
    make_item("no answers")
    late = Item.objects.order_by("pk")[4]
    places = list(ItemCandidate.objects.filter(item=late))
    ItemCandidate.objects.filter(item=late).delete()
    before = AnswerTable(project)
    before.refresh()
    ItemCandidate.objects.bulk_create(places)
    for one in (table, before):
        one.refresh()
        assert len(one.rows) == ItemCandidate.objects.count()
    rows = ItemCandidate.objects.order_by("item_id", "position")
    lengths = [[len(row.candidate.text), 0, 0, 0] for row in rows.select_related("candidate")]
    np.testing.assert_array_equal(table.styles(np.arange(len(table.rows))), lengths)
    for n, row in enumerate(rows):
        found = table.find(np.array([row.item_id]), np.array([row.position]))
        assert found.tolist() == [n]
