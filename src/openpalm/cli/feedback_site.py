"""Prepares the feedback site for the command line, and lists its processes.

Shared by `openpalm feedback` and `openpalm serve --feedback`. What is wrong with the database, the
folder or the address is one line here, before a process starts.
"""

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openpalm.errors import SettingsError, StorageError, one_line
from openpalm.feedback.supervisor import Child, answers
from openpalm.feedback.web import SOCKET_VARIABLE, listener
from openpalm.feedback.worker.processes import PROGRAM

PORT_WAIT_S = 3.0
DATABASE_FILE = "db.sqlite3"
DRIVERS = "pip install 'psycopg[binary]'"


@dataclass(frozen=True)
class Site:
    """Where the site listens and keeps its files."""

    host: str
    port: int
    dir: str
    database_url: str | None = None
    port_option: str = "--port"
    """the option that an error about the port names"""

    def check_host(self) -> None:
        """Raises SettingsError for an address of the network without the names it answers to."""
        if is_loopback(self.host) or os.environ.get("OPENPALM_FEEDBACK_HOSTS"):
            return
        raise SettingsError(
            f"--host {self.host}: other machines reach the site there; say by which names in "
            "OPENPALM_FEEDBACK_HOSTS=palm.example,10.0.0.5, or listen at 127.0.0.1"
        )

    def set_environment(self, more: Mapping[str, str] | None = None) -> None:
        """For the settings of this process and of its children."""
        os.environ["OPENPALM_FEEDBACK_DIR"] = str(Path(self.dir).absolute())
        if self.database_url:
            os.environ["DATABASE_URL"] = self.database_url
        os.environ |= dict(more or {})

    def check_database(self) -> None:
        """Raises SettingsError if there is none: a command that reads it must not make one."""
        given = self.database_url or os.environ.get("DATABASE_URL")
        if not given and not (Path(self.dir) / DATABASE_FILE).is_file():
            raise SettingsError(
                f"--dir {self.dir}: has no database of a site; name the folder that `openpalm "
                "feedback` uses, or set DATABASE_URL"
            )

    def listen(self) -> socket.socket:
        """Raises SettingsError if the port is in use."""
        # The web process of a command that was killed needs a moment to end.
        deadline = time.monotonic() + PORT_WAIT_S
        while True:
            try:
                return listener(self.host, self.port)
            except (OSError, OverflowError) as error:
                number = getattr(error, "errno", None)
                if number != errno.EADDRINUSE or time.monotonic() > deadline:
                    reason = os.strerror(number) if number and number > 0 else str(error)
                    raise SettingsError(
                        f"--host {self.host} {self.port_option} {self.port}: cannot listen there "
                        f"({reason}); try another {self.port_option}"
                    ) from None
            time.sleep(0.1)


def folder_of(given: str | None) -> str:
    """The folder of the site: --dir, OPENPALM_FEEDBACK_DIR or feedback."""
    return given or os.environ.get("OPENPALM_FEEDBACK_DIR") or "feedback"


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_installed() -> None:
    """Raises SettingsError if the packages are missing."""
    try:
        import django
        import django_htmx
        import waitress
        import whitenoise
    except ImportError as error:
        raise SettingsError(
            f"{error.name} is missing; `pip install 'openpalm[feedback]'` installs the packages "
            "that collecting feedback needs"
        ) from None
    del django, django_htmx, waitress, whitenoise


def open_database(*, migrate: bool = True, current: bool = True) -> None:
    """Starts Django and brings the tables up to date, or checks that they are `current`.

    Raises SettingsError or StorageError.
    """
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "openpalm.feedback.settings")
    folder = os.environ.get("OPENPALM_FEEDBACK_DIR", "feedback")
    import django
    from django.core.exceptions import ImproperlyConfigured
    from django.db import Error

    try:
        django.setup()
        from openpalm.feedback.manage_command import manage

        check_not_newer()
        if migrate:
            manage(["migrate", "--verbosity", "0"])
        elif current and _lacks_tables():
            raise SettingsError(
                "the database is not of this version; run `openpalm feedback manage migrate` first"
            )
    except ImproperlyConfigured as error:
        text = one_line(error)
        if "psycopg" in text:
            raise SettingsError(
                f"DATABASE_URL: names PostgreSQL, but its driver is missing; {DRIVERS}"
            ) from None
        raise SettingsError(text) from None
    except Error as error:
        raise SettingsError(_unreachable(error)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"--dir {folder}: cannot be written ({reason}); choose another folder"
        ) from None


def check_not_newer() -> None:
    """Raises SettingsError if a later version of openpalm made the tables, or of Django its own.

    It would run until a page needs what the later version has changed.
    """
    from django.db import connection
    from django.db.migrations.loader import MigrationLoader

    loader = MigrationLoader(connection)
    ours = {app for app, _ in loader.disk_migrations}
    known = set(loader.disk_migrations) | set(loader.replacements)
    unknown = sorted(f"{a}.{n}" for a, n in set(loader.applied_migrations) - known if a in ours)
    if unknown:
        raise SettingsError(
            f"the database is of a newer version (it has {', '.join(unknown)[:200]}); install that "
            "version again, or go back to the backup that was made before the upgrade"
        )


def _lacks_tables() -> bool:
    from django.db import connection
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection)
    return bool(executor.migration_plan(executor.loader.graph.leaf_nodes()))


def _unreachable(error: Exception) -> str:
    """Without the password, which DATABASE_URL may hold."""
    reason = one_line(error, 300)
    if os.environ.get("DATABASE_URL"):
        return f"DATABASE_URL: the database cannot be used ({reason}); check its parts"
    folder = os.environ.get("OPENPALM_FEEDBACK_DIR", "feedback")
    return f"--dir {folder}: its database cannot be used ({reason}); choose another folder"


def url_of(listening: socket.socket) -> str:
    """The address for a browser on this machine."""
    return url_of_address(*listening.getsockname()[:2])


def url_of_address(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def setup_lines(url: str) -> list[str]:
    """A line with the link by which the first administrator signs up; none if there is one."""
    from django.conf import settings
    from django.db import connection

    from openpalm.feedback.accounts.setup_link import setup_token
    from openpalm.feedback.models import User

    has_admin = User.objects.filter(is_superuser=True).exists()
    connection.close()
    if has_admin:
        return []
    token = setup_token(settings.FEEDBACK_DIR)
    return [f"sign up as the site's first administrator: {url}/setup?token={token}"]


def _name_of_site() -> str | None:
    """A host name that the site answers to, where 127.0.0.1 is none."""
    names = os.environ.get("OPENPALM_FEEDBACK_HOSTS", "").split(",")
    first = names[0].strip().removeprefix(".")
    return None if first in ("", "*") else first


def children(
    site: Site, listening: socket.socket, environment: Mapping[str, str] | None = None
) -> list[Child]:
    """The web process, which keeps the listening socket through a crash, and the worker."""
    number = listening.fileno()
    more = dict(environment or {})
    words = ["--host", site.host, "--port", str(listening.getsockname()[1]), "--dir", site.dir]
    web = Child(
        "web process",
        lambda: [*PROGRAM, "feedback", "web", *words],
        more | {SOCKET_VARIABLE: str(number)},
        ready=answers(f"{url_of(listening)}/healthz", _name_of_site()),
        sockets=(number,),
    )
    worker = Child("worker", lambda: [*PROGRAM, "feedback", "worker", "--dir", site.dir], more)
    return [web, worker]
