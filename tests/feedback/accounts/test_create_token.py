"""`openpalm feedback manage create_token`: a token of the API for scripts."""

import io

import pytest
from django.core.management import CommandError, call_command

from openpalm.feedback.models import ApiToken, Event

pytestmark = pytest.mark.django_db


def made(*words, **options):
    out = io.StringIO()
    call_command("create_token", *words, stdout=out, **options)
    return out.getvalue().strip()


def answer(client, token):
    return client.get("/api/v1/projects", headers={"Authorization": f"Bearer {token}"})


def test_the_printed_token_opens_the_api(admin, project, client):
    token = made(admin.username, scopes=["projects:read"])
    listed = answer(client, token)
    assert [row["slug"] for row in listed.json()["data"]] == [project.slug]
    assert not ApiToken.objects.filter(digest__contains=token).exists()
    (event,) = Event.objects.filter(action="token.made")
    assert event.data["by"] == "command line"
    assert token not in str(event.data) + event.target


def test_scope_and_project_limit_it(admin, project, client):
    token = made(admin.username, scopes=["items:read"], project=project.slug)
    assert answer(client, token).status_code == 403
    items = client.get(
        f"/api/v1/items?project={project.slug}", headers={"Authorization": f"Bearer {token}"}
    )
    assert items.status_code == 200


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["nobody"], {}, "there is no user 'nobody'"),
        (["root"], {"days": 0}, "--days 0: must be 1 to 3650"),
        (["root"], {"project": "other"}, "there is no project 'other'"),
    ],
)
def test_mistakes(admin, words, options, said):
    with pytest.raises(CommandError, match=said):
        made(*words, scopes=["items:read"], **options)
    assert not ApiToken.objects.exists()
