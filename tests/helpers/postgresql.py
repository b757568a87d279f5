"""A private PostgreSQL server for tests: its own folder, port and password, removed at the end.

PostgreSQL refuses to run as root; for root it runs as the user `postgres` of the Debian package.
"""

import getpass
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ports import free_port

DEBIAN = Path("/usr/lib/postgresql")
"""has a folder of programs for each version, outside PATH"""
ROLE = "openpalm"
PASSWORD = "p@ss/word"
"""must be quoted in a URL, so that every test checks that it is unquoted again"""
STARTS_S = 120
"""after which a server that has not started never will: no bound on speed"""
TRIES = 5
"""another program may take the free port before the server does"""

# Ends the server and removes its folder as soon as standard input closes: also if the tests are
# killed and can tell nobody.
WATCH = 'read -r _; "$1/pg_ctl" -D "$2/data" -m immediate -s stop; rm -rf "$2"'


@dataclass
class Server:
    """A running server with a superuser ROLE."""

    folder: Path
    port: int
    names: Iterator[int] = field(default_factory=count)

    def url(self, database: str) -> str:
        """What DATABASE_URL holds, over TCP and with the password."""
        return f"postgresql://{ROLE}:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{database}"

    def socket_url(self, database: str) -> str:
        """The same over the Unix socket, without a password."""
        return f"postgresql://{ROLE}@{quote(str(self.folder), safe='')}:{self.port}/{database}"

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty database, which is dropped afterwards with all its connections."""
        name = f"test_{next(self.names)}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def log(self) -> str:
        """What the server has written, with every statement that changed a schema."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


def missing() -> str | None:
    """Why no server can be started here."""
    if not find_spec("psycopg"):
        return "no psycopg: pip install 'psycopg[binary]'"
    if not find_programs():
        return "no PostgreSQL server: install it (Debian, Ubuntu: apt-get install postgresql)"
    if os.geteuid() == 0 and not _unprivileged():
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


def find_programs(path: str | None = None, versions: Path = DEBIAN) -> Path | None:
    """The folder of `initdb` and `pg_ctl`: the one on `path` (else PATH), else Debian's newest."""
    found = shutil.which("initdb", path=path)
    newest = sorted(versions.glob("*/bin/initdb"), key=_version, reverse=True)
    folders = [Path(program).resolve().parent for program in [*([found] if found else []), *newest]]
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


def _version(program: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", program.parts[-3])]


@contextmanager
def postgresql_server(*, fsync: bool = False) -> Iterator[Server]:
    """Starts a server in a new folder. Without fsync it is faster and survives a crash of
    itself, not of the machine."""
    programs = find_programs()
    assert programs, missing()
    folder = Path(tempfile.mkdtemp(prefix="openpalm-postgresql-"))
    if os.geteuid() == 0:
        shutil.chown(folder, _unprivileged())
    with _watched(programs, folder):
        _run(folder, programs / "initdb", *_initial(folder))
        yield Server(folder, _start(programs, folder, fsync=fsync))


@contextmanager
def _watched(programs: Path, folder: Path) -> Iterator[None]:
    """Ends what runs in the folder and removes it, at the latest when this process is gone."""
    watcher = subprocess.Popen(
        ["sh", "-c", WATCH, "sh", str(programs), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal for the tests' process group does not reach it
        **_as_user(folder),
    )
    try:
        yield
    finally:
        watcher.communicate()


def _initial(folder: Path) -> list[str]:
    secret = folder / "password"
    secret.write_text(PASSWORD, encoding="utf-8")
    secret.chmod(0o644)  # initdb reads it as another user; nobody else enters the folder
    who = ["--username", ROLE, "--pwfile", str(secret), "--auth-local=trust"]
    how = ["--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
    return ["--pgdata", str(folder / "data"), *who, *how]


def _start(programs: Path, folder: Path, *, fsync: bool) -> int:
    """Starts the server. Returns its port."""
    log = folder / "log"
    settings = ["listen_addresses=127.0.0.1", "max_connections=200", "log_statement=ddl"]
    if not fsync:
        settings += ["fsync=off", "full_page_writes=off", "synchronous_commit=off"]
    options = " ".join(f"-c {setting}" for setting in settings)
    for attempt in range(1, TRIES + 1):
        port = free_port()
        words = ["-D", folder / "data", "-l", log, "-t", STARTS_S, "-s", "-w", "-o"]
        try:
            _run(folder, programs / "pg_ctl", *words, f"-p {port} -k {folder} {options}", "start")
            return port
        except AssertionError as error:
            said = log.read_text(encoding="utf-8") if log.exists() else ""
            if attempt == TRIES or "could not bind" not in said:
                raise AssertionError(f"{error}{said}") from None
            log.unlink()
    raise AssertionError


def _run(folder: Path, *words: object) -> None:
    # Into a file: a server would hold a pipe open, and the wait for its end would not return.
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            **_as_user(folder),
        )
        said.seek(0)
        assert done.returncode == 0, f"{words[0]}: {said.read().decode()}"


def _as_user(folder: Path) -> dict[str, Any]:
    """Options of a process: not root, and in a folder that its user may enter."""
    user = _unprivileged()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    options: dict[str, Any] = {"cwd": folder, "env": environment}
    if os.geteuid() == 0:
        options |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    return options


def _unprivileged() -> str:
    """The user that the server runs as; empty if there is none."""
    if os.geteuid() != 0:
        return getpass.getuser()
    return "postgres" if any(user.pw_name == "postgres" for user in pwd.getpwall()) else ""
