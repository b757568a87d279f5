"""The server under load: tokens/s and latency with many concurrent streams, and with one.

    python benchmarks/serve.py [--streams 1,32,256] [--new 128] [--dtype bfloat16] [--json]

Serves random weights of the palm-150m shape with `openpalm serve` in a process of its own and
calls /v1/completions as clients do: streamed, prompts of 128 tokens without a common prefix. For
each number of concurrent streams: tokens/s of all together, the time to the first token, the time
between tokens, the server's memory before and after. The rounds of the numbers are interleaved;
figures are medians over rounds, percentiles over all requests of all rounds.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from openpalm.checkpoint import directory as checkpoint
from openpalm.model.config import preset
from openpalm.model.transformer import Transformer, initialise

PROMPT = 128
CONFIG = preset("palm-150m").config


@dataclass
class Measured:
    """What the rounds of one number of streams gave."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)


def write_model(folder: Path) -> Path:
    """Random weights, and a tokenizer in which every id is a word."""
    words = {f"w{i} ": i for i in range(CONFIG.vocab_size)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0 "},
        "decoder": {"type": "Fuse"},
    }
    model = Transformer(CONFIG)
    initialise(model, seed=0)
    checkpoint.save(folder / "palm-150m", model, tokenizer_json=json.dumps(tokenizer))
    return folder / "palm-150m"


@contextmanager
def serving(model: Path, options: list[str]) -> Iterator[tuple[int, int]]:
    """Port and process id of a server."""
    words = [sys.executable, "-m", "openpalm", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r":(\d+)/", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        try:
            yield int(found[1]), process.pid
        finally:
            process.terminate()


async def stream(port: int, ids: list[int], new: int) -> list[float]:
    """One streamed completion: when it was sent, then when each token came."""
    body = {"prompt": ids, "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = [time.perf_counter()]
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"the server answered {status.decode().strip()}")
    async for line in reader:
        if line.startswith(b"data: {") and b'"text":"w' in line:
            times.append(time.perf_counter())
    writer.close()
    if len(times) != new + 1:
        raise SystemExit(f"{len(times) - 1} tokens came, not {new}")
    return times


async def round_of(port: int, streams: int, new: int, draw: random.Random) -> list[list[float]]:
    """All streams at once; twice as many requests as streams below four, to have some to count."""
    prompts = [[draw.randrange(CONFIG.vocab_size) for _ in range(PROMPT)] for _ in range(streams)]
    return await asyncio.gather(*(stream(port, ids, new) for ids in prompts))


def measure(
    port: int, pid: int, streams: int, new: int, draw: random.Random, into: Measured
) -> None:
    runs = asyncio.run(round_of(port, streams, new, draw))
    began, ended = min(run[0] for run in runs), max(run[-1] for run in runs)
    into.tokens_per_s.append(streams * new / (ended - began))
    into.first_s += [run[1] - run[0] for run in runs]
    for run in runs:
        into.between_s += [b - a for a, b in pairwise(run[1:])]
    into.resident_mb.append(resident_mb(pid))


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def table(results: dict[int, Measured]) -> str:
    alone = statistics.median(next(iter(results.values())).tokens_per_s)
    lines = [
        "| streams | tokens/s | against one | first token p50 / p99 s | between p50 / p99 ms "
        "| resident MB, first and last round |",
        "|---|---|---|---|---|---|",
    ]
    for streams, found in results.items():
        speed = statistics.median(found.tokens_per_s)
        first = " / ".join(f"{percentile(found.first_s, p):.2f}" for p in (0.5, 0.99))
        between = " / ".join(f"{percentile(found.between_s, p) * 1e3:.1f}" for p in (0.5, 0.99))
        memory = f"{found.resident_mb[0]:.0f}, {found.resident_mb[-1]:.0f}"
        lines.append(
            f"| {streams} | {speed:.0f} | {speed / alone:.1f} | {first} | {between} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-sequences", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    how = parser.parse_args()
    numbers = [int(number) for number in how.streams.split(",")]
    results = {number: Measured() for number in numbers}
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        options = [
            "--dtype",
            how.dtype,
            "--max-sequences",
            str(how.max_sequences),
            "--max-queue",
            str(max(numbers)),
        ]
        with serving(model, options) as (port, pid):
            measure(port, pid, numbers[0], 8, draw, Measured())  # the first call warms up
            for turn in range(how.rounds):
                for number, found in results.items():
                    print(f"round {turn + 1}, {number} streams", file=sys.stderr)
                    measure(port, pid, number, how.new, draw, found)
    if how.json:
        print(json.dumps({number: vars(found) for number, found in results.items()}))
    else:
        sequences = f"{how.max_sequences} sequences at the same time"
        print(f"{how.dtype}, {sequences}, {os.cpu_count()} cores, {how.new} new tokens\n")
        print(table(results))


if __name__ == "__main__":
    main()
