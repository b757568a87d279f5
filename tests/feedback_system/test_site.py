"""`openpalm feedback` in its own process, with either database."""

import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from feedback_site import HANGS_S, children_of


def test_a_killed_site_keeps_what_it_stored_and_leaves_no_process(site):
    site.manage("shell", "-c", MAKE_PROJECT)
    children = children_of(site.process.pid)
    site.kill()
    if sys.platform == "linux":  # which tells children of a killed parent
        assert set(children) == {"web", "worker"}
        while any(Path(f"/proc/{pid}").exists() for pid in children.values()):
            time.sleep(0.05)
    assert not site.is_healthy()
    site.start()
    assert site.is_healthy()
    assert site.manage("shell", "-c", LIST_PROJECTS).splitlines()[-1] == "['kept é']"
    in_postgresql = "DATABASE_URL" in site.environment
    assert (site.folder / "db.sqlite3").exists() is not in_postgresql


def test_a_terminated_site_finishes_a_request_and_leaves_no_traceback(site):
    """A slow upload is answered although SIGTERM came before its end."""
    with socket.create_connection(("127.0.0.1", site.port)) as client:
        head = "POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\n\r\na="
        client.sendall(head.encode())
        time.sleep(0.5)  # until the process has read the beginning
        site.process.send_signal(signal.SIGTERM)
        threading.Timer(1.0, client.sendall, [b"bc"]).start()
        status = client.makefile().readline()
    assert re.match(r"HTTP/1\.1 \d{3} ", status)
    assert site.process.wait(HANGS_S) == 0
    assert "Traceback" not in site.said()


def test_nobody_enters_before_the_first_administrator(site, visit):
    page = visit(site.url)
    assert page.url.startswith(f"{site.url}/setup")


MAKE_PROJECT = """
from openpalm.feedback.models import Project
Project.objects.create(slug="kept", name="kept é")
"""
LIST_PROJECTS = """
from openpalm.feedback.models import Project
print([project.name for project in Project.objects.all()])
"""
