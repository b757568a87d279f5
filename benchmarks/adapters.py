"""Tokens/s of concurrent streams that have LoRA adapters, against the same streams of the base.

    python benchmarks/adapters.py [--weights float32] [--adapters 1,4] [--streams 8] [--cpu-time]

Decodes random weights of the palm-150m shape with the engine; the adapters have rank 8 on every
matrix. Rounds are interleaved, the figures are medians. --cpu-time counts the process's processor
time, for a machine that is busy with other work; set OMP_NUM_THREADS=1 with it.
"""

import argparse
import random
import statistics
import time

import torch

from openpalm.generate.adapters import Adapter, pack
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.config import LORA_TARGETS, LoraConfig, preset
from openpalm.model.lora import INPUTS
from openpalm.model.transformer import Transformer, initialise

CONFIG = preset("palm-150m").config
LORA = LoraConfig(8, 16.0, LORA_TARGETS)
PROMPT = 32


def random_adapter(engine: Engine, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(CONFIG.depth):
        for target, (rows, columns) in CONFIG.matrices.items():
            side = "project_in" if target in INPUTS else "project_out"
            name = f"blocks.{layer}.{side}.lora.{target}"
            factors[f"{name}.a"] = torch.randn(LORA.rank, columns, generator=generator) / 30
            factors[f"{name}.b"] = torch.randn(rows, LORA.rank, generator=generator) / 30
    return pack(engine.model, LORA, factors)


def decode(engine: Engine, adapters: list[Adapter | None], new: int, clock, draw) -> float:
    """Tokens/s of one round, from the second token of every stream on."""
    for stream in range(engine.slots):
        prompt = [draw.randrange(CONFIG.vocab_size) for _ in range(PROMPT)]
        adapter = adapters[stream % len(adapters)]
        engine.submit(Request(prompt, new, Sampling(temperature=0), adapter=adapter))
    tokens = 0
    while tokens < engine.slots:  # prefill
        tokens += len(engine.step())
    began, before = clock(), tokens
    while engine.busy:
        tokens += len(engine.step())
    return (tokens - before) / (clock() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default="float32", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--adapters", default="1,4")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    how = parser.parse_args()
    clock = time.process_time if how.cpu_time else time.perf_counter
    draw = random.Random(0)
    model = Transformer(CONFIG).requires_grad_(False)
    initialise(model, seed=0)
    engine = Engine(model, slots=how.streams, weights=how.weights)
    numbers = [0, *map(int, how.adapters.split(","))]
    made = [random_adapter(engine, seed) for seed in range(max(numbers))]
    found: dict[int, list[float]] = {number: [] for number in numbers}
    decode(engine, [None], 4, clock, draw)  # the first call warms up
    for _ in range(how.rounds):
        for number, speeds in found.items():
            speeds.append(decode(engine, [*made[:number]] or [None], how.new, clock, draw))
    base = statistics.median(found[0])
    print(f"{how.weights}, {how.streams} streams\n")
    print("| adapters | tokens/s | of the base |\n|---|---|---|")
    for number, speeds in found.items():
        speed = statistics.median(speeds)
        print(f"| {number} | {speed:.1f} | {speed / base:.2f} |")


if __name__ == "__main__":
    main()
