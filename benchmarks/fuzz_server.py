"""Fuzzes the server with hostile requests and endless headers.

    python benchmarks/fuzz_server.py [--requests 20000] [--seed 0] [--concurrency 16] [--json]

Serves a healthy model and one with a tokenizer that panics, swapped with POST /admin/models, and in
a second server a model with NaN weights. Sends seeded mutations of valid requests: fields left out,
of another type, out of bounds, nested, of another route; bodies cut, doubled, with changed bytes;
methods, headers, content types. Passes if no response has a 5xx status except 503, the server
survives, and at least a quarter of the requests reach the engine. Then 8 connections send endless
headers: reports the 99th percentile of the latency of /health before and during this.
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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from altered import seal

CONFIG = ModelConfig(vocab_size=265, dim=32, depth=2, heads=4, head_dim=8, ff_dim=64, context=128)
ADMIN_KEY = "fuzz"
FATAL = "a" * 40 + "b"
"""A text at which the hostile model's tokenizer panics."""
ENGINE = ("/v1/completions", "/v1/chat/completions", "/v1/score", "/complete")
MODELS = 3
ROUNDS = 4
"""Rounds over the models, so that each is loaded several times."""
HEALTH_CALLS = 200
ENDLESS = 8


# --- models


def write_models(folder: Path) -> dict[str, Path]:
    """Checkpoints by name: healthy, nan, hostile."""
    model = Transformer(CONFIG)
    initialise(model, seed=0)
    Tokenizer.byte().save(folder / "tokenizer.json")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    paths = {name: folder / name for name in ("healthy", "nan", "hostile")}
    for path in paths.values():
        checkpoint.save(path, model, tokenizer_json=text)
    weights = safetensors.torch.load_file(paths["nan"] / "model.safetensors")
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, paths["nan"] / "model.safetensors")
    content = json.loads(text)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    parts = [split | {"invert": False}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (paths["hostile"] / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("nan", "hostile"):
        seal(paths[name])
    return paths


# --- requests


@dataclass
class Call:
    """A request to send."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    -0.0,
    1e308,
    2**31,
    2**63,
    10**30,
    "",
    "a",
    "\0",
    "é\u2028",
    FATAL,
    "x" * 5000,
    [],
    [[]],
    [1, "a"],
    [300],
    [-1],
    {},
    {"a": {}},
    {"1": 100},
    {"9999": 1},
]
PROMPTS: list[Any] = [
    "Hello",
    "",
    "The quick brown fox",
    FATAL,
    "é" * 20,
    ["a", "bc"],
    [70, 71, 72],
    [[70, 71], [72]],
    [5],
    "x" * 126,
    "x" * 300,
]
NUMBERS: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 1, 2],
    "top_p": [0.1, 1],
    "top_k": [-1, 0, 5],
    "min_p": [0, 0.2],
    "n": [1, 2, 3],
    "seed": [0, 1, -(2**63), 2**63 - 1],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "logit_bias": [{"66": 100}, {"66": -100}, {"264": 1}],
    "stop": ["e", ["a", "\n"], ""],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "ignore_eos": [True],
    "max_tokens": [0, 1, 4, 16],
    "max_completion_tokens": [1, 8],
    "best_of": [1, 2],
    "user": ["someone"],
}


def valid_request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body that is mostly valid."""
    path = draw.choices(
        [*ENGINE, "/tokenize", "/detokenize", "/admin/models"], [40, 30, 8, 5, 7, 5, 1]
    )[0]
    prompt = draw.choice(PROMPTS)
    words = prompt if isinstance(prompt, str) else "Hello"
    if path == "/v1/completions":
        body = {"prompt": prompt, "max_tokens": draw.randrange(1, 9)}
        body |= {"echo": draw.random() < 0.2} | draw.choice([{}, {"logprobs": draw.randrange(6)}])
        body |= draw.choice([{}, {}, {}, {"suffix": draw.choice(["", "end"])}])
        return path, body
    if path == "/v1/chat/completions":
        roles = draw.choices(["system", "user", "assistant", "developer"], k=draw.randrange(1, 4))
        talk = [{"role": role, "content": draw.choice(["Hello", "", words])} for role in roles]
        body = {"messages": talk, "max_tokens": draw.randrange(1, 9)}
        body |= draw.choice([{}, {"logprobs": True, "top_logprobs": draw.randrange(6)}])
        body |= draw.choice([{}, {}, {"continue_final_message": True}, {"store": True}])
        return path, body | draw.choice([{}, {}, {"tools": draw.choice([[], [{}]])}])
    return path, {
        "/v1/score": {"sequences": draw.choice([["Hello", "a"], [[70, 71], [72]], [words or "a"]])},
        "/complete": {"context": words, "top_p": "0.9", "temp": draw.choice([0.5, "1"])},
        "/tokenize": draw.choice([{"prompt": words}, {"messages": []}]),
        "/detokenize": {"tokens": draw.choice([[70], [], [999, 5]])},
        "/admin/models": {"path": draw.choice(["/nowhere", "\0", "x" * 5000, "."])},
    }[path]


def with_changed_field(draw: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Changes one field: another type, left out, or nested."""
    changed = dict(body)
    name = draw.choice([*body, *NUMBERS, "model", "messages", "prompt", "tools", "tool_choice"])
    kind = draw.randrange(4)
    if kind == 0:
        changed.pop(name, None)
    elif kind == 1:
        changed[name] = {"x": [changed.get(name)]}
    else:
        changed[name] = draw.choice(ODD)
    return changed


def mangled(draw: random.Random, body: bytes) -> bytes:
    """Cuts, doubles, surrounds or replaces the bytes of a body."""
    at = draw.randrange(len(body) + 1)
    return draw.choice(
        [
            body[:at],
            body + body,
            body[:at] + bytes(draw.choices(range(256), k=3)) + body[at:],
            b"[" * draw.choice([10, 100_000]) + body,
            b"\xff\xfe" + body,
            body.replace(b":", b":NaN,", 1),
            b'{"prompt": "\\ud800", "max_tokens": 1}',
            b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
            b" " * draw.choice([1, 70_000]),
            b"",
        ]
    )


def fuzzed(draw: random.Random) -> Call:
    """One request: valid in form, or with a changed field, method, header or body."""
    path, body = valid_request(draw)
    if path in ENGINE[:2]:
        for name in draw.sample(sorted(NUMBERS), k=draw.randrange(4)):
            body[name] = draw.choice(NUMBERS[name])
    kind = draw.random()
    if kind > 0.6:
        body = with_changed_field(draw, body)
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN_KEY}"}
    method = "POST"
    if kind > 0.85:
        content = mangled(draw, content)
    elif kind > 0.8:
        headers["Content-Type"] = draw.choice(["", "text/plain", "application/json;charset=x", "é"])
        headers |= draw.choice([{}, {"Content-Encoding": "gzip"}, {"Accept": "\t"}, {"Host": ""}])
        headers |= draw.choice([{}, {"Authorization": "Bearer \xff"}, {"Expect": "100-continue"}])
    elif kind > 0.76:
        method = draw.choice(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
        odd = [
            "/",
            "/v1/models/",
            "/v1/models/%00",
            "/static/..%2f",
            "/%ff",
            "/v1",
            "/openapi.json",
        ]
        path = draw.choice([path, *odd, "/metrics", "/v1/models/" + "x" * 3000])
    return Call(method, path, headers, content)


# --- sending


@dataclass
class Counts:
    """Responses of one model."""

    statuses: Counter[int] = field(default_factory=Counter)
    engine: int = 0
    """requests that reached the engine"""
    bad: list[str] = field(default_factory=list)
    """responses that fail the test"""

    @property
    def total(self) -> int:
        return sum(self.statuses.values())


async def send(port: int, call: Call) -> tuple[int, bytes]:
    """Status and body; status 0 if the server closed the connection without a response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = {"Host": "127.0.0.1", "Connection": "close"} | call.headers
    lines["Content-Length"] = str(len(call.body))
    head = f"{call.method} {call.path} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    try:
        writer.write(head.encode("latin-1", "replace") + call.body)
        reply = await asyncio.wait_for(reader.read(), 120)
    except ConnectionError:
        return 0, b""
    finally:
        writer.close()
    found = re.match(rb"(?:HTTP/1.1 100 [^\r]*\r\n\r\n)?HTTP/1.1 (\d+)", reply)
    return (int(found[1]) if found else 0), reply.partition(b"\r\n\r\n")[2]


def reached_engine(call: Call, status: int, body: bytes) -> bool:
    if call.method != "POST" or call.path not in ENGINE:
        return False
    return status == 200 or b"model_failed" in body or b"engine_failed" in body


async def attack(port: int, calls: list[Call], concurrency: int, into: Counts) -> None:
    """Sends the calls, `concurrency` at the same time."""
    waiting = iter(calls)

    async def caller() -> None:
        for call in waiting:
            status, body = await send(port, call)
            into.statuses[status] += 1
            into.engine += reached_engine(call, status, body)
            if (500 <= status != 503) or b"internal_error" in body:
                into.bad.append(f"{status} {call} {body[:200]!r}")

    await asyncio.gather(*(caller() for _ in range(concurrency)))


async def swap(port: int, path: Path) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN_KEY}"}
    body = json.dumps({"path": str(path)}).encode()
    status, answer = await send(port, Call("POST", "/admin/models", headers, body))
    if status != 200:
        raise SystemExit(f"{path.name} cannot be served: {status} {answer.decode()}")


# --- endless headers


async def health_ms(port: int, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        status, _ = await send(port, Call("GET", "/health", {}, b""))
        times.append(1000 * (time.perf_counter() - began))
        if status != 200:
            raise SystemExit(f"/health answered {status}")
        await asyncio.sleep(0.005)
    return times


async def endless_header(port: int, stop: asyncio.Event) -> int:
    """Opens a new connection after each one is closed; returns the number of connections."""
    times = 0
    while not stop.is_set():
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
                while not stop.is_set():
                    writer.write(b"a" * (1 << 16))
                    await writer.drain()
                    await asyncio.sleep(0)
            finally:
                writer.close()
        times += 1
    return times


async def under_headers(port: int) -> dict[str, float]:
    """Latency of /health in ms, before and during the endless headers."""
    before = await health_ms(port, HEALTH_CALLS)
    stop = asyncio.Event()
    senders = [asyncio.create_task(endless_header(port, stop)) for _ in range(ENDLESS)]
    await asyncio.sleep(0.5)
    during = await health_ms(port, HEALTH_CALLS)
    stop.set()
    closed = sum(await asyncio.gather(*senders))
    return {
        "before_p99_ms": _p99(before),
        "during_p99_ms": _p99(during),
        "before_median_ms": statistics.median(before),
        "during_median_ms": statistics.median(during),
        "connections_closed": closed,
    }


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


# --- the run


@contextmanager
def server(model: Path) -> Iterator[int]:
    """Runs `openpalm serve` with an admin key and yields its port. Its exit status must be 0."""
    words = ["serve", str(model), "--port", "0", "--dtype", "float32"]
    environment = os.environ | {"OPENPALM_ADMIN_KEY": ADMIN_KEY, "OMP_NUM_THREADS": "1"}
    environment.pop("OPENPALM_API_KEY", None)
    log = model.parent / "log"
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "openpalm", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            found = re.search(r":(\d+)/", process.stdout.readline() if process.stdout else "")
            if not found:
                raise SystemExit(f"no server: {log.read_text()}")
            yield int(found[1])
            process.terminate()
            if process.wait(timeout=90):
                raise SystemExit(f"the server ended with {process.returncode}: {log.read_text()}")
        finally:
            process.kill()


async def measure(
    port: int, models: dict[str, Path], options: argparse.Namespace, draw: random.Random
) -> dict[str, Counts]:
    """Fuzzes each model, alternating between them; returns the responses by status."""
    counts = {name: Counts() for name in models}
    share = -(-options.requests // (ROUNDS * MODELS))
    for _ in range(ROUNDS):
        for name, path in models.items():
            if len(models) > 1:
                await swap(port, path)
            calls = [fuzzed(draw) for _ in range(share)]
            await attack(port, calls, options.concurrency, counts[name])
            print(f"{name}: {counts[name].total} sent", file=sys.stderr)
    return counts


def shown(counts: dict[str, Counts], headers: dict[str, float]) -> str:
    statuses = sorted({status for each in counts.values() for status in each.statuses})
    lines = [
        "| model | requests | reached the engine | "
        + " | ".join(str(s or "hung up") for s in statuses)
        + " |",
        "|---" * (3 + len(statuses)) + "|",
    ]
    for name, each in counts.items():
        row = [name, each.total, f"{each.engine / max(1, each.total):.0%}"]
        row += [each.statuses[status] for status in statuses]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", "/health with 8 endless headers: " + ", ".join(_named(headers))]
    return "\n".join(lines)


def _named(values: dict[str, float]) -> list[str]:
    return [f"{name} {value:.3g}" for name, value in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        draw = random.Random(options.seed)
        nan = {"nan": models.pop("nan")}  # /admin/models refuses it, so it gets its own server
        with server(models["healthy"]) as port:
            counts = asyncio.run(measure(port, models, options, draw))
            asyncio.run(swap(port, models["healthy"]))
            headers = asyncio.run(under_headers(port))
        with server(nan["nan"]) as port:
            counts |= asyncio.run(measure(port, nan, options, draw))
    if options.json:
        rows = {n: {"statuses": dict(c.statuses), "engine": c.engine} for n, c in counts.items()}
        print(json.dumps({"models": rows, "headers": headers}))
    else:
        print(shown(counts, headers))
    bad = [line for each in counts.values() for line in each.bad]
    total, engine = (sum(getattr(c, n) for c in counts.values()) for n in ("total", "engine"))
    for line in bad[:20]:
        print(line[:1000], file=sys.stderr)
    print(f"{engine / total:.0%} of {total} reached the engine; {len(bad)} bad", file=sys.stderr)
    sys.exit(1 if bad or engine < total / 4 else 0)


if __name__ == "__main__":
    main()
