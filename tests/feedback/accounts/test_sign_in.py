"""Guessing passwords: delays by name and by address, the same for names that do not exist."""

from datetime import timedelta

import pytest
from django.contrib.auth import hashers
from django.test import Client
from django.utils import timezone

from openpalm.feedback.accounts import throttle
from openpalm.feedback.models import LoginFailure

PASSWORD = "a long enough password"


def sign_in(name, password, address="203.0.113.7", client=None):
    form = {"username": name, "password": password}
    return (client or Client()).post("/login", form, REMOTE_ADDR=address)


def test_after_five_failures_the_right_password_must_wait_too(admin):
    for _ in range(throttle.FREE):
        assert b"do not match" in sign_in("root", "wrong").content
    refused = sign_in("root", PASSWORD)
    assert b"Too many failed attempts. Wait " in refused.content
    assert "_auth_user_id" not in refused.client.session
    LoginFailure.objects.update(created_at=timezone.now() - timedelta(seconds=2))
    assert sign_in("root", PASSWORD).status_code == 302
    assert not LoginFailure.objects.exists(), "a success forgets the failures"


def test_the_delay_doubles_up_to_a_quarter_of_an_hour(admin):
    waits = []
    for _ in range(30):
        throttle.begin_attempt("root", "203.0.113.7")
        waits.append(throttle.seconds_to_wait("root", "203.0.113.7"))
    assert waits[:8] == [0, 0, 0, 0, 1, 2, 4, 8]
    assert waits[-1] == throttle.LONGEST.total_seconds()


def test_an_attempt_that_comes_too_early_is_not_checked(admin, monkeypatch):
    for _ in range(throttle.FREE):
        sign_in("root", "wrong")
    monkeypatch.setattr(hashers, "check_password", None)
    before = LoginFailure.objects.count()
    assert b"Too many" in sign_in("root", PASSWORD).content
    assert LoginFailure.objects.count() == before, "waiting does not lengthen the delay"


def test_unknown_names_get_the_same_answers(admin):
    def answers(name):
        return [
            sign_in(name, "wrong").content.decode().replace(name, "NAME").split("<main")[1]
            for _ in range(throttle.FREE + 1)
        ]

    def without_token(page):
        return [line for line in page.splitlines() if "csrfmiddlewaretoken" not in line]

    known, unknown = answers("root"), answers("nobody")
    assert list(map(without_token, known)) == list(map(without_token, unknown))


def test_unknown_names_take_one_hash_as_known_ones_do(admin, settings, monkeypatch):
    made = []
    hasher = hashers.get_hasher()
    encode = type(hasher).encode
    monkeypatch.setattr(type(hasher), "encode", lambda *a: made.append(1) or encode(*a))
    sign_in("root", "wrong")
    known = len(made)
    sign_in("nobody", "wrong")
    assert known == len(made) - known == 1


def test_one_address_guessing_for_many_names_must_wait(admin):
    for n in range(throttle.FREE_BY_ADDRESS):
        sign_in(f"name-{n}", "wrong", "198.51.100.1")
    assert b"Too many" in sign_in("root", PASSWORD, "198.51.100.1").content
    assert sign_in("root", PASSWORD, "198.51.100.2").status_code == 302


def test_visitors_behind_a_proxy_on_this_machine_are_not_one_address(admin):
    for n in range(throttle.FREE_BY_ADDRESS):
        sign_in(f"name-{n}", "wrong", "127.0.0.1")
    assert sign_in("root", PASSWORD, "127.0.0.1").status_code == 302


@pytest.mark.parametrize(
    ("https", "meta", "address"),
    [
        (False, {"REMOTE_ADDR": "203.0.113.7", "HTTP_X_FORWARDED_FOR": "1.2.3.4"}, "203.0.113.7"),
        (True, {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "6.6.6.6, 1.2.3.4"}, "1.2.3.4"),
        (False, {"REMOTE_ADDR": "2001:db8:1:2:3:4:5:6"}, "2001:db8:1:2::/64"),
        (False, {"REMOTE_ADDR": ""}, "unknown"),
    ],
)
def test_the_address_of_a_visitor(rf, settings, https, meta, address):
    """A visitor can write X-Forwarded-For, but not the entry of the proxy, which is the last."""
    settings.HTTPS = https
    assert throttle.address_of(rf.get("/login", **meta)) == address


def test_attempts_that_arrive_together_all_count(admin):
    """Each is counted before its password is checked, so none slips through while others wait."""
    for _ in range(throttle.FREE):
        throttle.begin_attempt("root", "203.0.113.7")  # being checked by other processes
    assert b"Too many" in sign_in("root", PASSWORD).content


def test_guessing_the_old_password_in_a_stolen_session_is_slowed_too(admin, signed_in):
    client = signed_in(admin)
    new = "another quite long password"
    form = {"old_password": "wrong", "new_password1": new, "new_password2": new}
    for _ in range(throttle.FREE):
        client.post("/account/password", form, REMOTE_ADDR="203.0.113.7")
    right = form | {"old_password": PASSWORD}
    page = client.post("/account/password", right, REMOTE_ADDR="203.0.113.7")
    assert b"Too many failed attempts" in page.content
    admin.refresh_from_db()
    assert admin.check_password(PASSWORD)


def test_failures_of_api_tokens_do_not_keep_people_out(admin):
    for _ in range(100):
        LoginFailure.objects.create(name=throttle.NOT_COUNTED, address="203.0.113.7")
    assert sign_in("root", PASSWORD).status_code == 302
