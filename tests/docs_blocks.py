"""Runs the code blocks of Markdown documents, to test them.

    python tests/docs_blocks.py [DOCUMENT.md ...]     (default: README.md, docs/, examples/)

Each document gets a new temporary folder. Its ```bash, ```sh, ```console and ```python blocks run
there in order, with `.venv/bin` first on PATH and a link to `.venv` in the folder. Every block is a
program of its own: files stay for the next block, variables do not.

- In a `console` block only lines that start with `$ ` run; the others are output.
- Lines that start with git, make, cd, pip, source, `. .venv`, `python3 -m venv` or sudo do not run:
  they prepare the reader's machine.
- `openpalm serve ...` and `openpalm feedback ...` start in the background; the next line runs
  when the port answers. The server is stopped at the end of the document.
- A block whose first line is `# not run`, or that follows the line `<!-- not run -->`, is skipped
  and counted.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

LANGUAGES = ("bash", "sh", "console", "python")
LEFT_OUT = re.compile(
    r"(git|make|cd|source|sudo)\b|(\S*/)?pip3? |\. \S*\.venv|(\S*/)?python3? -m (venv|pip)\b"
)
SERVER = re.compile(r"(\S*/)?openpalm (serve\b|feedback\b(?! +[a-z]))(?!.*--help)")
DEFAULT_PORT = 8000
SERVER_START_S = 120


class BlockFailed(Exception):
    """A block failed; the text is its output."""


@dataclass(frozen=True)
class Block:
    line: int  # of the opening fence, counted from 1
    language: str
    text: str
    skipped: bool


def parse(document: str) -> list[Block]:
    """The blocks of a Markdown text in LANGUAGES, with skipped ones."""
    blocks = []
    lines = iter(enumerate(document.splitlines(), start=1))
    before = ""
    for number, line in lines:
        fence = re.match(r"( *)(`{3,}|~{3,}) *(\w*)", line)
        if fence:
            indent, marks, language = fence.groups()
            body = []
            for _, inner in lines:
                if inner.strip().startswith(marks) and not inner.strip().strip(marks[0]):
                    break
                body.append(inner.removeprefix(indent))
            if language in LANGUAGES:
                marked = before == "<!-- not run -->" or body[:1] == ["# not run"]
                blocks.append(Block(number, language, "\n".join(body), marked))
        before = line.strip() or before
    return blocks


def commands(block: Block) -> list[str]:
    """The command lines of a shell block that run: continuations and here-documents joined."""
    lines = block.text.splitlines()
    if block.language == "console":
        lines = _prompted(lines)
    kept = [line for line in _logical(iter(lines)) if line.strip()]
    return [line for line in kept if not LEFT_OUT.match(line.strip())]


def _prompted(lines: list[str]) -> list[str]:
    kept, continued = [], False
    for line in lines:
        if line.startswith("$ ") or continued:
            kept.append(line if continued else line[2:])
            continued = line.endswith("\\")
    return kept


def _logical(lines: Iterator[str]) -> Iterator[str]:
    for first in lines:
        line = first
        while line.endswith("\\"):
            line += "\n" + next(lines, "")
        here = re.search(r"<<-? *(['\"]?)(\w+)\1", line)
        if here:
            for inner in lines:
                line += "\n" + inner
                if inner.strip() == here[2]:
                    break
        yield line


def port_of(command: str) -> int:
    """The port in a server's command line."""
    given = re.search(r"--port[ =](\d+)", command)
    return int(given[1]) if given else DEFAULT_PORT


@dataclass
class Runner:
    """Runs blocks in `folder` until `deadline` (time.monotonic); stops the servers they start."""

    folder: Path
    deadline: float
    servers: list[tuple[subprocess.Popen, Path]] = field(default_factory=list)

    def run(self, block: Block) -> None:
        """Runs one block. Raises BlockFailed with the output of a failed command."""
        if block.language == "python":
            self._execute([sys.executable, "-c", block.text])
            return
        script: list[str] = []
        for command in commands(block):
            if SERVER.match(command):
                self._shell(script)
                self._serve(command.rstrip().removesuffix("&"))
                script = []
            else:
                script.append(command)
        self._shell(script)

    def stop(self) -> None:
        for server, _ in self.servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
        for server, _ in self.servers:
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()

    def _shell(self, script: list[str]) -> None:
        if script:
            self._execute(["bash", "-euo", "pipefail", "-c", "\n".join(script)])

    def _execute(self, argv: list[str]) -> None:
        log = self.folder.parent / "output"
        with log.open("wb") as output:
            process = self._start(argv, output)
        try:
            status = process.wait(timeout=max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = "timeout of the document"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            shown = log.read_text(encoding="utf-8", errors="replace")
            raise BlockFailed(f"{shown}\nstatus: {status}")

    def _serve(self, command: str) -> None:
        port = port_of(command)
        if _answers(port):
            raise BlockFailed(
                f"port {port} is in use; stop the program that listens on it and run again"
            )
        log = self.folder.parent / f"server-{len(self.servers)}"
        with log.open("wb") as output:
            server = self._start(["bash", "-c", f"exec {command}"], output)
        self.servers.append((server, log))
        patience = min(self.deadline, time.monotonic() + SERVER_START_S)
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > patience:
                shown = log.read_text(encoding="utf-8", errors="replace")
                raise BlockFailed(f"{shown}\n{command}: port {port} does not answer")
            time.sleep(0.2)

    def _start(self, argv: list[str], output: BinaryIO) -> subprocess.Popen:
        tools = Path(sys.executable).parent
        return subprocess.Popen(
            argv,
            cwd=self.folder,
            env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def check(document: Path, timeout_s: float) -> tuple[int, bool]:
    """Runs a document's blocks up to the first failure: number of skipped blocks, and success."""
    blocks = parse(document.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "work"
        folder.mkdir()
        (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
        runner = Runner(folder, time.monotonic() + timeout_s)
        try:
            went = all(_report(document, block, runner) for block in blocks if not block.skipped)
        finally:
            runner.stop()
    return sum(block.skipped for block in blocks), went


def _report(document: Path, block: Block, runner: Runner) -> bool:
    began = time.monotonic()
    try:
        runner.run(block)
        failure = ""
    except BlockFailed as error:
        failure = str(error).strip()
    elapsed_s = time.monotonic() - began
    outcome = "failed" if failure else "ok"
    print(f"{document}:{block.line}  {block.language:<8}{outcome:<8}{elapsed_s:6.1f} s", flush=True)
    if failure:
        print(block.text, "-" * 40, failure, sep="\n", flush=True)
    return not failure


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the code blocks of Markdown documents.")
    parser.add_argument("documents", nargs="*", type=Path)
    parser.add_argument("--timeout", type=float, default=420, help="seconds a document may take")
    options = parser.parse_args()
    documents = options.documents or [
        Path("README.md"),
        *sorted(path for room in ("docs", "examples") for path in Path(room).rglob("*.md")),
    ]
    # After SIGTERM (a timeout, a build server) the servers must be stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = [check(document, options.timeout) for document in documents]
    skipped, failed = sum(count for count, _ in results), sum(not went for _, went in results)
    print(f"{len(documents)} documents, {failed} failed, {skipped} blocks skipped as not run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
