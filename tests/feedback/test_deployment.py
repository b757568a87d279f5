"""The files of examples/feedback/, compose.feedback.yaml and the site agree.

No container is run; tests/feedback_system/test_deployment.py runs the processes themselves.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.conf import settings

from openpalm.base.settings import parse
from openpalm.cli.feedback import FeedbackSettings
from openpalm.cli.serve import ServeSettings
from openpalm.feedback import settings as site_settings
from openpalm.feedback.accounts.middleware import FORM_BYTES, UPLOAD

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "feedback"
PAGE = ROOT / "docs" / "feedback-deployment.md"
UNITS = ("openpalm-feedback-web", "openpalm-feedback-worker", "openpalm-model")


def text(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def unit(name: str) -> dict[str, str]:
    lines = [line for line in text(f"{name}.service").splitlines() if "=" in line]
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.feedback.yaml").read_text(encoding="utf-8"))["services"]


def script_words(program: str) -> list[str]:
    """The words of the script's line that begins with `program`, without redirections."""
    line = next(line for line in text("run_processes.sh").splitlines() if line.startswith(program))
    return shlex.split(line.split(" >")[0].replace('"$web_port"', "8001"))


def without_folder(words: list[str]) -> list[str]:
    return ["--dir", "DIR", *words[2:]] if words[0] == "--dir" else words


def gunicorn_commands() -> dict[str, list[str]]:
    page = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = next(line for line in page.splitlines() if line.startswith("gunicorn "))
    web = compose()["web"]
    return {
        "unit": shlex.split(unit(UNITS[0])["ExecStart"].removeprefix("/opt/openpalm/bin/")),
        "compose": [*web["entrypoint"], *web["command"]],
        "script": script_words("gunicorn "),
        "page": shlex.split(shown),
    }


@pytest.mark.parametrize("where", ["compose", "script", "page"])
def test_one_gunicorn_command_everywhere(where: str):
    assert gunicorn_commands()[where] == gunicorn_commands()["unit"]


def test_gunicorn_knows_its_options():
    config = pytest.importorskip("gunicorn.config").Config()
    words = gunicorn_commands()["unit"]
    given = config.parser().parse_args(words[1:])
    for name, value in vars(given).items():
        if value is not None and name != "args":
            config.set(name, value)
    assert given.args == ["openpalm.feedback.wsgi:application"]
    assert (config.bind, config.workers, config.threads) == (["127.0.0.1:8001"], 2, 8)
    stops_after = {
        "unit": float(unit(UNITS[0])["TimeoutStopSec"]),
        "compose": float(compose()["web"]["stop_grace_period"].removesuffix("s")),
    }
    assert min(stops_after.values()) > config.graceful_timeout


def test_one_worker_command_everywhere():
    start = unit(UNITS[1])["ExecStart"].removeprefix("/opt/openpalm/bin/")
    found = [shlex.split(start), script_words("openpalm feedback worker")]
    found.append(["openpalm", *compose()["worker"]["command"]])
    for words in found:
        assert words[:3] == ["openpalm", "feedback", "worker"]
        parse(FeedbackSettings, words[3:], verb="feedback", about="", examples=[])
    assert len({tuple(without_folder(words[3:])) for words in found}) == 1


def test_the_tables_are_made_in_the_same_way_everywhere():
    wanted = ["feedback", "manage", "migrate", "--verbosity", "0"]
    assert compose()["migrate"]["command"] == wanted
    assert unit(UNITS[0])["ExecStartPre"].endswith(" ".join(wanted))
    assert script_words("openpalm feedback manage migrate")[1:] == wanted


@pytest.mark.parametrize("where", ["unit", "compose"])
def test_the_model_server_has_options_of_serve(where: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENPALM_API_KEY", "key")
    words = {
        "unit": shlex.split(unit(UNITS[2])["ExecStart"]),
        "compose": [*compose()["model"]["entrypoint"], *compose()["model"]["command"]],
    }[where]
    assert words[0].endswith("/serve_promoted.sh")
    given = parse(
        ServeSettings, words[1:], verb="serve", about="", examples=[], positional=["path"]
    )
    assert (given.port, given.model_name) == (8000, "palm")


def test_the_variables_are_those_of_the_settings_and_of_the_page():
    documented = set(re.findall(r"^([A-Z_]+) ", site_settings.__doc__ or "", re.MULTILINE))
    in_file = set(re.findall(r"^([A-Z_]+)=", text("feedback.env"), re.MULTILINE))
    assert in_file <= documented
    assert (
        set(re.findall(r"^export (OPENPALM_\w+|DATABASE_URL)=", text("run_processes.sh")))
        <= in_file
    )
    assert set(compose()["web"]["environment"]) <= documented
    on_page = set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE.read_text("utf-8"), re.MULTILINE))
    assert on_page == documented


def test_nginx_takes_what_the_site_takes():
    lines = text("nginx-site.conf")
    sizes = [int(size) * 2**20 for size in re.findall(r"client_max_body_size (\d+)m;", lines)]
    small, large = sizes
    assert small >= settings.DATA_UPLOAD_MAX_MEMORY_SIZE + FORM_BYTES
    assert large >= settings.FEEDBACK_MAX_UPLOAD_BYTES + FORM_BYTES
    location = re.search(r"location ~ (\S+) ", lines)
    assert location is not None
    assert location[1] == f"^{UPLOAD.pattern}$"


def test_nginx_writes_every_header_that_the_site_believes():
    headers = dict(re.findall(r"proxy_set_header (\S+) (\S+);", text("nginx-site.conf")))
    assert headers["X-Forwarded-For"] == "$proxy_add_x_forwarded_for"
    assert headers["X-Forwarded-Proto"] == "$scheme"
    assert headers["Host"] == "$http_host"
    assert "OPENPALM_FEEDBACK_PROXIES=1\n" in text("feedback.env")


def test_the_compose_file_says_that_it_has_not_been_run():
    head = (ROOT / "compose.feedback.yaml").read_text(encoding="utf-8").split("x-site")[0]
    assert "have not been run" in " ".join(head.replace("#", " ").split())
    for name in ("web", "worker", "migrate", "model"):
        assert compose()[name]["image"] == "openpalm:cpu"
    assert "deploy]" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    # Only nginx is published; gunicorn shares its network.
    assert [name for name, one in compose().items() if "ports" in one] == ["nginx"]
    assert compose()["web"]["network_mode"] == "service:nginx"


def test_mounted_files_exist():
    volumes = [volume for one in compose().values() for volume in one.get("volumes", [])]
    files = [volume.split(":")[0] for volume in volumes if volume.startswith("./examples")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("name", ["run_processes.sh", "serve_promoted.sh"])
def test_the_scripts_are_programs(name: str):
    assert os.access(EXAMPLES / name, os.X_OK)
    shell = "bash" if "bash" in text(name).splitlines()[0] else "sh"
    assert subprocess.run([shell, "-n", EXAMPLES / name]).returncode == 0


@pytest.mark.parametrize("promoted", [None, "/runs/a model/é"])
def test_a_restarted_server_has_the_promoted_model(tmp_path: Path, promoted: str | None):
    fake = tmp_path / "bin" / "openpalm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    if promoted:
        (tmp_path / "served.json").write_text(json.dumps({"path": promoted}), encoding="utf-8")
    environment = os.environ | {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "OPENPALM_FEEDBACK_DIR": str(tmp_path),
    }
    words = [EXAMPLES / "serve_promoted.sh", "/first", "--port", "8000"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["serve", promoted or "/first", "--port", "8000"]
