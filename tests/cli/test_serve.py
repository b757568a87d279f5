"""`openpalm serve`: what is refused before it serves; tests/serve has the server."""

import socket
import sys

import pytest


@pytest.fixture(autouse=True)
def keyless(monkeypatch):
    for name in ("OPENPALM_API_KEY", "OPENPALM_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", 70000], "--port 70000: must be 0 (any free one) to 65535"),
        (["--slots", 0], "--slots 0: must be 1 or more"),
        (["--queue", -1], "--queue -1: must be 0 or more"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could use the model; give --api-key"),
        (["--host", "models.example"], "give --api-key"),
        (["--api-key", ""], "a key is empty"),
        (["--sink", "ftp://x", "--port", 0], "--sink ftp://x: must be an http:// or https:// URL"),
        (["--host", "192.0.2.1", "--api-key", "k", "--port", 0], "cannot listen there"),
    ],
)
def test_wrong_settings_are_one_line(said, run, words, says):
    status, output, errors = said("serve", run, *words)
    assert (status, output, len(errors)) == (2, "", 1)
    assert says in errors[0]


def test_a_port_in_use(said, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, errors = said("serve", run, "--port", port)
    assert status == 2
    assert f"--port {port}: cannot listen there (Address already in use)" in errors[0]


def test_no_such_run(said, tmp_path):
    status, _, errors = said("serve", tmp_path / "none", "--port", 0)
    assert status == 2
    assert str(tmp_path / "none") in errors[0]


def test_a_missing_extra_says_how_to_get_it(said, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, errors = said("serve", run)
    assert status == 2
    assert "uvicorn is missing; `pip install 'openpalm[serve]'`" in errors[0]
