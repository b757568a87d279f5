"""Long lists: what their filters let through, and how many queries a page takes."""

import pytest

from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.queue import next_assignment
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Role

TIE = Judgement("compare", {"tie": [0, 1]})


def judge(project, user):
    assignment = next_assignment(project, user)
    assert assignment
    return submission.submit(assignment.pk, user, TIE).item


@pytest.fixture
def items(project, make_item, member):
    """Three items that ann has judged, and one that nobody has."""
    for n in range(4):
        make_item(f"question {n}", "yes", "no")
    return [judge(project, member("ann")) for _ in range(3)]


def listed(client, **query):
    page = client.get("/p/demo/items", query)
    return [item.pk for item in page.context["page"].rows]


def test_items_that_a_labeler_judged_are_paged(items, member, signed_in):
    client = signed_in(member("rea", Role.REVIEWER))
    first, second, third = (item.pk for item in items)
    assert listed(client, who="ann") == [third, second, first]
    assert listed(client, who="ann", before=third) == [second, first]
    assert listed(client, who="ann", after=first) == [third, second]
    assert listed(client, who="nobody") == listed(client, who="rea") == []


@pytest.mark.parametrize("table", ["item", "itemcandidate", "assignment", "response"])
def test_a_table_of_the_admin_takes_no_query_for_each_row(
    items, admin, signed_in, table, django_assert_max_num_queries
):
    client = signed_in(admin)
    with django_assert_max_num_queries(9):
        page = client.get(f"/admin/feedback/{table}/")
    assert page.context["cl"].result_count >= 3
