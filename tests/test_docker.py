"""Dockerfile, compose.yaml and docs/docker.md agree with the folder and with the command line.

No image is built: the files are parsed.
"""

import json
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from openpalm.base.settings import parse
from openpalm.cli.serve import ServeSettings
from openpalm.serve.access.auth import PATHS_WITHOUT_KEY

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTIONS = {
    *("ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE"),
    *("HEALTHCHECK", "ENTRYPOINT", "CMD"),
}
KEY = "OPENPALM_API_KEY"


def dockerfile() -> list[tuple[str, str]]:
    """The instructions in order, with continued lines joined and comments removed."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    assert all(len(pair) == 2 for pair in words)
    return [(name, " ".join(rest.split())) for name, rest in words]


def values(name: str) -> list[str]:
    return [rest for given, rest in dockerfile() if given == name]


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def substituted(text: str, **environment: str) -> str:
    """${NAME}, ${NAME:-default} and ${NAME:?message} as compose replaces them."""

    def value(match: re.Match[str]) -> str:
        name, default, required = match.group(1), match.group(2), match.group(3)
        if name in environment:
            return environment[name]
        assert required is None, f"{name} is required: {required}"
        return default or ""

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?(?::\?([^}]*))?\}", value, text)


def serves(words: list[str], monkeypatch: pytest.MonkeyPatch, key: str | None) -> ServeSettings:
    """The settings of `openpalm serve ...`, as the program itself parses them."""
    assert words[0] == "serve"
    monkeypatch.delenv(KEY, raising=False)
    if key:
        monkeypatch.setenv(KEY, key)
    return parse(ServeSettings, words[1:], verb="serve", about="", examples=[], positional=["path"])


def test_the_instructions_are_known_and_in_order():
    names = [name for name, _ in dockerfile()]
    assert set(names) <= INSTRUCTIONS
    first = names.index("FROM")
    assert set(names[:first]) == {"ARG"}
    assert names.count("ENTRYPOINT") == names.count("CMD") == names.count("HEALTHCHECK") == 1
    last = len(names) - 1 - names[::-1].index("FROM")
    assert "RUN" not in names[names.index("USER") :], "what follows USER runs without root"
    assert names.index("USER") > last


def test_a_stage_is_defined_for_every_device():
    stages = [rest.split(" AS ") for rest in values("FROM")]
    named = {parts[1] for parts in stages if len(parts) == 2}
    devices = {part["build"]["args"]["DEVICE"] for part in compose()["services"].values()}
    assert devices == {"cpu", "cuda"}
    assert {f"base-{device}" for device in devices} <= named
    arguments = {rest.split("=")[0] for rest in values("ARG")}
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(values("FROM"))))
    assert used <= arguments


def copied() -> Iterator[str]:
    for rest in values("COPY"):
        if not rest.startswith("--from="):
            yield from rest.split()[:-1]


def test_what_is_copied_exists_and_is_sent():
    """.dockerignore leaves everything out but the lines that start with !."""
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    kept = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    sources = [*copied()]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatchcase(source, pattern) for pattern in kept), source
    stages = {rest.split(" AS ")[1] for rest in values("FROM") if " AS " in rest}
    froms = [re.match(r"--from=(\w+)", rest) for rest in values("COPY")]
    assert {match[1] for match in froms if match} <= stages


def test_versions_are_pinned():
    installs = [rest for rest in values("RUN") if "pip install" in rest]
    assert installs
    assert all("-c constraints.txt" in rest for rest in installs)


def test_it_does_not_run_as_root():
    (user,) = values("USER")
    assert int(user) > 0
    assert f"--uid {user} " in " ".join(values("RUN"))
    volumes = json.loads(values("VOLUME")[0])
    assert "/models" in volumes


def test_the_health_check_asks_an_open_path():
    (check,) = values("HEALTHCHECK")
    words = json.loads(check[check.index("[") :])
    compile(words[-1], "health check", "exec")
    (port,) = values("EXPOSE")
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", words[-1])
    assert found is not None
    assert found[1] == port
    assert found[2] in PATHS_WITHOUT_KEY


def test_the_command_of_the_image(monkeypatch: pytest.MonkeyPatch):
    assert json.loads(values("ENTRYPOINT")[0]) == ["openpalm"]
    words = json.loads(values("CMD")[0])
    settings = serves(words, monkeypatch, "secret")
    assert (settings.host, str(settings.port)) == ("0.0.0.0", values("EXPOSE")[0])
    with pytest.raises(Exception, match=r"give --api-key \(or OPENPALM_API_KEY\)"):
        serves(words, monkeypatch, None)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_service(name: str, monkeypatch: pytest.MonkeyPatch):
    service = compose()["services"][name]
    assert service["profiles"] == [name]
    assert service["image"] == f"openpalm:{name}"
    assert (ROOT / service["build"]["context"] / "Dockerfile").is_file()
    words = [substituted(word, MODEL="tiny") for word in service["command"]]
    settings = serves(words, monkeypatch, "secret")
    assert settings.path == "/models/tiny"
    assert service["environment"]["OPENPALM_ADMIN_KEY"] is None  # an empty key is refused
    with pytest.raises(AssertionError, match="required: set a key"):
        substituted(service["environment"][KEY])
    published = substituted(service["ports"][0])
    assert published == f"127.0.0.1:8000:{settings.port}"
    assert float(service["stop_grace_period"].removesuffix("s")) > settings.shutdown_timeout
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    targets = {volume.split(":")[1] for volume in service["volumes"]}
    assert targets == set(json.loads(values("VOLUME")[0]))
    named = {volume.split(":")[0] for volume in service["volumes"] if volume[0] != "."}
    assert named == compose()["volumes"].keys()


def test_only_one_service_has_a_gpu():
    services = compose()["services"]
    assert "deploy" not in services["cpu"]
    (device,) = services["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_commands_of_the_page(monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8").replace("\\\n", " ")
    ran = 0
    for line in page.splitlines():
        if line.startswith("docker run"):
            words = shlex.split(line)
            image = next(i for i, word in enumerate(words) if word.startswith("openpalm:"))
            given = words[image + 1 :] or json.loads(values("CMD")[0])
            key = next(word for word in words if word.startswith(f"{KEY}=")).partition("=")[2]
            assert serves(given, monkeypatch, key).host == "0.0.0.0"
            ran += 1
    assert ran == 2
    assert "No image has been built or run here" in page
    for argument in {rest.split("=")[0] for rest in values("ARG")}:
        assert f"| `{argument}` |" in page
