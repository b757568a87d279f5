"""The processes of docs/feedback-deployment.md from Debian's packages: PostgreSQL, gunicorn, the
worker and nginx with HTTPS, started by the script of examples/feedback/."""

import http.cookiejar
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import postgresql as server
import pytest
from ports import free_port, free_ports

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "feedback" / "run_processes.sh"
HANGS_S = 300
PORTS = ("HTTPS_PORT", "HTTP_PORT", "WEB_PORT", "POSTGRESQL_PORT")


@dataclass
class Deployed:
    folder: Path
    ports: dict[str, str]

    @property
    def url(self) -> str:
        return f"https://localhost:{self.ports['HTTPS_PORT']}"

    def browser(self) -> "Browser":
        """With cookies of its own; trusts the script's certificate only."""
        context = ssl.create_default_context(cafile=str(self.folder / "nginx" / "fullchain.pem"))
        return Browser(
            urllib.request.build_opener(
                urllib.request.HTTPSHandler(context=context),
                urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()),
            )
        )

    def sign_in(self, name: str, password: str, *, forged: str = "") -> str:
        """The page that follows."""
        browser = self.browser()
        form = browser.open(f"{self.url}/login").text
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', form)
        assert token
        fields = {"username": name, "password": password, "csrfmiddlewaretoken": token[1]}
        headers = {"Referer": f"{self.url}/login", "Origin": self.url}
        if forged:
            headers |= {"X-Forwarded-For": forged, "X-Real-IP": forged}
        body = urllib.parse.urlencode(fields).encode()
        return browser.open(f"{self.url}/login", body, **headers).text


class Answer(NamedTuple):
    status: int
    url: str
    headers: Mapping[str, str]
    text: str


@dataclass
class Browser:
    opener: urllib.request.OpenerDirector

    def open(self, url: str, body: bytes | None = None, **headers: str) -> Answer:
        request = urllib.request.Request(url, body, headers)
        try:
            answer = self.opener.open(request)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return Answer(answer.status, answer.url, answer.headers, answer.read().decode())


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


@pytest.fixture(scope="module")
def deployed():
    missing = [name for name in ("nginx", "psql", "openssl", "curl") if not shutil.which(name)]
    if missing or server.missing() or not server.DEBIAN.exists():
        pytest.skip(f"needs Debian's postgresql and nginx: {', '.join(missing)}")
    pytest.importorskip("gunicorn")
    # Not in pytest's own folder, which the user postgres may not enter.
    folder = Path(tempfile.mkdtemp(prefix="openpalm-deployment-"))
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    log = folder / "script.log"
    # The script runs openpalm and gunicorn by name; pytest may be started by its path alone.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | ports | {"PATH": path}
    with log.open("wb") as output:
        process = subprocess.Popen([SCRIPT, folder], stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + HANGS_S
        while "sign in as admin" not in log.read_text(encoding="utf-8"):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield Deployed(folder, ports)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=HANGS_S)
        shutil.rmtree(folder)


def test_it_answers_over_https(deployed):
    assert deployed.browser().open(f"{deployed.url}/healthz").text == '{"status": "ok"}'
    page = deployed.browser().open(f"{deployed.url}/login")
    assert page.headers["Strict-Transport-Security"].startswith("max-age=31536000")
    assert "Secure" in page.headers["Set-Cookie"]
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    style = deployed.browser().open(f"{deployed.url}/static/feedback/base.css")
    assert style.headers["Content-Type"].startswith("text/css")


def test_plain_http_is_sent_to_https(deployed):
    page = deployed.browser().open(f"http://localhost:{deployed.ports['HTTP_PORT']}/login")
    assert page.url == f"{deployed.url}/login"


def test_another_host_name_is_refused(deployed):
    assert deployed.browser().open(f"{deployed.url}/healthz", Host="evil.example").status == 400


def test_a_body_that_is_too_large_ends_at_nginx(deployed):
    body = b"x" * (4 * 2**20)
    try:
        answer = deployed.browser().open(f"{deployed.url}/login", body)
    except urllib.error.URLError:
        return  # the connection was closed before all of it was sent
    assert answer.status == 413
    assert "nginx" in answer.text


def test_the_administrator_signs_in(deployed):
    password = (deployed.folder / "admin.password").read_text(encoding="utf-8").strip()
    page = deployed.sign_in("admin", password)
    assert "Sign out" in page
    assert "New project" in page


def test_invented_addresses_do_not_end_the_wait(deployed):
    """The list of failures has the visitor's address as nginx saw it, whatever the header said."""
    # The wait doubles with each failure, so one of these comes too early however slow this is.
    pages = (deployed.sign_in("nobody", "wrong", forged=f"198.51.100.{n}") for n in range(20))
    assert any("Too many failed attempts" in page for page in pages)
    assert _addresses(deployed) == {"127.0.0.1"}


def _database_url(deployed) -> str:
    password = (deployed.folder / "password").read_text(encoding="utf-8").strip()
    port = deployed.ports["POSTGRESQL_PORT"]
    return f"postgresql://openpalm:{password}@127.0.0.1:{port}/feedback"


def _addresses(deployed) -> set[str]:
    import psycopg

    with psycopg.connect(_database_url(deployed)) as connection:
        rows = connection.execute("SELECT DISTINCT address FROM feedback_loginfailure").fetchall()
    return {row[0] for row in rows}


def _environment(deployed) -> dict[str, str]:
    return os.environ | {
        "OPENPALM_FEEDBACK_DIR": str(deployed.folder / "feedback"),
        "OPENPALM_FEEDBACK_HOSTS": "localhost",
        "OPENPALM_FEEDBACK_HTTPS": "1",
        "DATABASE_URL": _database_url(deployed),
    }


def test_the_web_process_of_openpalm_believes_the_proxy_too(deployed):
    """waitress drops what proxies say unless it is set up to trust them: an endless redirect."""
    port = free_port()
    words = [sys.executable, "-m", "openpalm", "feedback", "web", "--port", str(port)]
    words += ["--dir", str(deployed.folder / "feedback")]
    process = subprocess.Popen(words, env=_environment(deployed))
    try:
        browser, url = deployed.browser(), f"http://localhost:{port}/login"
        headers = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "198.51.100.1, 203.0.113.7"}
        page = _patiently(lambda: browser.open(url, **headers))
        assert (page.status, page.url) == (200, url)
        # Not followed: nothing speaks HTTPS there, and the web process would wait for a request.
        plain = Browser(urllib.request.build_opener(NoRedirects)).open(url)
        assert (plain.status, plain.headers["Location"]) == (301, url.replace("http", "https", 1))
    finally:
        process.terminate()
        process.wait(timeout=HANGS_S)


def _patiently(visit):
    deadline = time.monotonic() + HANGS_S
    while True:
        try:
            return visit()
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_django_finds_the_deployment_safe(deployed):
    words = ["-m", "openpalm", "feedback", "manage", "check", "--deploy", "--fail-level", "WARNING"]
    done = subprocess.run(
        [sys.executable, *words], env=_environment(deployed), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
