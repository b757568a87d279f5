"""`openpalm serve RUN --feedback`: model server, feedback site and worker in one command.

Each is a process of its own under a supervisor. They share keys that are made at the start; nobody
needs to know them.
"""

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from openpalm.base.settings import spell
from openpalm.cli import feedback_site
from openpalm.cli.feedback import say
from openpalm.cli.feedback_site import Site
from openpalm.cli.serve import ServeSettings
from openpalm.errors import SettingsError
from openpalm.feedback.supervisor import Child, Supervisor, answers
from openpalm.feedback.worker.processes import PROGRAM

_NOT_PASSED = {
    *("path", "feedback", "feedback_port", "feedback_dir", "port", "name", "api_key", "admin_key"),
    "conversation_url",
}
TOKEN_VARIABLE = "OPENPALM_CONVERSATION_TOKEN"


def run(settings: ServeSettings) -> None:
    feedback_site.check_installed()
    if not Path(settings.path).is_dir():
        raise SettingsError(
            f"{settings.path}: no run or checkpoint is there, and --feedback needs one on this "
            "machine; `openpalm copy` fetches one from the hub"
        )
    folder = feedback_site.folder_of(settings.feedback_dir)
    site = Site(settings.host, settings.feedback_port, folder, port_option="--feedback-port")
    site.check_host()
    port = _free_port(settings.host, settings.port)
    keys = settings.keys  # without --api-key, callers on this machine need none
    admin_keys = settings.admin_keys or [secrets.token_urlsafe(24)]
    with site.listen() as listening:
        server_url = feedback_site.url_of_address(settings.host, port)
        shared = {"OPENPALM_SERVER_URL": server_url, "OPENPALM_ADMIN_KEY": admin_keys[0]}
        site.set_environment(shared | ({"OPENPALM_API_KEY": keys[0]} if keys else {}))
        feedback_site.open_database()
        site_url = feedback_site.url_of(listening)
        server = _server(settings, port, server_url, site_url, keys, admin_keys)
        children = [server, *feedback_site.children(site, listening)]
        setup = feedback_site.setup_lines(site_url)

        def ready() -> None:
            line = f"{settings.model_name}: chat page at {server_url}/, feedback at {site_url}/"
            # The link ends its line, so that a terminal opens it whole.
            with suppress(OSError):
                print(f"{line}; Ctrl-C ends both", *setup, sep="\n", flush=True)

        Supervisor(children, say=say).run(ready, ending=listening.close)


def _free_port(host: str, port: int) -> int:
    """The port of the model server; 0 is replaced by a free one.

    Raises SettingsError if it is in use, before prompts are read and processes start.
    """
    listening = Site(host, port, "").listen()
    with listening:
        return listening.getsockname()[1]


def _server(
    settings: ServeSettings,
    port: int,
    url: str,
    site_url: str,
    keys: Sequence[str],
    admin_keys: Sequence[str],
) -> Child:
    """The model server. After a crash it starts with the model that was promoted meanwhile."""
    from django.db import Error

    from openpalm.feedback.imports import first_prompts
    from openpalm.feedback.training.served import connect, serve_again
    from openpalm.feedback.training.servers import promoted_path

    connection = connect(settings.path, settings.model_name)
    if connection.promoted:
        say(
            f"serves {connection.model.path}, as the command says, and not the model that was "
            f"promoted before; to serve that one: openpalm serve {connection.promoted} --feedback"
        )
    if connection.is_new and (data := first_prompts.data_of(Path(settings.path))):
        count = first_prompts.add(connection.project, connection.model, data)
        names = ", ".join(map(str, data))
        say(f"{count} prompts of {names}: answers to judge are being generated")
    conversations = f"{site_url}/api/v1/projects/{connection.project.slug}/conversations"
    environment = {
        "OPENPALM_ADMIN_KEY": json.dumps(list(admin_keys)),
        TOKEN_VARIABLE: connection.token,
    }
    if keys:
        environment["OPENPALM_API_KEY"] = json.dumps(list(keys))

    def command() -> list[str]:
        promoted = promoted_path()
        if promoted and not (Path(promoted) / "manifest.json").is_file():
            say(f"{promoted} was promoted and is gone; serves {connection.model.path} again")
            with suppress(Error):  # a database that is away; the next start tries again
                serve_again(connection.model)
            promoted = None
        path = promoted or connection.model.path
        words = [*PROGRAM, "serve", path, *options(settings, promoted)]
        words += ["--name", settings.model_name, "--port", str(port)]
        return [*words, "--conversation-url", settings.conversation_url or conversations]

    ready = answers(f"{url}/ready")
    return Child("model server", command, environment, ready=ready, hides_output=True)


def options(settings: ServeSettings, promoted: str | None = None) -> list[str]:
    """The options that are not at their default, for the model server alone.

    Adapters are of the first model; a promoted one has none.
    """
    words: list[str] = []
    for each in fields(settings):
        value: Any = getattr(settings, each.name)
        if each.name in _NOT_PASSED or value == each.default:
            continue
        if promoted and each.name == "adapter":
            continue
        text = json.dumps(value) if isinstance(value, (list, bool)) else str(value)
        words += [spell(each.name), text]
    return words
