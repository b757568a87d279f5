"""FSDP2 on the card, which gpu.py checks: NCCL on a GPU, gloo in the rehearsal.

On one process the blocks are sharded over a mesh of one, so that FSDP's hooks, its gathers and its
mixed precision run there; on several processes they share a batch. Both must give the losses of a
model that is not sharded. Every number of processes starts new ones:

    python benchmarks/gpu_ranks.py DEVICE     with RANK, WORLD_SIZE and MASTER_PORT set
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_checks
import torch
import torch.distributed as dist
from gpu_bench import Bench, Item
from peers_train import OpenPalm, Rules
from torch.distributed.device_mesh import init_device_mesh
from train_common import Row, random_batch

from openpalm.data.batches.loader import Batch
from openpalm.parallel import fsdp
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.world import join, leave

STEPS, SEQUENCES = 5, 8
DTYPES = {"float32": 1e-5, "bfloat16": 1e-2}
"""Allowed relative difference of a loss."""
Losses = dict[str, list[float]]


def fsdp_part(bench: Bench) -> Iterator[Item]:
    reference: Losses = {}

    def check(processes: int) -> Iterator[Row]:
        nonlocal reference
        found = started(bench, processes)
        reference = reference or found["plain"]
        for dtype, allowed in DTYPES.items():
            pairs = zip(found["sharded"][dtype], reference[dtype], strict=True)
            worst = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
            name = f"losses with FSDP2 on {processes} process{'es' * (processes > 1)}, {dtype}"
            yield gpu_checks.checked(name, worst, allowed, backend=found["backend"])

    processes = 1
    while processes <= bench.processes:
        yield Item(f"{processes} processes", 25, lambda n=processes: check(n))
        processes *= 2
    if bench.processes == 1:
        row = {"check": "FSDP2 on several processes", "left_out": f"one {bench.device.type} device"}
        yield Item("several", 0, lambda: [row])


def started(bench: Bench, processes: int) -> dict[str, Any]:
    """What the main one of these processes printed: its losses by dtype, and its backend."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = os.environ | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    every |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, bench.device.type]
    running = list[subprocess.Popen[bytes]]()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.txt" for rank in range(processes)]
        try:
            for rank, file in enumerate(files):
                own = every | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with file.open("wb") as out:
                    running.append(subprocess.Popen(command, env=own, stdout=out, stderr=out))
            codes = [each.wait(timeout=max(1.0, bench.left_s - 1)) for each in running]
        finally:
            for each in running:
                each.kill()
                each.wait()
        texts = [file.read_text(encoding="utf-8").strip() for file in files]
    for code, text in zip(codes, texts, strict=True):
        if code:
            raise RuntimeError((text.splitlines() or [f"exit status {code}"])[-1])
    return next(json.loads(line) for line in texts[0].splitlines() if line.startswith("{"))


def work(kind: str) -> None:
    """What each process does; the main one prints a line of JSON."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    batches = [random_batch(gpu_checks.SMALL.vocab_size, SEQUENCES, 64) for _ in range(STEPS)]
    found: dict[str, Any] = {}
    if size == 1:
        found["plain"] = losses(device, batches)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        mesh = init_device_mesh(kind, (1,), mesh_dim_names=("shard",))
        sharding = mock.patch.object(fsdp, "data_mesh", return_value=mesh)
    else:
        join(ParallelSettings(), device)
        sharding = nullcontext()
    with sharding:
        own = [Batch(b.inputs[rank::size], b.targets[rank::size]) for b in batches]
        found["sharded"] = losses(device, own)
    found["backend"] = str(dist.get_backend())
    leave()
    if rank == 0:
        print(json.dumps(found))


def losses(device: torch.device, batches: list[Batch]) -> Losses:
    found: Losses = {}
    for dtype in DTYPES:
        rules = Rules(gpu_checks.SMALL, getattr(torch, dtype), device, steps=STEPS)
        who = OpenPalm(rules)
        found[dtype] = [who.step(batch) for batch in batches]
    return found


if __name__ == "__main__":
    work(sys.argv[1])
