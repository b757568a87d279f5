"""Speed and memory of data preparation, compared with other ways to tokenize; prints one table.

    python benchmarks/data.py --make 1000 big.jsonl       # 1000 MB of text
    python benchmarks/data.py big.jsonl --tokenizer TOKENIZER.json [--rounds 3] [--megabytes 40]
    python benchmarks/data.py big.jsonl --tokenizer TOKENIZER.json --hashes [--kills 5]

The first table: the whole command `openpalm data prepare`, `encode_batch_fast` alone on texts that
are in memory into a preallocated array, and the `datasets.map` recipe of conceptofmind's C4
datasets (tokenize in batches, then group into 8192; needs
datasets and transformers). Each in a
process of its own, in turn; medians of the rounds. The second: the dataset's digest and the peak of
resident memory above the start with 1, 2 and 4 threads, and killed at random moments.
"""

import argparse
import json
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GROUP_TOKENS = 8192


def make(megabytes: int, out: Path, texts: list[str]) -> None:
    """Documents of 0.2 to 12 kB: lines of `texts` in new order, words changed here and there."""
    draw = random.Random(0)
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    size = 0
    with out.open("w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            start, count = draw.randrange(len(lines)), draw.randrange(5, 300)
            words = "\n".join(lines[start : start + count]).split(" ")
            for _ in range(len(words) // 20):
                i, j = draw.randrange(len(words)), draw.randrange(len(words))
                words[i], words[j] = words[j], words[i]
            row = json.dumps({"text": f"{draw.random()} " + " ".join(words)}) + "\n"
            size += len(row)
            file.write(row)


def peak_mb() -> float:
    """The most this process has had resident."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def encode_alone(path: Path, tokenizer: str) -> float:
    import numpy as np
    from tokenizers import Tokenizer

    inner, texts = Tokenizer.from_file(tokenizer), read(path)
    ready = np.zeros(sum(len(text.encode()) for text in texts), dtype=np.uint16)
    began, at = time.perf_counter(), 0
    for start in range(0, len(texts), 1000):
        for found in inner.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False):
            ids = found.ids
            ready[at : at + len(ids)] = ids
            at += len(ids)
    return time.perf_counter() - began


def datasets_map(path: Path, tokenizer: str) -> float:
    """The published recipe: transformers' tokenizer and two maps, a process a core; saved."""
    import os
    from itertools import chain

    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    inner = PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|endoftext|>")

    def tokenize(rows):
        return inner([text + inner.eos_token for text in rows["text"]])

    def group(rows):
        joined = {name: list(chain(*column)) for name, column in rows.items()}
        total = len(next(iter(joined.values())))
        total -= total % GROUP_TOKENS if total >= GROUP_TOKENS else 0
        steps = range(0, total, GROUP_TOKENS)
        return {n: [ids[i : i + GROUP_TOKENS] for i in steps] for n, ids in joined.items()}

    with tempfile.TemporaryDirectory() as cache:
        began, cores = time.perf_counter(), os.cpu_count()
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        rows = rows.map(tokenize, batched=True, remove_columns=["text"], num_proc=cores)
        rows.map(group, batched=True, num_proc=cores).save_to_disk(f"{cache}/out")
        return time.perf_counter() - began


def prepare_words(path: Path, tokenizer: str, out: Path, threads: int | None) -> list[str]:
    words = ["data", "prepare", str(path), "--tokenizer", tokenizer, "--out", str(out), "--json"]
    return words + (["--workers", str(threads)] if threads else [])


def prepare_here(words: list[str]) -> int:
    """The command in this process; the last line says what it needed of memory."""
    from openpalm.cli.main import main

    before = peak_mb()
    status = main(words)
    print(json.dumps({"peak_mb": peak_mb() - before}))
    return status


def in_process(*words: str) -> tuple[str, float, float]:
    """What it says, and the seconds and CPU seconds that all of it took."""
    argv = [sys.executable, __file__, "--inside", *words]
    began, before = time.perf_counter(), cpu_seconds()
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return said, time.perf_counter() - began, cpu_seconds() - before


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(path: Path, tokenizer: str, rounds: int, megabytes: int) -> None:
    contenders = ["openpalm data prepare", "encode_batch_fast alone", "datasets.map recipe"]
    elapsed: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as scratch:
        sample = Path(scratch) / "sample.jsonl"
        with path.open("rb") as file, sample.open("wb") as out:
            out.writelines(file.readlines(megabytes * 10**6))
        size = sum(len(text.encode()) for text in read(sample))
        for round_ in range(rounds):
            words = prepare_words(sample, tokenizer, Path(scratch, str(round_)), None)
            for name, how, given in (
                (contenders[0], "prepare", words),
                (contenders[1], "encode", [str(sample), tokenizer]),
                (contenders[2], "map", [str(sample), tokenizer]),
            ):
                said, whole, used = in_process(how, *given)
                # The command counts from the start of its process, the others from the first call.
                elapsed[name].append(whole if how == "prepare" else float(said.splitlines()[-1]))
                cpu[name].append(used)
    ours = statistics.median(elapsed[contenders[0]])
    print("| | MB/s | CPU s | ours against it |\n|---|---|---|---|")
    for name in contenders:
        median, used = statistics.median(elapsed[name]), statistics.median(cpu[name])
        print(f"| {name} | {size / median / 1e6:.2f} | {used:.1f} | {median / ours:.2f} |")


def hashes(path: Path, tokenizer: str, threads: list[int], kills: int) -> None:
    print("| | s | digest | peak above start, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for count in threads:
            out = Path(scratch, str(count))
            said, took, _ = in_process("prepare", *prepare_words(path, tokenizer, out, count))
            row(f"{count} threads", took, out, json.loads(said.splitlines()[-1])["peak_mb"])
        if kills:
            killed(path, tokenizer, Path(scratch, "killed"), kills, took)


def killed(path: Path, tokenizer: str, out: Path, kills: int, expected_s: float) -> None:
    draw, began = random.Random(1), time.perf_counter()
    words = ["--inside", "prepare", *prepare_words(path, tokenizer, out, 2)]
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 1) * expected_s / kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
    said, _, _ = in_process(*words[1:])
    peak = json.loads(said.splitlines()[-1])["peak_mb"]
    row(f"2 threads, killed {kills} times", time.perf_counter() - began, out, peak)


def row(name: str, took: float, out: Path, peak: float) -> None:
    from openpalm.data.dataset.shards import open_dataset

    digest = open_dataset(out).manifest.digest
    print(f"| {name} | {took:.0f} | {digest[:16]} | {peak:.0f} |", flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        kind, *words = sys.argv[2:]
        if kind == "prepare":
            return prepare_here(words)
        print((encode_alone if kind == "encode" else datasets_map)(Path(words[0]), words[1]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--make", type=int, metavar="MB")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="more to make it of")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--hashes", action="store_true")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    if given.make:
        from openpalm.data.corpus.builtin import BUILTINS

        texts = [document.text for document in BUILTINS["python-docs"]()]
        make(given.make, given.file, texts + [path.read_text() for path in given.texts])
    elif given.hashes:
        hashes(given.file, given.tokenizer, given.threads, given.kills)
    else:
        compare(given.file, given.tokenizer, given.rounds, given.megabytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
