"""The first run on a GPU: agreement with the CPU, ceilings, training and decoding, in six minutes.

    python benchmarks/gpu.py [--out gpu.jsonl] [--parts agreement,ceilings,...] [--peer FOLDER]
    python benchmarks/gpu.py --tiny     rehearsal in seconds, on a CPU too

Parts, smallest risk first; each row is printed, and written to --out, as soon as it is known, and
a part that fails prints its error and leaves the others their turn (exit 1 at the end):

agreement  logits, engine, optimizers, a resumed run, gradients also compiled: see gpu_checks.py
ceilings   best rates of an 8192 x 8192 x 8192 matrix product and of a copy on the device
attention  time and memory of one layer's attention, each way that torch can be asked for it
training   tokens/s, share of the measured product's rate and peak memory of whole steps (forward,
           backward, clip, fused AdamW) in bfloat16 autocast, also compiled, also palm-rlhf-pytorch
           (--peer names a folder that it is installed in); and what the GPU's time went to
decoding   tokens/s of the engine in bfloat16, and the share of the copy's rate that reading the
           weights and the cache once a step takes

`mfu` is (6 N + 12 L h head_dim T) x tokens/s / ceiling as in the PaLM paper, appendix B: it counts
the whole square of attention. `mfu_causal` counts the half that is computed.
"""

import argparse
import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decode
import gpu_checks
import torch
import torch.nn.functional as F
from peers_train import Contender, OpenPalm, PalmRlhfFlash, Rules, flops_per_token
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_common import Row, random_batch, sized, step_seconds

from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.sizing.measure import matmul_flops

ROWS = {"palm-150m": 8, "palm-410m": 4, "palm-1b": 2}
"""Sequences of a step to try first; half as many where memory runs out."""
PEER_ROWS = 2
"""It hands torch a mask of every row and head: cuDNN fails from 2^31 of its entries on."""
PART_S = 150
"""Most seconds of a part: building and compiling must not take the other parts' time."""


@dataclass
class Bench:
    """What the parts share: where to run, how large, and the ceilings once measured."""

    device: torch.device
    tiny: bool
    peer: Path | None
    """folder of palm-rlhf-pytorch"""
    minutes: float
    started: float
    models: list[str]
    matmul: float = 0.0
    """FLOP/s"""
    copy: float = 0.0
    """bytes/s, read and written"""

    def config(self, name: str) -> ModelConfig:
        if self.tiny:
            return replace(sized("palm-tiny", 64), dim=64, depth=2, ff_dim=128)
        return sized(name, 8192)

    @property
    def left_s(self) -> float:
        return self.minutes * 60 - (time.monotonic() - self.started)


def agreement(bench: Bench) -> Iterator[Row]:
    backend = "eager" if bench.tiny else "inductor"
    yield from gpu_checks.logits(bench.device)
    yield from gpu_checks.engine(bench.device)
    yield from gpu_checks.optimizers(bench.device)
    yield from gpu_checks.resumed(bench.device)
    yield from gpu_checks.gradients(bench.device, backend)


def ceilings(bench: Bench) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        rate = matmul_flops(bench.device, dtype, repeats=2 if bench.tiny else 20)
        yield {"ceiling": f"matrix product, {dtype}", "tflop_per_s": rate / 1e12}
        bench.matmul = bench.matmul or rate  # bfloat16's
    source = torch.randn((1 << 20) if bench.tiny else (1 << 30), device=bench.device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), bench.device)
    bench.copy = 2 * source.nbytes / seconds
    yield {"ceiling": "copy on the device, read and written", "gb_per_s": bench.copy / 1e9}


def fastest(work: Callable[[], Any], device: torch.device, repeats: int = 8) -> float:
    """Seconds of the best of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attention(bench: Bench) -> Iterator[Row]:
    """Causal attention of palm-150m's shape, forward and backward, by dtype, form and kernel."""
    length = 64 if bench.tiny else 8192
    kernels = {"chosen": None, "flash": SDPBackend.FLASH_ATTENTION}
    kernels |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for dtype in (torch.bfloat16, torch.float32):
        for form in ("gqa", "repeated", "expanded", "masked gqa", "masked expanded"):
            for name, kernel in kernels.items():
                row = {"attention": form, "dtype": str(dtype), "kernel": name}
                yield row | attended(bench.device, dtype, form, length, kernel)


def attended(
    device: torch.device, dtype: torch.dtype, form: str, length: int, kernel: SDPBackend | None
) -> Row:
    q = torch.randn(1, length, 8, 128, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(1, length, 1, 128, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    causal = torch.ones(1, 1, length, length, device=device, dtype=torch.bool).tril()
    masked, gqa = "masked" in form, "gqa" in form

    def work() -> None:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if "expanded" in form:
            keys, values = (x.expand(-1, 8, -1, -1) for x in (keys, values))
        elif form == "repeated":
            keys, values = (x.repeat_interleave(8, 1) for x in (keys, values))
        how: dict[str, Any] = {"attn_mask": causal} if masked else {"is_causal": True}
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=gqa, **how)
        out.sum().backward()

    with memory(device) as peak:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kernel is None:
                    seconds = fastest(work, device, 3)
                else:
                    with sdpa_kernel(kernel):
                        seconds = fastest(work, device, 3)
        except RuntimeError as error:
            return {"left_out": str(error).split("\n")[0][:80]}
    return {"ms": seconds * 1e3, **peak}


@contextmanager
def memory(device: torch.device) -> Iterator[Row]:
    """Afterwards `peak_gb` of what was allocated inside."""
    measured: Row = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield measured
    if device.type == "cuda":
        measured["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9


def training(bench: Bench) -> Iterator[Row]:
    for model in bench.models:
        yield from trained(bench, model, OpenPalm, profiled=model == bench.models[0])
        if bench.peer is not None and model != "palm-1b":
            yield from peer_alone(bench, model)


def peer_alone(bench: Bench, model: str) -> Iterator[Row]:
    """The peer in a process of its own: a kernel that fails leaves a CUDA context unusable."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, __file__, "--parts", "peer_training", "--models", model]
        command += ["--out", out, "--peer", bench.peer, "--device", bench.device.type]
        command += ["--ceiling", str(bench.matmul), *(["--tiny"] if bench.tiny else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=bench.left_s)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = [row for row in rows if row["part"] == "peer_training" and "error" not in row]
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    missing = {"training": model, "who": PalmRlhfFlash.name, "left_out": last}
    for row in found or [missing]:
        yield {name: value for name, value in row.items() if name != "part"}


def peer_training(bench: Bench) -> Iterator[Row]:
    """One row of palm-rlhf-pytorch for each model, on fewer sequences where it fails."""
    for model in bench.models:
        yield from trained(bench, model, PalmRlhfFlash)


def trained(
    bench: Bench, model: str, make: Callable[[Rules], Contender], profiled: bool = False
) -> Iterator[Row]:
    config = bench.config(model)
    rules = Rules(config, torch.bfloat16, bench.device)
    who = make(rules)
    row = {"training": model, "who": who.name, "length": config.context}
    try:
        most = ROWS[model] if isinstance(who, OpenPalm) else PEER_ROWS
        rows, eager = stepped(bench, who, most)
        yield row | eager
        if profiled:
            yield from spent(bench, who, rows)
        if isinstance(who, OpenPalm) and bench.left_s > 60:
            ready = gpu_checks.compile_blocks(who, "eager" if bench.tiny else "inductor")
            start = time.monotonic()
            who.step(random_batch(config.vocab_size, rows, config.context))
            seconds = time.monotonic() - start
            first = {"who": "OpenPaLM, compiled", "first_step_s": seconds, **ready()}
            yield row | first | stepped(bench, who, rows)[1]
            if profiled:
                yield from spent(bench, who, rows)
    finally:
        del who
        clear()


def stepped(bench: Bench, who: Contender, rows: int) -> tuple[int, Row]:
    """Rows that fit, and the speed of steps on them."""
    config = who_config(who)
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
    return rows, measured | peak


def who_config(who: Contender) -> ModelConfig:
    return who._trainer.model.config if isinstance(who, OpenPalm) else who.rules.config  # type: ignore[attr-defined]


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def spent(bench: Bench, who: Contender, rows: int) -> Iterator[Row]:
    """The kernels that a step's time on the GPU went to, longest first."""
    config = who_config(who)
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


def decoding(bench: Bench) -> Iterator[Row]:
    new = 16 if bench.tiny else 128
    for name in ("palm-150m", "palm-410m"):
        config = bench.config(name)
        model = Transformer(config).to(bench.device)
        initialise(model, seed=0)
        for batch in (1, 32):
            decoder = decode.ours(model, "bfloat16", slots=batch)
            cold = decoder(batch, new)
            seconds = decoder(batch, new)
            rate = batch * (new - 1) / seconds
            cache = batch * config.kv_bytes_per_token(2) * (decode.PROMPT + new / 2)
            read = 2 * config.parameters + cache
            row = {"decoding": name, "batch": batch, "tokens_per_s": rate}
            share = {"share_of_copy": rate / batch * read / bench.copy} if bench.copy else {}
            yield row | {"step_ms": batch / rate * 1e3, "first_pass_s": cold} | share
        del model, decoder
        clear()


PARTS = {
    part.__name__: part
    for part in (agreement, ceilings, decoding, attention, training, peer_training)
}
ORDER = ("agreement", "ceilings", "decoding", "attention", "training")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def measure(bench: Bench, parts: list[str], out: Path | None) -> bool:
    """Runs the parts; returns whether every check held and nothing failed."""
    good = True
    for part in parts:
        try:
            with at_most(min(bench.left_s, PART_S if part != "training" else bench.left_s)):
                for row in PARTS[part](bench):
                    good &= row.get("ok", True)
                    tell(part, row, out)
        except Exception as error:
            good = False
            traceback.print_exc()
            tell(part, {"error": f"{type(error).__name__}: {error}"[:300]}, out)
        with suppress(RuntimeError):  # of a failed kernel, which was already reported
            clear()
    return good


def tell(part: str, row: Row, out: Path | None) -> None:
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps({"part": part} | row) + "\n")
    print(f"{part:<10} {'  '.join(f'{k} {spelt(v)}' for k, v in row.items())}", flush=True)


def spelt(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file that rows are appended to, JSON lines")
    parser.add_argument("--parts", default=",".join(ORDER), help="in this order")
    parser.add_argument("--models", default="palm-150m,palm-410m,palm-1b", help="that are trained")
    parser.add_argument("--peer", type=Path, help="folder that palm-rlhf-pytorch is installed in")
    parser.add_argument("--ceiling", type=float, default=0.0, help="FLOP/s, where known already")
    parser.add_argument("--minutes", type=float, default=6, help="for everything")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="rehearse with small shapes")
    return parser.parse_args()


def main() -> int:
    how = parsed()
    if how.peer is not None:
        sys.path.append(str(how.peer))  # last: what the environment has itself stays first
    device = torch.device(how.device)
    started = time.monotonic()
    models = how.models.split(",")
    bench = Bench(device, how.tiny, how.peer, how.minutes, started, models)
    bench.matmul = how.ceiling
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tell("machine", {"device": name, "torch": torch.__version__, "tiny": how.tiny}, how.out)
    return 0 if measure(bench, how.parts.split(","), how.out) else 1


if __name__ == "__main__":
    sys.exit(main())
