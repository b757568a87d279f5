"""Members: roles and who may change them, the last owner, invitations."""

import pytest

from openpalm.feedback.accounts.invitations import find_invitation, invite
from openpalm.feedback.models import Event, Invitation, Membership, Role


@pytest.fixture
def owner(member):
    return member("olga", Role.OWNER)


@pytest.fixture
def manager(member):
    return member("max", Role.ADMIN)


def row(user):
    return Membership.objects.get(user=user)


def set_role(client, user, role):
    return client.post(f"/p/demo/members/{row(user).pk}/role", {"role": role})


def remove(client, user):
    return client.post(f"/p/demo/members/{row(user).pk}/remove")


def test_an_owner_changes_roles_and_it_is_in_the_audit_log(owner, member, signed_in):
    ann = member("ann")
    set_role(signed_in(owner), ann, "admin")
    assert row(ann).role == Role.ADMIN
    event = Event.objects.latest("id")
    assert (event.action, event.user, event.target) == ("member.role_changed", owner, "ann")
    assert event.data == {"before": "annotator", "role": "admin"}


def test_an_admin_makes_no_owner_and_changes_none(owner, manager, member, signed_in):
    client = signed_in(manager)
    ann = member("ann")
    set_role(client, ann, "owner")
    set_role(client, manager, "owner")
    set_role(client, owner, "annotator")
    remove(client, owner)
    assert (row(ann).role, row(manager).role, row(owner).role) == ("annotator", "admin", "owner")
    page = client.post("/p/demo/invitations", {"role": "owner", "days": 7, "uses": 1})
    assert page.status_code == 422
    assert not Invitation.objects.exists()


def test_the_last_owner_stays(owner, member, signed_in):
    client = signed_in(owner)
    set_role(client, owner, "admin")
    remove(client, owner)
    page = client.post("/p/demo/leave", follow=True)
    assert b"is the last owner" in page.content
    assert row(owner).role == Role.OWNER
    second = member("otto", Role.OWNER)
    assert client.post("/p/demo/leave", follow=True).status_code == 200
    assert not Membership.objects.filter(user=owner).exists()
    remove(signed_in(second), second)
    assert row(second).role == Role.OWNER


def test_anybody_else_may_leave(member, owner, signed_in):
    ann = member("ann")
    signed_in(ann).post("/p/demo/leave")
    assert not Membership.objects.filter(user=ann).exists()
    assert signed_in(ann).get("/p/demo/label").status_code == 404


def test_a_removed_member_is_out_at_once_with_their_links(project, owner, manager, signed_in):
    theirs, mine = signed_in(manager), signed_in(owner)
    _, secret = invite(project, manager, Role.ADMIN, days=7, uses=5)
    assert theirs.get("/p/demo/members").status_code == 200
    remove(mine, manager)
    assert theirs.get("/p/demo/members").status_code == 404
    assert find_invitation(secret) is None, "they could have come back by their own link"


@pytest.mark.parametrize("role", ["", "king", "superuser"])
def test_unknown_roles_are_refused(owner, member, signed_in, role):
    ann = member("ann")
    set_role(signed_in(owner), ann, role)
    assert row(ann).role == Role.ANNOTATOR


def test_a_link_is_shown_once_and_revoked(owner, signed_in):
    client = signed_in(owner)
    page = client.post("/p/demo/invitations", {"role": "reviewer", "days": 7, "uses": 3})
    assert page.status_code == 201
    secret = page.content.decode().split("/invite/")[1].split("<")[0]
    assert secret not in client.get("/p/demo/members").content.decode()
    invitation = find_invitation(secret)
    assert invitation is not None
    assert (invitation.role, invitation.uses_left) == ("reviewer", 3)
    client.post(f"/p/demo/invitations/{invitation.pk}/revoke")
    assert find_invitation(secret) is None
