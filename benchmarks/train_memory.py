"""Peak memory and time of a step, compared with a peer and with theory; see train.py.

Every point is a process of its own (train.py point), so that one's peak is not another's. Linux.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peers_train import Contender, OpenPalm, PalmRlhfFlash, Rules
from train_common import Row, peaks_line, random_batch, say, sized, step_seconds, table

from openpalm.base.device import keep_freed_memory
from openpalm.model.attention import KEPT
from openpalm.model.config import ModelConfig
from openpalm.model.cross_entropy import CHUNK_BYTES
from openpalm.train.config import MemorySettings
from openpalm.train.sizing.measure import matmul_flops

PROGRAM = Path(__file__).with_name("train.py")
CPU = torch.device("cpu")
WARM_UP_TOKENS = 64
SPARE = 1.3
"""Times what theory says: what must be available before a point is tried."""
ENOUGH_S, ENOUGH_STEPS = 20.0, 5
"""A step is timed until either is reached, once at least."""


def resident_bytes(field: str) -> int:
    """VmHWM (the peak, of this process alone) or VmRSS, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def memory_settings(way: str, *, keep_freed: bool) -> dict[str, Any]:
    """TrainSettings.memory of `none`, `full:1024`: how to recompute, and the chunk of the loss."""
    recompute, _, chunk = way.partition(":")
    made: dict[str, Any] = {"recompute": recompute}
    if chunk:
        made["loss_chunk"] = int(chunk)
    if keep_freed:
        made["keep_freed"] = True
    return made


def theory(config: ModelConfig, length: int, dtype: str, way: str) -> tuple[float, float]:
    """Bytes and FLOPs of a step on one sequence, by simple arithmetic.

    Weights, gradient and two moments in float32; 20 d numbers a token a layer that backward needs,
    or, where all is recomputed, the layer's input and one layer's numbers (nan where only a part
    is); the logits of a chunk. On a CPU in bfloat16 attention keeps the probabilities of short
    sequences: of the causal half, T/2 a head and token. Not counted: further gradients of the
    table, matrices cast to bfloat16, the allocator's slack.
    """
    number = 4 if dtype == "float32" else 2
    recompute, _, chunk = way.partition(":")
    layer = 20 * config.dim * number
    if dtype == "bfloat16" and length <= KEPT:
        layer += config.heads * length // 2 * number
    full = 4 * config.dim * config.depth + layer  # the residual stream is float32
    kept = {"none": layer * config.depth, "full": full}.get(recompute, math.nan)
    logits = number * config.vocab_size * min(length, int(chunk or length))
    if not chunk:
        logits = min(logits, CHUNK_BYTES)
    flops = config.flops_per_token(length) * (4 / 3 if recompute == "full" else 1)
    return 16 * config.parameters + kept * length + logits, flops * length


def point(how: argparse.Namespace) -> list[Row]:
    """The process of one point: builds, warms up on a few tokens, steps, and prints the result."""
    # If memory runs out, the kernel kills this process and no other.
    Path("/proc/self/oom_score_adj").write_text("1000")
    peer, dtype = how.way == PalmRlhfFlash.name, getattr(torch, how.dtype)
    make: Callable[[Rules], Contender] = PalmRlhfFlash
    if not peer:
        settings = memory_settings(how.way, keep_freed=how.keep_freed)
        make = partial(OpenPalm, memory=settings)
        if MemorySettings(**settings).keeps_freed:
            keep_freed_memory()  # as a run does
    before = 0
    for name in ("palm-tiny", how.model):  # a small step first loads what every step needs
        before, config = resident_bytes("VmRSS"), sized(name, how.length)
        who: Contender = make(Rules(config, dtype, CPU))
        if how.without_moments:
            who.forget_moments()
        who.step(random_batch(config.vocab_size, 1, WARM_UP_TOKENS))  # the moments are made
    batch, seconds = random_batch(config.vocab_size, 1, how.length), list[float]()
    while not seconds or (sum(seconds) < ENOUGH_S and len(seconds) < ENOUGH_STEPS):
        seconds.append(step_seconds(who, batch, 1, CPU))
    found = {
        "model": how.model,
        "parameters": who.parameters,
        "length": how.length,
        "dtype": how.dtype,
        "way": how.way,
        "bytes_before": before,
        "peak_bytes": resident_bytes("VmHWM"),
        "step_s": statistics.median(seconds),
    }
    return [found]


@cache
def peak(dtype: str) -> float:
    """FLOP/s of matrix multiplication on this machine."""
    return max(matmul_flops(CPU, getattr(torch, dtype)) for _ in range(3))


def measured(model: str, length: int, dtype: str, way: str, *more: str) -> Row | None:
    """That point in a process of its own, with its theory; None where it cannot be had.

    `more` are further words for it.
    """
    peer = way == PalmRlhfFlash.name
    config = sized(model, length)
    expected, flops = theory(config, length, dtype, f"none:{length}" if peer else way)
    label = f"{model} {length} {dtype} {way}"
    if expected * SPARE > available_bytes():
        say(f"{label}: left out, needs some {expected * SPARE / 1e9:.0f} GB")
        return None
    words = [sys.executable, str(PROGRAM), "point", "--model", model, "--length", str(length)]
    done = subprocess.run(
        [*words, "--dtype", dtype, "--way", way, *more, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        say(f"{label}: left out, its process ended with {done.returncode}")
        return None
    row = json.loads(done.stdout)[0]
    expected += row["bytes_before"]
    row |= {"theory_bytes": expected, "theory_s": flops / peak(dtype), "peak_flops": peak(dtype)}
    say(f"{label}: {row['peak_bytes'] / 1e9:.2f} GB, {row['step_s']:.2f} s a step")
    return row


def memory(how: argparse.Namespace) -> list[Row]:
    ways = [*how.ways.split(","), PalmRlhfFlash.name]
    tried = [
        row
        for _ in range(how.rounds)
        for way in ways
        if (row := measured(how.model, how.length, how.dtype, way, *passed_on(how)))
    ]
    found = {way: [row for row in tried if row["way"] == way] for way in ways}
    return [
        same[0]
        | {"peak_bytes": max(row["peak_bytes"] for row in same)}
        | {"step_s": statistics.median(row["step_s"] for row in same)}
        for same in found.values()
        if same
    ]


def passed_on(how: argparse.Namespace) -> list[str]:
    """The words of this command that a point of its own must hear too."""
    flags = {"--without-moments": how.without_moments, "--keep-freed": how.keep_freed}
    return [flag for flag, given in flags.items() if given]


def memory_table(rows: list[Row]) -> str:
    peer = next((row for row in rows if row["way"] == PalmRlhfFlash.name), None)
    lines = []
    for row in rows:
        less, longer = "", ""
        if peer and row is not peer:
            less = f"{peer['peak_bytes'] / row['peak_bytes']:.2f}"
            longer = f"{row['step_s'] / peer['step_s']:.2f}"
        who = row["way"] if row is peer else f"OpenPaLM, {row['way']}"
        peak, step = f"{row['peak_bytes'] / 1e9:.2f}", f"{row['step_s']:.1f}"
        lines.append((row["model"], row["length"], row["dtype"], who, peak, less, step, longer))
    head = ("model", "tokens", "dtype", "who (recompute:loss chunk)", "peak GB")
    return peaks_line(rows) + table(
        (*head, "times less than the peer", "step, s", "times the peer's"), lines
    )


# --- curves


def curves(how: argparse.Namespace) -> list[Row]:
    """Ours against context, then against size; every point a process of its own."""
    points = [(how.model, int(length)) for length in how.lengths.split(",")]
    points += [(model, how.size_length) for model in how.models.split(",")]
    found = [
        measured(model, length, how.dtype, way, *passed_on(how))
        for way in how.ways.split(",")
        for model, length in dict.fromkeys(points)
    ]
    rows = [row for row in found if row]
    draw(rows, how)
    return rows


def draw(rows: list[Row], how: argparse.Namespace) -> None:
    """Four panels: memory and time, against context and against size; dashes are theory."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "openpalm"
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    sizes = how.models.split(",")
    grown = [row for row in rows if row["length"] == how.size_length and row["model"] in sizes]
    lengthened = [row for row in rows if row["model"] == how.model]
    sides = (
        ("length", f"tokens of context, {how.model}", lengthened),
        ("parameters", f"parameters, {how.size_length} tokens", grown),
    )
    values = (
        ("peak_bytes", "theory_bytes", "peak memory, GB", 1e9),
        ("step_s", "theory_s", "seconds a step", 1.0),
    )
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7.5), sharex="col", layout="constrained")
    for column, (x, x_label, side) in enumerate(sides):
        for line, (seen, expected, y_label, unit) in enumerate(values):
            panel = panels[line][column]
            for n, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
                chosen = sorted((r for r in side if r["way"] == way), key=lambda row: row[x])
                for name, style in ((seen, "o-"), (expected, "--")):
                    points = [row[x] for row in chosen], [row[name] / unit for row in chosen]
                    panel.plot(*points, style, color=f"C{n}", label=way if name == seen else None)
            panel.set(xscale="log", yscale="log", ylabel=y_label)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        ticks = sorted({row[x] for row in side})
        panels[1][column].set_xticks(ticks, [shortened(tick) for tick in ticks], minor=False)
        panels[1][column].set_xlabel(x_label)
    panels[0][0].legend(title="recompute:loss chunk (dashes: theory)")
    figure.suptitle(f"A training step on one sequence, {how.dtype}, CPU")
    figure.savefig(how.picture, metadata={"Date": None} if how.picture.suffix == ".svg" else None)
    say(f"drawn: {how.picture}")


def shortened(value: int) -> str:
    return f"{value / 1e6:.0f}M" if value > 500_000 else f"{value / 1024:g}k"


def curves_table(rows: list[Row]) -> str:
    head = ("model", "tokens", "dtype", "recompute:loss chunk", "peak GB", "theory", "step, s")
    return peaks_line(rows) + table(
        (*head, "theory at matmul peak"),
        [
            (
                row["model"],
                row["length"],
                row["dtype"],
                row["way"],
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['theory_bytes'] / 1e9:.2f}",
                f"{row['step_s']:.2f}",
                f"{row['theory_s']:.2f}",
            )
            for row in rows
        ],
    )
