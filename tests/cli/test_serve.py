"""`openpalm serve`: settings refused at start; tests/serve tests the server."""

import json
import shutil
import socket
import sys

import pytest
from adapters import ALL, write_adapter
from command_line import write_base

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.serve import ServeSettings
from openpalm.errors import SettingsError


@pytest.fixture(autouse=True)
def keyless(monkeypatch):
    for name in ("OPENPALM_API_KEY", "OPENPALM_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", 70000], "--port 70000: must be 0 (any free one) to 65535"),
        (["--max-sequences", 0], "--max-sequences 0: must be 1 or more"),
        (["--max-queue", -1], "--max-queue -1: must be 0 or more"),
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: anyone on the network could use the model",
        ),
        (["--host", "models.example"], "give --api-key"),
        (["--api-key", ""], "--api-key (or OPENPALM_API_KEY): the key is empty"),
        (["--api-key", "two words"], "the key has a character that callers cannot send"),
        (["--admin-key", "schlüssel"], "--admin-key (or OPENPALM_ADMIN_KEY): the key has a"),
        (["--api-key", '["good", "b\\nad"]'], "key 2 of 2 has a character"),
        (["--api-key", "[]"], "the list is empty"),
        (["--allow-origin", "web.example"], "--allow-origin web.example: must be * or a site like"),
        (["--allow-origin", "https://web.example/page"], "without a path"),
        (["--allow-origin", "ftp://web.example"], "must be * or a site"),
        (["--allow-origin", "https://web.example:x"], "must be * or a site"),
        (
            ["--conversation-url", "ftp://x", "--port", 0],
            "--conversation-url ftp://x: must be an http:// or https:// URL",
        ),
        (["--adapter", "one=a", "--adapter", "b/one"], "--adapter b/one: another model is named"),
        (["--adapter", "a/run"], "--adapter a/run: another model is named 'run'"),
        (["--adapter", "maths="], "--adapter 'maths=': give NAME=PATH, or PATH"),
        (["--host", "192.0.2.1", "--api-key", "k", "--port", 0], "cannot listen there"),
    ],
)
def test_wrong_settings_are_one_line(said, run, words, says):
    status, output, errors = said("serve", run, *words)
    assert (status, output, len(errors)) == (2, "", 1)
    assert says in errors[0]


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ("sesame\n", ["sesame"]),
        (" sesame ", ["sesame"]),
        ('["one", "two\\n"]', ["one", "two"]),
        ('\n["one"]\n', ["one"]),
    ],
)
def test_keys_of_the_environment(monkeypatch, given, keys):
    monkeypatch.setenv("OPENPALM_API_KEY", given)
    assert ServeSettings("run").keys == keys


@pytest.mark.parametrize("given", ["", " \n", "[", '["a", 1]', "[1]", '["a", ""]', "clé"])
def test_invalid_keys_of_the_environment(monkeypatch, given):
    monkeypatch.setenv("OPENPALM_API_KEY", given)
    with pytest.raises(SettingsError, match="OPENPALM_API_KEY"):
        ServeSettings("run")


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("*", "*"),
        ("https://web.example/", "https://web.example"),
        ("HTTPS://Web.Example", "https://web.example"),
        ("https://web.example:443", "https://web.example"),
        ("http://web.example:80/", "http://web.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("http://[::1]:5000", "http://[::1]:5000"),
    ],
)
def test_origins_are_written_as_browsers_do(given, origin):
    """As of the fetch standard: lower case, punycode, no usual port, no slash."""
    assert ServeSettings("run", allow_origin=given).origins == [origin]


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


def test_a_missing_package_names_the_extra(said, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, errors = said("serve", run)
    assert status == 2
    assert "uvicorn is missing; `pip install 'openpalm[serve]'`" in errors[0]


def test_adapters_have_the_names_of_their_runs():
    given = ["maths=runs/a", "runs/b/checkpoints/step-00000010", "runs/c/step-2/adapter", "d/lr=1"]
    settings = ServeSettings("run", adapter=given)
    assert settings.adapters == {
        "maths": "runs/a",
        "b": "runs/b/checkpoints/step-00000010",
        "c": "runs/c/step-2/adapter",
        "lr=1": "d/lr=1",
    }
    assert ServeSettings("run", adapter="poetry").adapters == {"poetry": "poetry"}


def test_adapters_that_do_not_fit_are_one_line(said, run, tmp_path):
    write_adapter(tmp_path / "larger", write_base(tmp_path / "other", context=64), ALL, 0)
    stamp = tmp_path / "larger" / "adapter_config.json"
    cases = {
        "larger": "...); --force uses it anyway",
        "none": "none: no such directory",
    }
    cases["run"] = "lists no adapter/adapter_config.json"
    shutil.copytree(checkpoint.resolve(run), tmp_path / "run")
    for name, says in cases.items():
        words = ("--adapter", f"x={tmp_path / name}", "--port", 0)
        status, output, errors = said("serve", run, *words)
        assert (status, output, len(errors)) == (2, "", 1)
        assert says in errors[0]
    content = json.loads(stamp.read_text(encoding="utf-8")) | {"r": 3}
    stamp.write_text(json.dumps(content), encoding="utf-8")
    words = ("--adapter", f"x={tmp_path / 'larger'}", "--port", 0, "--force")
    status, _, errors = said("serve", run, *words)
    assert (status, len(errors)) == (2, 2)  # the second line is the warning of --force
    assert "an adapter of another model" in errors[-1]
