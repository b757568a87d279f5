"""Time and memory of converting and loading a model of GPT-J-6B's size, with random weights.

Makes a slim bfloat16 checkpoint of mesh-transformer-jax in 8 shards (12 GB at 28 layers), then
measures, one after the other, removing each output before the next:

- `cp -r` of it followed by sha256sum of the copy, the yardstick of time
- `openpalm convert` to OpenPaLM's format and to Hugging Face's
- `openpalm sample` of the OpenPaLM checkpoint in bfloat16 and int8

    python benchmarks/gptj_conversion.py --folder /tmp/gptj [--layers 28] [--only cp,openpalm]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from openpalm.checkpoint.lazy_state import LazyState
from openpalm.convert.gptj.mesh_write import config_json, write_mesh
from openpalm.convert.gptj.names import joined, part_shapes
from openpalm.model.config import ModelConfig, preset

SHARDS = 8
STEP = 383500


def random_state(config: ModelConfig) -> LazyState:
    """Random bfloat16 weights; equal layers, so that making them takes seconds."""
    shapes, made = part_shapes(config), dict[str, torch.Tensor]()

    def read(name: str) -> torch.Tensor:
        kind = name.split(".", 2)[-1]
        if kind not in made:
            generator = torch.Generator().manual_seed(len(made))
            tensor = torch.randn(shapes[name], generator=generator).mul_(0.02)
            made[kind] = tensor.add_(float("norm.weight" in name)).bfloat16()
        return made[kind]

    return joined(Path("random"), config, read, lambda _: torch.bfloat16)


def make(folder: Path, layers: int) -> Path:
    source = folder / "mesh"
    if not source.is_dir():
        config = replace(preset("gpt-j-6b").config, depth=layers, embedding_bias=True)
        partial = folder / "mesh.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_mesh(partial, config, random_state(config), None, shards=SHARDS, step=STEP)
        (partial / "config.json").write_text(json.dumps(config_json(config, SHARDS)))
        partial.rename(source)
    return source


def measured(*command: object) -> tuple[float, float]:
    """Seconds and peak memory in GB of a process that must succeed."""
    began = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command}: failed with {status}")
    return time.monotonic() - began, used.ru_maxrss / 1e6


def copied(source: Path, target: Path) -> float:
    """Seconds of cp -r and of sha256sum over the copy."""
    began = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    files = sorted(str(path) for path in target.rglob("*.npz"))
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--only", default="cp,openpalm,huggingface,bfloat16,int8")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, for sampling")
    given = parser.parse_args()
    source = make(given.folder, given.layers)
    size = sum(path.stat().st_size for path in source.rglob("*.npz"))
    print(f"{size / 1e9:.1f} GB, {given.layers} layers, {torch.get_num_threads()} threads")
    only = given.only.split(",")
    base = None
    if "cp" in only:
        base = copied(source, given.folder / "copy")
        shutil.rmtree(given.folder / "copy")
        print(f"cp and sha256sum: {base:.1f} s")
    program = (sys.executable, "-m", "openpalm")
    for target in ("huggingface", "openpalm"):
        if target not in only:
            continue
        out = given.folder / target
        shutil.rmtree(out, ignore_errors=True)
        seconds, peak = measured(*program, "convert", source, out, "--to", target)
        ratio = f", {seconds / base:.2f} x" if base else ""
        print(f"convert to {target}: {seconds:.1f} s{ratio}, peak {peak:.2f} GB")
        if target == "huggingface":
            shutil.rmtree(out)
    for dtype in ("bfloat16", "int8"):
        if dtype not in only:
            continue
        how = ("--quantize", "int8") if dtype == "int8" else ("--dtype", dtype)
        words = ("sample", given.folder / "openpalm", "Once upon a time", *how)
        tokens = ("--max-new-tokens", 4, "--tokenizer", given.tokenizer, "--force")
        seconds, peak = measured(*program, *words, *tokens)
        print(f"sample in {dtype}: {seconds:.1f} s, peak {peak:.2f} GB")
    print(f"this process: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
