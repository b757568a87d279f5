"""One tiny run for all tests that go through the command line, one browser for all of pages."""

import gc

import chromium
import pytest
import torch
from command_line import make_run
from requirements import BROWSER, leave_out


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    """Thousands of tests and modules live to the end: no garbage collector need look at them."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers alone, after others and on every machine."""
    torch.manual_seed(0)


def pytest_fixture_setup(fixturedef):
    """Shared fixtures too: what they draw must not depend on the tests before them."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with text.txt, data/, base/ and run/; tests leave them as they are."""
    return make_run(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def run(work):
    return work / "run"


@pytest.fixture
def said(capsys):
    """Runs a verb in this process: (status, output, error lines)."""
    from openpalm.cli.main import main

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        output, errors = capsys.readouterr()
        return status, output, errors.splitlines()

    return call


@pytest.fixture(scope="session")
def browser():
    """One for all suites: playwright's synchronous interface starts once in a process."""
    reason = chromium.missing()
    if reason:
        leave_out(reason, BROWSER)
    with chromium.launched() as found:
        yield found


@pytest.fixture(scope="session")
def axe(browser):
    """The source of axe-core."""
    return chromium.AXE.read_text(encoding="utf-8")
