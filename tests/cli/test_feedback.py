"""`openpalm feedback` as a user starts it: one line when it is ready or cannot be."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from command_line import program
from feedback_site import children_of

from openpalm.cli.serve import ServeSettings
from openpalm.cli.serve_feedback import options

CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("OPENPALM_") and name != "DATABASE_URL"
}


@contextmanager
def started(folder: Path, *words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its ready line."""
    given = ["--port", "0", "--dir", folder, *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "openpalm", "feedback", *map(str, given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=600)


def url_in(line: str) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line
    return found[0]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_one_command_runs_the_site_and_its_worker(tmp_path):
    """Ready line, first sign-up, a killed web process without a refused request, a clean end."""
    with started(tmp_path / "site") as (process, line):
        url = url_in(line)
        assert line == f"feedback: {url}/; Ctrl-C ends it\n"
        signs_up = process.stdout.readline()
        setup = re.search(r"administrator: (http\S+/setup\?token=[0-9a-f]{32})\n$", signs_up)[1]
        with urllib.request.urlopen(setup) as page:
            assert page.status == 200
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}/setup?token=wrong")
        assert caught.value.code == 403
        caught.value.close()
        children = children_of(process.pid)
        assert set(children) == {"web", "worker"}
        os.kill(children["web"], signal.SIGKILL)
        with urllib.request.urlopen(f"{url}/healthz", timeout=600) as answer:
            assert json.load(answer) == {"status": "ok"}
        assert children_of(process.pid)["web"] != children["web"]
        children = children_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0
    said = [line for line in errors.splitlines() if line.startswith("openpalm: ")]
    assert said == ["openpalm: the web process was ended by SIGKILL; it starts again in 0.5 s"]
    for pid in children.values():
        assert not Path(f"/proc/{pid}").exists()


def refused(*words: object, **environment: str) -> str:
    """The one line of a command that cannot run."""
    done = program("feedback", *words, env=CLEAN | environment)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("openpalm: error: ")


def test_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("--port", port, "--dir", tmp_path / "site")
    assert line == (
        f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use); try "
        "another --port"
    )


@pytest.mark.parametrize("option", ["--port", "--feedback-port"])
def test_serve_names_the_option_of_the_port_in_use_before_it_does_anything(tmp_path, option):
    (tmp_path / "run").mkdir()
    other = {"--port": "--feedback-port", "--feedback-port": "--port"}[option]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--feedback", "--feedback-dir", tmp_path / "site", option, port, other, 0]
        done = program("serve", tmp_path / "run", *words, env=CLEAN)
    assert done.returncode == 2
    assert done.stderr == (
        f"openpalm: error: --host 127.0.0.1 {option} {port}: cannot listen there (Address already "
        f"in use); try another {option}\n"
    )
    assert not (tmp_path / "site").exists()


def test_serve_with_feedback_names_a_run_that_is_missing(tmp_path):
    done = program("serve", tmp_path / "none", "--feedback", env=CLEAN)
    assert done.returncode == 2
    assert done.stderr.startswith(f"openpalm: error: {tmp_path / 'none'}: no run or checkpoint")


def test_an_address_of_the_network_needs_names(tmp_path):
    line = refused("--host", "0.0.0.0", "--port", 0, "--dir", tmp_path / "site")
    assert line.startswith("--host 0.0.0.0: other machines reach the site there")
    assert "OPENPALM_FEEDBACK_HOSTS" in line


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://nobody:secret@127.0.0.1:9/x", "the database cannot be used"),
        ("oracle-of-delphi://x", "must be postgresql://"),
        ("mysql://root:secret@127.0.0.1/x", "must be postgresql://"),
        ("bogus", "must be postgresql://"),
    ],
)
def test_a_database_that_cannot_be_used(tmp_path, url, words):
    line = refused("--port", 0, "--dir", tmp_path / "site", "--database-url", url)
    assert line.startswith("DATABASE_URL: ")
    assert words in line
    assert "secret" not in line


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = program("feedback", "--port", 0, "--dir", tmp_path / "file" / "site", env=CLEAN)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(r"openpalm: error: --dir \S+/file/site: cannot be written \(", line)


def test_an_export_makes_no_site_and_the_folder_may_come_from_the_environment(tmp_path):
    folder = tmp_path / "mistyped"
    line = refused("export", "demo", "--out", tmp_path / "x", OPENPALM_FEEDBACK_DIR=str(folder))
    assert line.startswith(f"--dir {folder}: has no database of a site; name the folder")
    assert not folder.exists()


def test_a_command_on_a_database_without_tables_is_one_line(tmp_path):
    words = ["manage", "create_token", "ada", "--scopes", "items:read"]
    line = refused(*words, OPENPALM_FEEDBACK_DIR=str(tmp_path / "site"))
    assert line.endswith("`openpalm feedback manage migrate` makes its tables")


def test_one_process_alone_needs_the_tables(tmp_path):
    for part in ("web", "worker"):
        words = [part, "--dir", tmp_path / "site", "--port", 0]
        assert refused(*words) == (
            "the database is not of this version; run `openpalm feedback manage migrate` first"
        )


def test_a_database_of_a_newer_version_is_left_alone(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    with closing(sqlite3.connect(folder / "db.sqlite3")) as database, database:
        database.execute("CREATE TABLE django_migrations (id INTEGER, app, name, applied)")
        row = (1, "feedback", "0009_later", "2030-01-01")
        database.execute("INSERT INTO django_migrations VALUES (?, ?, ?, ?)", row)
    wanted = (
        "the database is of a newer version (it has feedback.0009_later); install that version "
        "again, or go back to the backup that was made before the upgrade"
    )
    for words in (["--port", "0"], ["worker"], ["manage", "migrate"]):
        assert refused(*words, OPENPALM_FEEDBACK_DIR=str(folder)) == wanted
    with closing(sqlite3.connect(folder / "db.sqlite3")) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert tables == [("django_migrations",)]


def test_a_file_that_is_no_database_is_one_line(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "db.sqlite3").write_text("notes on the database\n" * 100, encoding="utf-8")
    line = refused("--port", "0", OPENPALM_FEEDBACK_DIR=str(folder))
    assert line.startswith(f"--dir {folder}: its database cannot be used (file is not a database)")


def test_a_missing_driver_of_postgresql_is_one_line(tmp_path):
    hide = tmp_path / "hide"
    for name in ("psycopg", "psycopg2"):
        (hide / name).mkdir(parents=True)
        (hide / name / "__init__.py").write_text("raise ImportError('no module')")
    path = os.pathsep.join([str(hide), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = refused(
        "--port",
        0,
        "--dir",
        tmp_path / "site",
        "--database-url",
        "postgresql://h/x",
        PYTHONPATH=path,
    )
    assert line.startswith("DATABASE_URL: names PostgreSQL, but its driver is missing; pip install")


def test_the_options_that_the_model_server_gets():
    given = ServeSettings(
        path="runs/chat",
        feedback=True,
        feedback_port=9000,
        api_key="secret",
        admin_key="secret",
        adapter=["a=b"],
        max_queue=7,
        force=True,
        name="chat",
    )
    words = ["--force", "true", "--adapter", '["a=b"]', "--max-queue", "7"]
    assert sorted(options(given)) == sorted(words)
    # The adapters were made for the model of the command line, not for a promoted one.
    assert "--adapter" not in options(given, "runs/promoted")
    assert "secret" not in str(options(given))
