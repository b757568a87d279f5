"""Training steps that gpu.py measures: speed and memory, with those of `openpalm plan`."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gpu_checks
import torch
from gpu_bench import Bench, Item, clear, memory, wait
from peers_train import Contender, OpenPalm, PalmRlhfFlash, Rules, flops_per_token
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_common import Row, random_batch, step_seconds

from openpalm.model.config import ModelConfig
from openpalm.plan.devices import DEVICES, Device
from openpalm.plan.layouts import Layout
from openpalm.plan.memory import step_memory
from openpalm.plan.time import step_time
from openpalm.plan.training import Recompute, Training
from openpalm.train.optimizer_settings import OptimizerName

ROWS = {"palm-150m": 8, "palm-410m": 4, "palm-1b": 2}
"""Sequences of a step to try first; half as many where memory runs out."""
PEER_ROWS = 2
"""It hands torch a mask of every row and head: cuDNN fails from 2^31 of its entries on."""
NEEDS_S = {"palm-150m": 10, "palm-410m": 15, "palm-1b": 25}
"""Seconds to build a model and to measure it; about as many again to compile its blocks."""


@dataclass(frozen=True)
class Way:
    """A configuration of the memory part."""

    model: str
    rows: int
    recompute: Recompute = "none"
    chunk: int | None = None
    optimizer: OptimizerName = "adamw"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


WAYS = (
    Way("palm-150m", 2),
    Way("palm-150m", 2, "selective"),
    Way("palm-150m", 2, "full", 1024),
    Way("palm-150m", 2, "offload", 1024),
    Way("palm-150m", 2, optimizer="muon"),
    Way("palm-150m", 1, dtype="float32"),
    Way("palm-410m", 2, "full"),
    Way("palm-1b", 4, "full"),
)


def planned(bench: Bench, training: Training, measured: Row) -> Row:
    """The plan of this training and what was measured; ratios are plan / measured."""
    plan = step_memory(training, Layout(), cuda=bench.device.type == "cuda")
    found: Row = {"plan_gb": plan.total / 1e9, "plan_peak_at": plan.moment}
    if "peak_gb" in measured:
        found["plan_memory_ratio"] = found["plan_gb"] / measured["peak_gb"]
    device = plan_device(bench)
    if device is not None and training.dtype in device.peak:
        found["plan_ms"] = step_time(training, Layout(), device).total * 1e3
        found["plan_time_ratio"] = found["plan_ms"] / measured["step_ms"]
    return found


def published(bench: Bench) -> Device | None:
    """The maker's figures for this card, as the plan has them; None for an unknown card."""
    if bench.device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(bench.device).upper().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if key.upper() in words), None)


def plan_device(bench: Bench) -> Device | None:
    """The plan's figures for this card, else the rates that this run has measured, if it has."""
    if bench.matmul and bench.copy:
        rates = {"bfloat16": bench.matmul}
        measured = Device("measured", rates, 0.0, bench.copy, 1.0, 1.0, 1, matmul=0.9)
        return published(bench) or measured
    return published(bench)


def training(bench: Bench) -> Iterator[Item]:
    for model in bench.models:
        first = model == bench.models[0]
        who = "OpenPaLM"
        needs = NEEDS_S[model]
        yield Item(
            f"{model}, {who}",
            needs,
            lambda model=model, first=first: trained(bench, model, OpenPalm, profiled=first),
        )
        if bench.peer is not None and bench.peer.is_dir():
            yield Item(
                f"{model}, {PalmRlhfFlash.name}",
                2 * needs,
                lambda model=model: peer_alone(bench, model),
            )
    if bench.peer is None or not bench.peer.is_dir():
        missing = "no --peer FOLDER" if bench.peer is None else f"{bench.peer} is no folder"
        row = {"training": "all", "who": PalmRlhfFlash.name, "left_out": missing}
        yield Item(PalmRlhfFlash.name, 0, lambda: [row])


def peer_alone(bench: Bench, model: str) -> Iterator[Row]:
    """The peer in a process of its own: a kernel that fails leaves a CUDA context unusable."""
    with tempfile.TemporaryDirectory() as folder:
        out, last = Path(folder) / "rows.jsonl", ""
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--out", str(out)]
        command += ["--parts", "peer_training", "--models", model, "--peer", str(bench.peer)]
        command += ["--device", bench.device.type, "--ceiling", str(bench.matmul)]
        command += ["--seconds", str(bench.left_s - 2), *(["--tiny"] if bench.tiny else [])]
        limit = max(1.0, bench.left_s - 1)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        except subprocess.TimeoutExpired:
            last = f"stopped after {limit:.0f} s"
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        rows = [json.loads(line) for line in lines]
    found = [row for row in rows if "training" in row]
    missing = {"training": model, "who": PalmRlhfFlash.name, "left_out": last}
    for row in found or [missing]:
        yield {name: value for name, value in row.items() if name != "part"}


def peer_training(bench: Bench) -> Iterator[Item]:
    """One row of palm-rlhf-pytorch for each model, on fewer sequences where it fails."""
    for model in bench.models:
        yield Item(model, 0, lambda model=model: trained(bench, model, PalmRlhfFlash))


def trained(
    bench: Bench, model: str, make: Callable[[Rules], Contender], profiled: bool = False
) -> Iterator[Row]:
    config = bench.config(model)
    who = make(Rules(config, torch.bfloat16, bench.device))
    row = {"training": model, "who": who.name, "length": config.context}
    ours = isinstance(who, OpenPalm)
    try:
        rows, eager = stepped(bench, who, config, ROWS[model] if ours else PEER_ROWS)
        if ours:
            eager |= planned(bench, Training(config, config.context, rows), eager)
        yield row | eager
        if not ours:
            return
        if profiled:
            yield from by_kernel(bench, who, config, rows, row)
            yield from spent(bench, who, config, rows)
        needs_s = 1.5 * NEEDS_S[model]
        if not bench.fits(needs_s):
            yield row | {"who": "OpenPaLM, compiled", "left_out": bench.left_out(needs_s)}
            return
        yield row | compiled(bench, who, config, rows)
        if profiled:
            yield from spent(bench, who, config, rows)
    finally:
        del who
        clear()


def by_kernel(
    bench: Bench, who: Contender, config: ModelConfig, rows: int, row: Row
) -> Iterator[Row]:
    """The same steps where torch has to take flash attention, and where it must not."""
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "no flash": SDPBackend.EFFICIENT_ATTENTION}
    for name, kernel in kernels.items() if bench.device.type == "cuda" else ():
        named = row | {"who": f"OpenPaLM, {name}"}
        try:
            with sdpa_kernel(kernel):
                yield named | stepped(bench, who, config, rows)[1]
        except RuntimeError as error:
            yield named | {"left_out": str(error).split("\n")[0][:80]}


def compiled(bench: Bench, who: OpenPalm, config: ModelConfig, rows: int) -> Row:
    ready = gpu_checks.compile_blocks(who, bench.backend)
    start = time.monotonic()
    who.step(random_batch(config.vocab_size, rows, config.context))
    seconds = time.monotonic() - start
    first = {"who": "OpenPaLM, compiled", "first_step_s": seconds, **ready()}
    return first | stepped(bench, who, config, rows)[1]


def stepped(bench: Bench, who: Contender, config: ModelConfig, rows: int) -> tuple[int, Row]:
    """Rows that fit, and the speed of steps on them."""
    while True:
        batch = random_batch(config.vocab_size, rows, config.context)
        try:
            with memory(bench.device) as peak:
                seconds = step_seconds(who, batch, 5, bench.device, unmeasured=2)
            break
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        clear()
    rate = rows * config.context / seconds
    whole = flops_per_token(who, config.context)
    half = whole - 6 * who.attention * config.context
    measured = {"rows": rows, "tokens_per_s": rate, "step_ms": seconds * 1e3}
    if bench.matmul:
        measured |= {"mfu": whole * rate / bench.matmul, "mfu_causal": half * rate / bench.matmul}
    if (card := published(bench)) is not None:
        measured["mfu_of_published_peak"] = whole * rate / card.flops("bfloat16")
    return rows, measured | peak


def spent(bench: Bench, who: Contender, config: ModelConfig, rows: int) -> Iterator[Row]:
    """The kernels that a step's time on the GPU went to, longest first."""
    batch = random_batch(config.vocab_size, rows, config.context)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        who.step(batch)
        wait(bench.device)
    events = profile.key_averages()
    used = {e.key: e.self_device_time_total or e.self_cpu_time_total for e in events}
    if bench.device.type == "cuda":  # the calls that launch kernels are of the host's time
        host = ("cudaLaunch", "cudaStream", "cudaDevice", "cudaMem", "cudaEvent", "Command")
        used = {name: spent_us for name, spent_us in used.items() if not name.startswith(host)}
    total = sum(used.values())
    for name, time_us in sorted(used.items(), key=lambda item: -item[1])[:14]:
        calls = sum(e.count for e in events if e.key == name)
        yield {"kernel": name[:90], "ms": time_us / 1e3, "share": time_us / total, "calls": calls}


def memory_of_plan(bench: Bench) -> Iterator[Item]:
    for way in WAYS:
        name = f"{way.model}, {way.recompute}, {way.optimizer}, {way.dtype}"
        needs_s = NEEDS_S[way.model] / 2
        yield Item(name, needs_s, lambda way=way: remembered(bench, way))


def remembered(bench: Bench, way: Way) -> Iterator[Row]:
    """Peak memory and time of the fourth and fifth step, and those of the plan."""
    config = bench.config(way.model)
    who = OpenPalm(
        Rules(config, getattr(torch, way.dtype), bench.device),
        optim={"name": way.optimizer},
        memory={"recompute": way.recompute, "loss_chunk": way.chunk},
    )
    batch = random_batch(config.vocab_size, way.rows, config.context)
    for _ in range(3):
        who.step(batch)
    clear()
    with memory(bench.device) as peak:
        seconds = step_seconds(who, batch, 2, bench.device)
    training = replace(
        Training(config, config.context, way.rows),
        optimizer=way.optimizer,
        dtype=way.dtype,
        recompute=way.recompute,
        loss_chunk=way.chunk,
    )
    row = {"memory": way.model, "rows": way.rows, "recompute": way.recompute}
    row |= {"chunk": way.chunk, "optimizer": way.optimizer, "dtype": way.dtype}
    measured = {"step_ms": seconds * 1e3, **peak}
    yield row | measured | planned(bench, training, measured)
