"""Attacks on promotion, blinding, places, links and accounts that the other files do not try."""

import os
import stat
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from openpalm.errors import DataError
from openpalm.feedback.accounts import throttle
from openpalm.feedback.accounts.invitations import find_invitation, invite, join
from openpalm.feedback.accounts.tokens import issue
from openpalm.feedback.database import storable
from openpalm.feedback.items import item_changes
from openpalm.feedback.items.blinding import revealed
from openpalm.feedback.items.model_names import names_itself
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.labeling.markdown import LONGEST, to_html
from openpalm.feedback.models import (
    ApiToken,
    Assignment,
    Comparison,
    Item,
    LoginFailure,
    Membership,
    ModelVersion,
    Project,
    Response,
    Role,
    User,
)
from openpalm.feedback.training import served
from openpalm.feedback.training.commands import check_settings

BETTER = Judgement("compare", {"better": 0, "worse": 1, "strength": 1})


# --- blinding


@pytest.fixture
def compared(project, make_item):
    """An item of a comparison that is being judged, its answers written by models with names."""
    made = {}
    for name in ("secret-new", "secret-old"):
        made[name] = ModelVersion.objects.create(project=project, name=name, path="/none")
    comparison = Comparison.objects.create(
        project=project,
        challenger=made["secret-new"],
        served=made["secret-old"],
        state=Comparison.State.JUDGING,
    )
    item = make_item(
        "q", "yes", "no", comparison=comparison, purpose=Item.Purpose.COMPARISON, needed=1
    )
    for place, model in zip(item.places.all(), made.values(), strict=True):
        place.candidate.model = model
        place.candidate.save()
    return item


def test_a_comparison_is_blind_in_a_project_that_shows_names(project, compared, member, signed_in):
    Project.objects.filter(pk=project.pk).update(blind=False)
    ann = member("ann", Role.REVIEWER)
    client = signed_in(ann)
    scopes = [scope for scope in ApiToken.SCOPES if scope != "conversations:write"]
    bearer = {"Authorization": f"Bearer {issue(ann, 'all', scopes)}"}

    def everything() -> str:
        pages = [
            client.get(f"/p/demo/{address}")
            for address in ("label", "mine", f"items/{compared.pk}", "items", "responses")
        ]
        pages.append(
            client.post("/api/v1/projects/demo/next", b"", "application/json", headers=bearer)
        )
        for kind in ("items", "responses"):
            pages.append(client.get(f"/api/v1/{kind}?project=demo", headers=bearer))
        assert [page.status_code for page in pages] == [200] * len(pages)
        return "\n".join(page.text for page in pages)

    assert "secret-" not in everything()
    assignment = Assignment.objects.get(user=ann)
    submission.submit(assignment.pk, ann, BETTER)
    # After the vote too: it can still be changed.
    assert "secret-" not in everything()
    assert '"payload": {' not in everything()
    compared.comparison.state = Comparison.State.DECIDED
    compared.comparison.save()
    assert "secret-new" in everything()


def test_who_gives_an_item_of_a_comparison_up_may_see_it(compared, member):
    ann, ben = member("ann", Role.ADMIN), member("ben", Role.ADMIN)
    item_changes.reveal(compared, ann)
    assert revealed([compared], ann) == {compared.pk}
    # A skip can be undone.
    assignment = queue.next_assignment(compared.project, ben)
    assert assignment is not None
    submission.skip(assignment.pk, ben, "")
    assert revealed([compared], ben) == set()


@pytest.mark.parametrize("act", ["change", "undo"])
def test_a_judgement_that_decided_a_comparison_stays(act, project, compared, member):
    ann = member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    response = submission.submit(assignment.pk, ann, BETTER)
    comparison = compared.comparison
    comparison.result = {"newest": response.pk}
    comparison.save()
    other = Judgement("compare", {"better": 1, "worse": 0, "strength": 1})
    acts = {
        "change": lambda: submission.change(assignment.pk, ann, other),
        "undo": lambda: submission.undo(project, ann),
    }
    with pytest.raises(DataError, match="was decided with this judgement"):
        acts[act]()
    response.refresh_from_db()
    assert response.in_force


# --- places


def _late(monkeypatch, act) -> None:
    """Runs `act` when undo has chosen the response but has no lock yet: what a race does."""
    lock = submission._lock

    def late(*given):
        monkeypatch.setattr(submission, "_lock", lock)
        act()
        return lock(*given)

    monkeypatch.setattr(submission, "_lock", late)


def test_two_undos_at_once_take_one_place(project, member, make_item, monkeypatch):
    item, ann = make_item("q", "a", "b", needed=2), member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    submission.submit(assignment.pk, ann, BETTER)
    _late(monkeypatch, lambda: submission.undo(project, ann))
    assert submission.undo(project, ann) is None
    item.refresh_from_db()
    assert (item.taken, item.submitted) == (1, 0)


def test_an_undo_does_not_bring_back_what_was_deleted(project, member, make_item, monkeypatch):
    item, ann = make_item("q", "a", "b", needed=1), member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    response = submission.submit(assignment.pk, ann, BETTER)
    _late(monkeypatch, lambda: submission.delete(response.pk))
    assert submission.undo(project, ann) is None
    response.refresh_from_db()
    assignment.refresh_from_db()
    item.refresh_from_db()
    assert (response.state, response.payload, assignment.draft) == ("deleted", {}, None)
    assert (item.taken, item.submitted) == (0, 0)


def test_undoing_a_judgement_of_a_withdrawn_item_leaves_it_withdrawn(project, member, make_item):
    item, ann = make_item("q", "a", "b", needed=1), member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    submission.submit(assignment.pk, ann, BETTER)
    item_changes.withdraw(item.pk)
    submission.undo(project, ann)
    item.refresh_from_db()
    assert item.state == Item.State.WITHDRAWN


# --- accounts


def test_an_account_with_a_similar_name_does_not_forget_failures_of_the_other(admin):
    """`casefold` makes one name of both, and Django lets both sign up."""
    User.objects.create_user("ross", password="a long enough password")
    User.objects.create_user("roß", password="another long password")

    def sign_in(name: str, password: str) -> str:
        given = {"username": name, "password": password}
        return Client().post("/login", given).text

    for number in range(throttle.FREE):
        assert "do not match" in sign_in("ross", f"guess {number}")
        sign_in("roß", "another long password")
    assert LoginFailure.objects.filter(name="ross").count() == throttle.FREE


@pytest.mark.parametrize("change", ["demoted", "deactivated", "removed"])
def test_a_link_gives_no_role_that_its_author_lost(change, project, admin, member):
    boss = member("boss", Role.OWNER)
    invitation, secret = invite(project, boss, Role.OWNER, days=1, uses=5)
    assert find_invitation(secret) is not None
    membership = Membership.objects.filter(project=project, user=boss)
    if change == "demoted":
        membership.update(role=Role.ADMIN)
    elif change == "removed":
        membership.delete()
    else:
        User.objects.filter(pk=boss.pk).update(is_active=False)
    assert find_invitation(secret) is None
    invitation.refresh_from_db()
    with pytest.raises(DataError):
        join(invitation, User.objects.create_user("eve"))
    assert Client().get(f"/invite/{secret}").status_code == 404


def test_a_person_who_took_the_name_of_the_service_gets_no_rights(project, member):
    eve = member(served.SERVICE)
    eve.set_password("a long enough password")
    eve.save()
    served._token(project)
    assert Membership.objects.get(project=project, user=eve).role == Role.ANNOTATOR
    token = ApiToken.objects.get()
    assert (token.user.kind, token.user.has_usable_password()) == ("model", False)
    served._token(project)
    assert ApiToken.objects.filter(revoked_at=None).get().user == token.user


# --- texts


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("draft", {"choice": "1\0"}),
        ("draft", {"na\0me": "1"}),
        ("skip", {"reason": "a\0b"}),
        ("flag", {"reason": "a\0b"}),
        ("submit", {"choice": "\0"}),
    ],
)
def test_forms_with_nul_are_refused(action, fields, project, member, make_item, signed_in):
    """PostgreSQL stores no NUL: a page that passed it on failed there with 500."""
    make_item("q", "a", "b")
    ann = member("ann")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    address = f"/p/demo/assignments/{assignment.pk}/{action}"
    assert signed_in(ann).post(address, fields).status_code == 400
    assert not Response.objects.exists()


def test_answers_of_models_can_be_stored(project, make_item):
    text = storable("a\0b \ud800 \ud83d\ude00 ü")
    assert text == "a\ufffdb \ufffd \U0001f600 ü"
    item = make_item("q", text)
    assert item.places.get().candidate.text == text


# --- time


@pytest.mark.parametrize("unit", ["a-", "the a b c ", "my name is a ", "I'm "])
def test_an_answer_made_to_be_slow_is_searched_in_time(unit):
    """The first took 90 s for one answer: a bound, no figure of speed."""
    text = (unit * 20_000)[:20_000]
    begun = time.process_time()
    assert not names_itself(text, ["some-model"])
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("unit", ["[", "_a", "![", "**a", "\\"])
def test_guidelines_made_to_be_slow(unit):
    """The first took 45 s for each new version, on the page of every labeler."""
    text = (unit * 100_000)[:100_000]
    begun = time.process_time()
    assert unit in to_html(text)
    assert time.process_time() - begun < 10


def test_a_long_paragraph_is_shown_as_text_and_others_as_usual():
    long = "*a* <b> " * LONGEST
    html = to_html(f"*one*\n\n{long}\n\n*two*")
    assert "<em>one</em>" in html
    assert "<em>two</em>" in html
    assert "<em>a</em>" not in html
    assert "*a* &lt;b&gt;" in html


# --- trainings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ["x"]),
        ("name", {"a": 1}),
        ("name", 5),
        ("name", "a\0b"),
        ("name", "a\nb"),
        ("name", "x" * 101),
        ("members", True),
        ("seed", "--data"),
        ("seed", "many"),
        ("seed", 1.5),
        ("optim.lr", float("inf")),
        ("optim.lr", float("nan")),
        ("optim.lr", "--init"),
        ("dtype", "-x"),
        ("steps", "5 --data x"),
        ("steps", ["--data", "x"]),
        ("data", "x"),
        ("out", "x"),
    ],
)
def test_settings_of_a_training_that_would_reach_the_command_line(name, value):
    with pytest.raises(DataError, match=name.split(".")[0]):
        check_settings("reward", {name: value})


# --- files


def test_others_on_the_machine_read_nothing_of_the_site(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    environment = os.environ | {"OPENPALM_FEEDBACK_DIR": str(folder), "DATABASE_URL": ""}
    script = (
        "import os; os.umask(0)\n"
        "import django; django.setup()\n"
        "from django.db import connection\n"
        "connection.cursor().execute('CREATE TABLE x (y)')\n"
    )
    words = [sys.executable, "-c", script]
    subprocess.run(words, env=environment, check=True, timeout=60)
    for name in ("db.sqlite3", "secret_key", "snapshots", "uploads", "logs"):
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        assert not mode & 0o077, (name, oct(mode))
    made = tmp_path / "new"
    environment["OPENPALM_FEEDBACK_DIR"] = str(made)
    subprocess.run(words, env=environment, check=True, timeout=60)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_lease_of_a_removed_member_returns(project, member, make_item):
    make_item("q", "a", "b", needed=1)
    ann, ben = member("ann"), member("ben")
    assignment = queue.next_assignment(project, ann)
    assert assignment is not None
    Membership.objects.filter(user=ann).delete()
    client = Client()
    client.force_login(ann)
    address = f"/p/demo/assignments/{assignment.pk}/submit"
    assert client.post(address, {"choice": "1"}).status_code == 404
    Assignment.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    assert queue.next_assignment(project, ben) is not None
    assert not Response.objects.exists()
