"""Guessing passwords: delays by name and by address, the same for names that do not exist."""

from datetime import timedelta

import pytest
from django.contrib.auth import hashers
from django.core.exceptions import ImproperlyConfigured
from django.test import Client
from django.utils import timezone

from openpalm.feedback import settings as site_settings
from openpalm.feedback.accounts import throttle
from openpalm.feedback.models import LoginFailure

PASSWORD = "a long enough password"


def sign_in(name, password, address="203.0.113.7", client=None, **headers):
    form = {"username": name, "password": password}
    return (client or Client()).post("/login", form, REMOTE_ADDR=address, **headers)


def wait_long(address):
    """More failures, so that the wait does not end while a slow machine runs the test."""
    for n in range(8):
        throttle.begin_attempt(f"further-{n}", address)


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
    wait_long("198.51.100.1")
    assert b"Too many" in sign_in("root", PASSWORD, "198.51.100.1").content
    assert sign_in("root", PASSWORD, "198.51.100.2").status_code == 302


def test_visitors_behind_a_proxy_on_this_machine_are_not_one_address(admin):
    for n in range(throttle.FREE_BY_ADDRESS):
        sign_in(f"name-{n}", "wrong", "127.0.0.1")
    assert sign_in("root", PASSWORD, "127.0.0.1").status_code == 302


PEER, FORGED = "203.0.113.7", "6.6.6.6, 7.7.7.7"


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "address"),
    [
        (0, PEER, None, PEER),
        (0, PEER, FORGED, PEER),
        (1, "127.0.0.1", "1.2.3.4", "1.2.3.4"),
        (1, "127.0.0.1", f"{FORGED}, 1.2.3.4", "1.2.3.4"),
        (1, "127.0.0.1", f"{FORGED},, 1.2.3.4 ", "1.2.3.4"),
        (1, "", "1.2.3.4", "1.2.3.4"),  # the proxy comes through a Unix socket
        (2, "10.0.0.2", "1.2.3.4, 10.0.0.1", "1.2.3.4"),
        (2, "10.0.0.2", f"{FORGED}, 1.2.3.4, 10.0.0.1", "1.2.3.4"),
        (2, "10.0.0.2", "6.6.6.6", "10.0.0.2"),  # did not pass both
        (1, "10.0.0.2", None, "10.0.0.2"),
        (1, "127.0.0.1", "not an address", "unknown"),
        (0, "2001:db8:1:2:3:4:5:6", None, "2001:db8:1:2::/64"),
        (0, "", None, "unknown"),
    ],
)
def test_the_address_of_a_visitor(rf, settings, proxies, peer, forwarded, address):
    """A visitor can write X-Forwarded-For, but not the entries that our proxies add at its end."""
    settings.FEEDBACK_PROXIES = proxies
    headers = {} if forwarded is None else {"HTTP_X_FORWARDED_FOR": forwarded}
    request = rf.get("/login", REMOTE_ADDR=peer, **headers)
    assert throttle.address_of(request) == address


def test_forged_addresses_do_not_escape_the_wait(admin, settings):
    """Each guess names another visitor; the proxy's own entry stays the same."""
    settings.FEEDBACK_PROXIES = 1
    for n in range(throttle.FREE_BY_ADDRESS):
        sign_in(f"name-{n}", "wrong", "127.0.0.1", HTTP_X_FORWARDED_FOR=f"10.1.1.{n}, 198.51.100.1")
    assert set(LoginFailure.objects.values_list("address", flat=True)) == {"198.51.100.1"}
    wait_long("198.51.100.1")
    last = {"HTTP_X_FORWARDED_FOR": "10.1.1.99, 198.51.100.1"}
    assert b"Too many" in sign_in("root", PASSWORD, "127.0.0.1", **last).content


@pytest.mark.parametrize(
    ("https", "text", "proxies"),
    [(False, "", 0), (True, "", 1), (False, "1", 1), (True, " 2 ", 2)],
)
def test_the_number_of_proxies(monkeypatch, https, text, proxies):
    monkeypatch.setattr(site_settings, "HTTPS", https)
    monkeypatch.setenv("OPENPALM_FEEDBACK_PROXIES", text)
    assert site_settings._proxies() == proxies


@pytest.mark.parametrize(("https", "text"), [(True, "0"), (False, "-1"), (False, "x"), (True, "²")])
def test_a_number_of_proxies_that_cannot_be(monkeypatch, https, text):
    monkeypatch.setattr(site_settings, "HTTPS", https)
    monkeypatch.setenv("OPENPALM_FEEDBACK_PROXIES", text)
    with pytest.raises(ImproperlyConfigured, match=f"OPENPALM_FEEDBACK_PROXIES={text}"):
        site_settings._proxies()


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
