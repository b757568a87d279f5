"""A run behind `openpalm serve`, asked over HTTP as any client of the OpenAI API asks."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

AT_ONCE = 32
TIMEOUT_S = 120
ADDRESS = re.compile(r"(http://[\d.]+:\d+/v1)")


class Client:
    """Completions of one server."""

    def __init__(self, url: str):
        self._http = httpx2.Client(base_url=url, timeout=TIMEOUT_S)

    def replies(
        self, questions: Sequence[str], *, seed: int, max_tokens: int, temperature: float = 1.0
    ) -> list[str]:
        """One to each question, each drawn with a seed of its own."""

        def ask(number: int) -> str:
            body = {
                "messages": [{"role": "user", "content": questions[number]}],
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed * 1_000_003 + number,
            }
            return self._post("chat/completions", body)["choices"][0]["message"]["content"]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, range(len(questions))))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self._http.post(path, json=body)
        response.raise_for_status()
        return response.json()


@contextmanager
def served(run: Path) -> Iterator[Client]:
    """Starts the server on a free port, and stops it."""
    words = [sys.executable, "-m", "openpalm", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(
        [*words, "--dtype", "float32", "--max-queue", "1024"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Client(address_of(process, ADDRESS))
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT_S)


def address_of(process: "subprocess.Popen[str]", form: re.Pattern[str]) -> str:
    """What a server prints when it is ready. Raises RuntimeError if it ends before."""
    assert process.stdout is not None
    said = ""
    while (line := process.stdout.readline()) != "":
        said += line
        if found := form.search(said.replace("\n", "")):  # a long line is wrapped
            return found[1]
    raise RuntimeError(f"the server ended: {said}")
