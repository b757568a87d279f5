"""The private PostgreSQL server of these tests."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import postgresql as helper
import pytest

HANGS_S = 60

STARTS_AND_WAITS = """
import sys
from postgresql import postgresql_server

with postgresql_server() as server:
    print(server.folder, server.port, flush=True)
    sys.stdin.read()
"""


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def rows(url: str, statement: str) -> list[tuple]:
    import psycopg

    with psycopg.connect(url) as connection:
        return connection.execute(statement).fetchall()


def test_a_database_is_empty_its_own_and_dropped(postgresql):
    import psycopg

    with postgresql.database() as first, postgresql.database() as second:
        open_still = psycopg.connect(first)
        open_still.execute("CREATE TABLE kept (text TEXT)")
        open_still.execute("INSERT INTO kept VALUES ('é ☃')")
        open_still.commit()
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        assert rows(first, "SELECT text FROM kept") == [("é ☃",)]
        assert rows(first, tables) == [("kept",)]
        assert rows(second, tables) == []
    open_still.close()
    names = [
        name for (name,) in rows(postgresql.url("postgres"), "SELECT datname FROM pg_database")
    ]
    assert sorted(names) == ["postgres", "template0", "template1"]


def test_the_socket_leads_to_the_same_database(postgresql):
    with postgresql.database() as url:
        by_socket = postgresql.socket_url(url.rpartition("/")[2])
        where = "SELECT current_database(), inet_client_addr() IS NULL"
        [(by_tcp, local)], [(name, socket_local)] = rows(url, where), rows(by_socket, where)
    assert by_tcp == name
    assert (local, socket_local) == (False, True)


def test_tcp_asks_for_the_password(postgresql):
    import psycopg

    wrong = postgresql.url("postgres").replace("p%40ss", "guess")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)


def test_the_server_does_not_survive_its_tests(postgresql):
    """Killed tests stop nothing themselves."""
    child = subprocess.Popen(
        [sys.executable, "-c", STARTS_AND_WAITS],
        cwd=Path(helper.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder, port = child.stdout.readline().split()
    assert answers(int(port))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    deadline = time.monotonic() + HANGS_S
    while Path(folder).exists():
        assert time.monotonic() < deadline, "the server's folder is still there"
        time.sleep(0.05)
    assert not answers(int(port))


def test_nothing_is_left_after_the_server(postgresql):
    with helper.postgresql_server(fsync=True) as server:
        assert rows(server.url("postgres"), "SHOW fsync") == [("on",)]
        assert rows(postgresql.url("postgres"), "SHOW fsync") == [("off",)]
    assert not server.folder.exists()
    assert not answers(server.port)
