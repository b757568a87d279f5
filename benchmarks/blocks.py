"""Memory, speed and kills of `openpalm data blocks` over texts of several sizes; prints one table.

    python benchmarks/blocks.py TEXT.txt --tokenizer TOKENIZER.json [--megabytes 50 1000]
        [--kills 5] [--scratch DIR] [--seq-len 8192] [--workers 2]

Each text is made from TEXT: passages in random order with some words exchanged. The command runs in
a process of its own; its peak of resident memory is the kernel's. Then it is killed with SIGKILL at
random moments and repeated: the manifest, with the hash of every file, must be the same.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make(megabytes: int, out: Path, text: str) -> None:
    """Documents of 0.5 to 8 kB, none twice."""
    draw, size = random.Random(megabytes), 0
    with out.open("w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            start = draw.randrange(len(text) - 8000)
            words = text[start : start + draw.randrange(500, 8000)].split(" ")
            for _ in range(len(words) // 20):
                i, j = draw.randrange(len(words)), draw.randrange(len(words))
                words[i], words[j] = words[j], words[i]
            row = json.dumps({"text": f"{draw.random()} " + " ".join(words)}) + "\n"
            size += len(row)
            file.write(row)


def run(words: list[str], kill_after_s: float | None = None) -> tuple[float, float]:
    """Seconds, and the peak of resident memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        process.send_signal(signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if kill_after_s is None and process.returncode:
        sys.exit(f"{' '.join(words)}: exit status {process.returncode}")
    return time.perf_counter() - began, used.ru_maxrss / 1024


def digest(out: Path) -> str:
    return hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()[:16]


def check_files(out: Path) -> None:
    """Compares every file with the manifest."""
    from openpalm.data.dataset.shards import open_dataset

    for split in ("train", "val"):
        open_dataset(out).check(split)


def measure(path: Path, scratch: Path, options: list[str], kills: int) -> None:
    megabytes = path.stat().st_size / 1e6
    words = [sys.executable, "-m", "openpalm", "data", "blocks", str(path), *options, "--out"]
    whole = scratch / "whole"
    took, peak = run([*words, str(whole)])
    check_files(whole)
    row(f"{megabytes:.0f} MB", took, peak, megabytes / took, digest(whole))
    if kills:
        draw, out, total, highest = random.Random(0), scratch / "killed", 0.0, 0.0
        for _ in range(kills):
            spent, _ = run([*words, str(out)], draw.uniform(0.1, 0.9) * took / kills + 1)
            total += spent
        spent, highest = run([*words, str(out)])
        check_files(out)
        name = f"{megabytes:.0f} MB, killed {kills} times"
        row(name, total + spent, highest, megabytes / (total + spent), digest(out))
    for folder in (whole, scratch / "killed"):
        shutil.rmtree(folder, ignore_errors=True)


def row(name: str, took: float, peak: float, speed: float, found: str) -> None:
    print(f"| {name} | {took:.0f} | {peak:.0f} | {speed:.2f} | {found} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[50, 1000])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for the texts and blocks")
    parser.add_argument("--seq-len", default="8192")
    parser.add_argument("--workers", default="2")
    given = parser.parse_args()
    options = ["--tokenizer", given.tokenizer, "--seq-len", given.seq_len]
    options += ["--workers", given.workers]
    text = given.text.read_text(encoding="utf-8")
    print("| text | s | peak, MB | MB/s | manifest |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        for megabytes in given.megabytes:
            path = Path(scratch, f"{megabytes}.jsonl")
            make(megabytes, path, text)
            measure(path, Path(scratch), options, given.kills)
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
