"""The parser and runner of documents' code blocks."""

import importlib.util
import sys
import textwrap
import time
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "docs_blocks", Path(__file__).with_name("docs_blocks.py")
)
assert _spec
assert _spec.loader
docs_blocks = importlib.util.module_from_spec(_spec)
sys.modules["docs_blocks"] = docs_blocks  # dataclasses look their module up there
_spec.loader.exec_module(docs_blocks)

DOCUMENT = """
# Title

```bash
git clone somewhere
cd somewhere && make test
echo one \\
  two
```

```text
not a command
```

<!-- not run -->

```bash
false
```

```python
# not run
1 / 0
```

- in a list:

  ```console
  $ echo three
  three
  $ openpalm serve RUN --port 8123
  serving
  ```

````sh
cat > file <<'END'
make this stay
```
END
````
"""


def block(language, text):
    return docs_blocks.Block(1, language, textwrap.dedent(text).strip("\n"), False)


def runner(folder, seconds=3600.0):
    work = folder / "work"
    work.mkdir()
    return docs_blocks.Runner(work, time.monotonic() + seconds)


def _program(folder, script):
    program = folder / "openpalm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def test_blocks_are_found_in_order_and_marked():
    found = [(b.line, b.language, b.skipped) for b in docs_blocks.parse(DOCUMENT)]
    assert found == [
        (4, "bash", False),
        (17, "bash", True),
        (21, "python", True),
        (28, "console", False),
        (35, "sh", False),
    ]


def test_commands_leave_out_what_prepares_the_machine():
    first, _, _, console, here = docs_blocks.parse(DOCUMENT)
    assert docs_blocks.commands(first) == ["echo one \\\n  two"]
    assert docs_blocks.commands(console) == ["echo three", "openpalm serve RUN --port 8123"]
    assert docs_blocks.commands(here) == ["cat > file <<'END'\nmake this stay\n```\nEND"]


@pytest.mark.parametrize(
    "line",
    [
        "git log",
        "make quickstart MINUTES=1",
        "cd openpalm",
        "pip install -e .",
        ".venv/bin/pip install torch",
        "python3 -m venv .venv",
        ". .venv/bin/activate",
        "source .venv/bin/activate",
        "sudo apt install python3-venv",
    ],
)
def test_left_out(line):
    assert docs_blocks.commands(block("bash", line)) == []


@pytest.mark.parametrize("line", ["gitk", "python -m openpalm models", "pipx", "makeup"])
def test_kept(line):
    assert docs_blocks.commands(block("bash", line)) == [line]


@pytest.mark.parametrize(
    ("line", "serves"),
    [
        ("openpalm serve runs/a", True),
        (".venv/bin/openpalm serve runs/a --port 8001 &", True),
        ("openpalm feedback", True),
        ("openpalm feedback --port 8001", True),
        ("openpalm feedback export out.jsonl", False),
        ("openpalm serve --help", False),
        ("openpalm sample runs/a 'openpalm serve'", False),
    ],
)
def test_servers_are_recognised(line, serves):
    assert bool(docs_blocks.SERVER.match(line)) is serves


def test_port_is_read_from_the_command():
    assert docs_blocks.port_of("openpalm serve RUN --port 8123") == 8123
    assert docs_blocks.port_of("openpalm serve RUN --port=8124") == 8124
    assert docs_blocks.port_of("openpalm serve RUN") == docs_blocks.DEFAULT_PORT


def test_files_stay_between_blocks_and_failures_show_their_output(tmp_path):
    run = runner(tmp_path)
    run.run(block("bash", "echo kept > file"))
    run.run(block("python", "assert open('file').read() == 'kept\\n'"))
    with pytest.raises(docs_blocks.BlockFailed, match="seen"):
        run.run(block("bash", "echo seen\nfalse\necho never"))


def test_a_document_has_only_its_time(tmp_path):
    run = runner(tmp_path, seconds=0.0)
    with pytest.raises(docs_blocks.BlockFailed, match="timeout of the document"):
        run.run(block("bash", "sleep 60; echo late > file"))
    assert not list(tmp_path.rglob("file"))  # it was stopped, not waited for


def test_a_server_is_waited_for_and_stopped(tmp_path):
    program = _program(tmp_path, f'exec "{sys.executable}" -m http.server -b 127.0.0.1 "$3"')
    with docs_blocks.socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = runner(tmp_path)
    fetch = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/').read()"
    try:
        run.run(block("bash", f'{program} serve --port {port} &\npython -c "{fetch}"'))
        assert docs_blocks._answers(port)
        with pytest.raises(docs_blocks.BlockFailed, match="is in use"):
            run.run(block("bash", f"{program} serve --port {port}"))
    finally:
        run.stop()
    assert not docs_blocks._answers(port)


def test_a_server_that_does_not_start_fails_its_block(tmp_path):
    program = _program(tmp_path, "echo no model here; exit 2")
    with docs_blocks.socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = runner(tmp_path)
    with pytest.raises(docs_blocks.BlockFailed, match="no model here"):
        run.run(block("bash", f"{program} serve --port {port}"))
    run.stop()
