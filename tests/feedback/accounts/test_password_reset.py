"""Links to set a new password: once, within a day, for one account that is no administrator's."""

import re
from datetime import datetime, timedelta
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from openpalm.feedback.accounts import password_reset, throttle
from openpalm.feedback.models import Event, LoginFailure, Role, User

OLD, NEW = "a long enough password", "another quite long password"
FORM = {"new_password1": NEW, "new_password2": NEW}


@pytest.fixture
def ann(member):
    return member("ann", Role.OWNER)


def link_of(client, user):
    """The path of a link that the administrator made on the page."""
    page = client.post(f"/people/{user.pk}/reset")
    assert page.status_code == 201
    (link,) = re.findall(r'<pre id="secret" tabindex="0">(.*?)</pre>', page.content.decode())
    return link.removeprefix("http://testserver")


@pytest.fixture
def link(admin, ann, signed_in):
    return link_of(signed_in(admin), ann)


def may_sign_in(name, password):
    return Client().post("/login", {"username": name, "password": password}).status_code == 302


def is_signed_in(client):
    return client.get("/account").status_code == 200


def refused(path):
    """Whether the link is of no use, opened or sent."""
    codes = {Client().get(path).status_code, Client().post(path, FORM).status_code}
    assert codes in ({404}, {200, 302})
    return codes == {404}


def test_a_link_sets_the_password_and_ends_all_sessions(admin, ann, link, signed_in):
    """Whoever opens the link signs in afterwards, as everybody does."""
    phone, laptop, others = signed_in(ann), signed_in(ann), signed_in(admin)
    visitor = Client()
    # A sign-in ends links, so a new one is made.
    link = link_of(others, ann)
    assert b"New password of ann" in visitor.get(link).content
    assert is_signed_in(phone), "opening the link changes nothing"
    assert visitor.post(link, FORM)["Location"] == "/login"
    assert not is_signed_in(visitor)
    assert [is_signed_in(client) for client in (phone, laptop, others)] == [False, False, True]
    assert (may_sign_in("ann", OLD), may_sign_in("ann", NEW)) == (False, True)


def test_the_link_is_stored_nowhere_and_each_step_is_in_the_audit(admin, ann, link, signed_in):
    Client().post(link, FORM)
    events = Event.objects.filter(action__startswith="account.").order_by("id")
    assert [(e.action, e.user, e.target) for e in events] == [
        ("account.reset_link_made", admin, "ann"),
        ("account.password_reset", ann, "ann"),
    ]
    assert link.rpartition("/")[2] not in str(list(Event.objects.values()))
    assert link not in signed_in(admin).get("/people").content.decode()


def test_a_link_works_once(ann, link, admin, signed_in):
    other = link_of(signed_in(admin), ann)
    assert Client().post(link, FORM).status_code == 302
    assert refused(link)
    assert refused(other), "nor does another link that was made before"
    assert may_sign_in("ann", NEW)


def test_of_two_requests_at_once_one_sets_the_password(ann, link):
    user_id, secret = link.split("/")[2:]
    assert password_reset.find(int(user_id), secret) == ann, "both requests have found it"
    form = password_reset.set_password(int(user_id), secret, FORM)
    assert form is not None
    assert form.is_valid()
    assert password_reset.set_password(int(user_id), secret, FORM) is None


@pytest.mark.parametrize(("hours", "is_late"), [(23, False), (25, True)])
def test_a_link_expires_after_a_day(link, monkeypatch, hours, is_late):
    later = datetime.now() + timedelta(hours=hours)
    monkeypatch.setattr(password_reset.ResetSecrets, "_now", lambda self: later)
    assert refused(link) is is_late


def test_a_changed_link_is_refused(ann, link):
    secret = link.rpartition("/")[2]
    made, mark, signature = secret.partition("-")
    later = f"{made[:-1]}{'0' if made[-1] != '0' else '1'}"
    for wrong in (
        *(f"{later}{mark}{signature}", f"{made}{mark}{'0' * len(signature)}", made, mark, "x"),
        *(f"{secret}0", secret[:-1], "%00", "%D9%A1-%D9%A1", "a" * 5000),
    ):
        assert refused(link.replace(secret, wrong)), wrong
    assert may_sign_in("ann", OLD)


def test_a_link_is_for_one_account(ann, link, member):
    bob = member("bob")
    assert refused(link.replace(f"/{ann.pk}/", f"/{bob.pk}/"))
    assert refused(link.replace(f"/{ann.pk}/", "/987654321/"))
    assert refused(link.replace(f"/{ann.pk}/", f"/{'9' * 40}/"))
    assert may_sign_in("bob", OLD)


@pytest.mark.parametrize("change", ["is_superuser", "is_staff", "is_active", "sign in"])
def test_a_link_ends_when_the_account_changes(ann, link, change):
    """Above all, no link of a member opens the account of the administrator that they became."""
    if change == "sign in":
        assert may_sign_in("ann", OLD)
    else:
        setattr(ann, change, not getattr(ann, change))
        ann.save()
    assert refused(link)


def test_no_link_for_administrators_programs_and_closed_accounts(admin, member, signed_in):
    second = User.objects.create_superuser("second", password=OLD)
    robot = member("robot", kind=User.Kind.SIMULATED)
    gone = member("gone")
    gone.is_active = False
    gone.save()
    client = signed_in(admin)
    page = client.get("/people").content.decode()
    for user in (admin, second, robot, gone):
        answer = client.post(f"/people/{user.pk}/reset", follow=True)
        assert "No link: the account" in answer.content.decode()
        assert f"/people/{user.pk}/reset" not in page
    assert client.post("/people/987654321/reset").status_code == 404
    assert not Event.objects.exists()


def test_the_owner_of_a_project_makes_no_link(ann, member, signed_in):
    client = signed_in(ann)
    assert client.get("/people").status_code == 403
    assert client.post(f"/people/{member('bob').pk}/reset").status_code == 403


def test_a_weak_password_is_refused_and_the_link_stays(ann, link):
    for password in ("password", "12345678901", "ann"):
        form = {"new_password1": password, "new_password2": password}
        assert Client().post(link, form).status_code == 422
    assert Client().post(link, FORM | {"new_password2": OLD}).status_code == 422
    assert may_sign_in("ann", OLD)


def test_an_address_that_guesses_links_must_wait(link):
    guessing = {"REMOTE_ADDR": "203.0.113.7"}
    for _ in range(throttle.FREE_BY_ADDRESS + 8):
        throttle.begin_attempt("(reset link)", "203.0.113.7")
    assert b"Too many failed attempts" in Client().get(link, **guessing).content
    assert b"Too many failed attempts" in Client().post(link, FORM, **guessing).content
    assert Client().get(link, REMOTE_ADDR="203.0.113.8").status_code == 200
    assert Client().get(link[:-3] + "---", REMOTE_ADDR="203.0.113.9").status_code == 404
    assert LoginFailure.objects.filter(address="203.0.113.9").count() == 1


def test_wrong_links_keep_nobody_from_signing_in(ann, link):
    for _ in range(throttle.FREE + 2):
        Client().get(link[:-3] + "---", REMOTE_ADDR="203.0.113.7")
    assert may_sign_in("ann", OLD)


def test_the_form_needs_its_csrf_token(link):
    assert Client(enforce_csrf_checks=True).post(link, FORM).status_code == 403


def test_accounts_are_found_by_name_and_escaped(admin, member, signed_in):
    member("ohara@<b>")
    page = signed_in(admin).get("/people", {"who": "HARA"}).content.decode().partition("<main")[2]
    assert "ohara@&lt;b&gt;" in page
    assert "<b>" not in page
    assert "No account" in signed_in(admin).get("/people", {"who": "x\0y"}).content.decode()


def test_the_command_line_makes_a_link_for_the_only_administrator(admin):
    out = StringIO()
    call_command("reset_link", "root", url="https://palm.example/", stdout=out)
    link = out.getvalue().strip().removeprefix("https://palm.example")
    assert Client().post(link, FORM).status_code == 302
    assert may_sign_in("root", NEW)
    made = Event.objects.get(action="account.reset_link_made")
    assert (made.user, made.data) == (None, {"made_on": "command line"})


def test_the_command_line_names_what_is_wrong(admin, member):
    member("robot", kind=User.Kind.MODEL)
    with pytest.raises(CommandError, match="there is no user"):
        call_command("reset_link", "nobody")
    with pytest.raises(CommandError, match="robot is a program"):
        call_command("reset_link", "robot")
