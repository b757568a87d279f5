"""A server that the tests of this folder leave as it was, and an empty folder."""

import pytest
from servers import serving

ADMIN = "boss"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def server(work):
    environment = {"OPENPALM_ADMIN_KEY": ADMIN, "RUST_BACKTRACE": "0"}
    with serving(
        work / "base", "--dtype", "float32", "--max-sequences", 8, env=environment
    ) as running:
        yield running


@pytest.fixture
def call(server):
    """Calls the server as its administrator; it must be idle again after the test."""
    yield lambda path, body=None: server.call(path, body, key=ADMIN)
    server.wait_idle()
