"""A labeler's own judgements: what the worker has counted of them, and of nobody else."""

import pytest

from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.quality.compute import compute

A = {"better": 0, "worse": 1, "strength": 1}


@pytest.fixture
def judged(project, member, make_item):
    """ann has judged two items in 4 and 6 seconds and skipped one; bob has judged three in 60."""
    project.overlap = 2
    project.save()
    for number in range(3):
        make_item(f"q {number}", "x", "y", needed=2)
    for name, times in (("ann", (4000, 6000, None)), ("bob", (60_000,) * 3)):
        user = member(name)
        for ms in times:
            assignment = queue.next_assignment(project, user)
            if ms is None:
                submission.skip(assignment.pk, user, "")
            else:
                submission.submit(assignment.pk, user, Judgement("compare", A, ms))
    return project


def figures(page):
    """name -> number, as the page shows them; None without any."""
    text = page.content.decode()
    if 'aria-label="Your work"' not in text:
        return None
    part = text.split('aria-label="Your work"')[1].split("</dl>")[0]
    rows = part.split("<dt>")[1:]
    return {row.split("<")[0]: row.split("<dd>")[1].split("<")[0] for row in rows}


def test_a_labeler_sees_their_own_work_and_time_once_the_worker_has_counted(
    judged, member, signed_in
):
    client = signed_in(member("ann"))
    assert figures(client.get("/p/demo/mine")) is None
    compute(judged)
    page = client.get("/p/demo/mine")
    assert figures(page) == {
        "judgements": "2",
        "median time of a judgement": "5.0 s",
        "skipped": "1",
        "flagged": "0",
    }
    assert "bob" not in page.content.decode()
    assert figures(client.get("/p/demo/mine?before=1")) is None  # on the first page only


def test_who_has_judged_nothing_has_no_figures(judged, member, signed_in):
    compute(judged)
    assert figures(signed_in(member("cat")).get("/p/demo/mine")) is None
