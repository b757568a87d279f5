"""Tokens: hashed, limited to scopes and project, refused when revoked or expired, counted."""

from datetime import timedelta

import pytest
from django.utils import timezone

from openpalm.feedback.accounts import tokens
from openpalm.feedback.api.protocol.tokens import FAILURES
from openpalm.feedback.models import ApiToken, LoginFailure, Membership, Project, Role


def test_a_token_is_stored_as_a_hash_and_works(project, admin, caller):
    text = tokens.issue(admin, "mine", ["projects:read"])
    stored = ApiToken.objects.get()
    assert text not in str(vars(stored))
    assert stored.prefix == text[:12]
    assert caller(admin).get("projects").data["data"][0]["slug"] == "demo"


@pytest.mark.parametrize("change", ["revoked_at", "expires_at", "inactive", "unknown"])
def test_a_token_that_is_no_longer_good_is_refused(project, admin, caller, change):
    good = caller(admin)
    past = timezone.now() - timedelta(seconds=1)
    if change == "inactive":
        admin.is_active = False
        admin.save()
    elif change == "unknown":
        ApiToken.objects.all().delete()
    else:
        ApiToken.objects.update(**{change: past})
    response = good.get("projects")
    assert response.status_code == 401
    assert response.data["error"]["code"] == "unauthorized"
    assert response["WWW-Authenticate"] == "Bearer"


def test_a_session_is_not_accepted(project, admin, signed_in):
    assert signed_in(admin).get("/api/v1/projects").status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic cm9vdDpyb290", "opf_x"])
def test_other_headers_are_refused(project, admin, client, header):
    response = client.get("/api/v1/projects", headers={"Authorization": header})
    assert response.status_code == 401


def test_a_scope_is_needed_and_named(project, admin, caller):
    response = caller(admin, "items:read").get("projects")
    assert response.status_code == 403
    assert "projects:read" in response.data["error"]["message"]


def test_a_role_is_needed_besides_the_scope(project, member, caller):
    response = caller(member("ann")).get("items", project="demo")
    assert response.status_code == 403
    assert "reviewer" in response.data["error"]["message"]


def test_a_token_limited_to_a_project_sees_no_other(project, member, caller):
    other = Project.objects.create(slug="other", name="Other")
    ann = member("ann", Role.ADMIN)
    Membership.objects.create(project=other, user=ann, role=Role.ADMIN)
    limited = caller(ann, project=project)
    assert [p["slug"] for p in limited.get("projects").data["data"]] == ["demo"]
    assert limited.get("items", project="demo").status_code == 200
    assert limited.get("items", project="other").status_code == 403


def test_a_project_of_others_does_not_exist(project, member, caller):
    Project.objects.create(slug="other", name="Other")
    ann = caller(member("ann", Role.OWNER))
    missing = ann.get("items", project="missing")
    hidden = ann.get("items", project="other")
    assert missing.status_code == hidden.status_code == 404
    assert missing.data == hidden.data


def test_wrong_tokens_are_counted_and_a_good_one_still_passes(project, admin, caller):
    wrong, good = caller(admin), caller(admin)
    wrong.headers = {"Authorization": "Bearer opf_wrong"}
    codes = [wrong.get("projects").status_code for _ in range(FAILURES + 2)]
    assert codes == [401] * FAILURES + [429] * 2
    assert LoginFailure.objects.count() == FAILURES
    assert good.get("projects").status_code == 200


def test_the_last_use_is_noted_once_a_minute(project, admin, caller):
    good = caller(admin)
    good.get("projects")
    first = ApiToken.objects.get().last_used_at
    good.get("projects")
    assert first is not None
    assert ApiToken.objects.get().last_used_at == first
    ApiToken.objects.update(last_used_at=first - timedelta(minutes=2))
    good.get("projects")
    assert ApiToken.objects.get().last_used_at > first
