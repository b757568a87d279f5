"""The audit log: its filters know every action that the code records."""

import re
from pathlib import Path

from django.db import connection
from django.test.utils import CaptureQueriesContext

from openpalm import feedback
from openpalm.feedback.manage.audit_pages import AREAS
from openpalm.feedback.models import Event, Role

ACTION = re.compile(r'(?:record|record_for|_audit)\(\s*(?:request,\s*)?f?"([a-z]+)\.')
"""the first word of an action, as in audit.record("item.added", ...)"""


def test_every_action_has_a_filter():
    folder = Path(feedback.__path__[0])
    recorded = {
        area
        for path in folder.rglob("*.py")
        for area in ACTION.findall(path.read_text(encoding="utf-8"))
    }
    assert {"item", "labeler", "token"} <= recorded <= set(AREAS)


def test_the_filters_of_the_page(project, member, signed_in):
    boss = member("max", Role.ADMIN)
    for user, action in ((boss, "item.added"), (boss, "job.stopped"), (None, "item.reveal")):
        Event.objects.create(project=project, user=user, action=action)
    client = signed_in(boss)

    def shown(query):
        rows = client.get(f"/p/demo/audit?{query}").context["page"].rows
        return [event.action for event in rows]

    assert shown("area=item") == ["item.reveal", "item.added"]
    assert shown("area=item&who=max") == ["item.added"]
    assert shown("area=nothing&who=nobody") == []


def test_a_page_joins_no_table(project, member, signed_in):
    """SQLite would begin with the project or the user and sort all events for each page."""
    boss = member("max", Role.ADMIN)
    Event.objects.create(project=project, user=boss, action="item.added")
    client = signed_in(boss)
    with CaptureQueriesContext(connection) as made:
        assert b"item.added" in client.get("/p/demo/audit?who=max").content
    (read,) = [q["sql"] for q in made if 'FROM "feedback_event"' in q["sql"]]
    assert "JOIN" not in read
