"""Databases, sites and pages for the tests of the whole feedback application."""

import chromium
import postgresql as server
import pytest
from feedback_site import feedback_site
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
def database_url(request):
    """None for SQLite in the site's folder; an empty database of the server."""
    if request.param == "sqlite":
        yield None
        return
    with request.getfixturevalue("postgresql").database() as url:
        yield url


@pytest.fixture
def site(database_url, tmp_path):
    """A running `openpalm feedback` with an empty database of either kind."""
    with feedback_site(tmp_path / "site", database_url) as running:
        yield running


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
