"""Databases and pages for the tests of the whole feedback application."""

import chromium
import postgresql as server
import pytest
from requirements import POSTGRESQL, leave_out


@pytest.fixture(scope="session")
def postgresql():
    """A PostgreSQL server: `with postgresql.database() as url`."""
    reason = server.missing()
    if reason:
        leave_out(reason, POSTGRESQL)
    with server.postgresql_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def feedback_environment(request, tmp_path, monkeypatch):
    """The environment of a feedback application with an empty database of either kind.

    It is set in this process too, so that commands started by the test have it.
    """
    environment = {"OPENPALM_FEEDBACK_DIR": str(tmp_path / "feedback")}
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("OPENPALM_FEEDBACK_DIR", environment["OPENPALM_FEEDBACK_DIR"])
    if request.param == "sqlite":
        yield environment
        return
    with request.getfixturevalue("postgresql").database() as url:
        monkeypatch.setenv("DATABASE_URL", url)
        yield environment | {"DATABASE_URL": url}


@pytest.fixture
def visit(browser):
    """Opens a page in a fresh profile: `visit(url, **options of the profile)`.

    The test fails if one of its pages had an error, broke the content security policy or left the
    server's origin.
    """
    pages = chromium.Pages(browser)

    def open_page(url, **options):
        page = pages.open(url, **options)
        if options.get("java_script_enabled", True):
            settle(page)
        return page

    yield open_page
    assert pages.close() == []


@pytest.fixture(name="settle", scope="session")
def settle_fixture():
    """`settle(page)` waits until htmx has answered and swapped everything."""
    return settle


def settle(page):
    from playwright.sync_api import expect

    # Not wait_for_function: it evaluates a string, which the content security policy forbids.
    expect(page.locator(".htmx-request, .htmx-swapping, .htmx-settling")).to_have_count(0)
