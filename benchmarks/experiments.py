"""What the options of a run buy at laptop scale: one run a variant, learning rate and seed.

    python benchmarks/experiments.py variants RUNS
    python benchmarks/experiments.py extrapolation RUNS --text tinyshakespeare.txt
    python benchmarks/experiments.py draw

The first two train with the command line's own `train` and add a line a run to the logs under
benchmarks/experiments/; a run that has its line is not run again. The last one needs no training:
it prints docs/experiments.md's tables from the logs and draws its figures.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
LOGS = HERE / "experiments"
Row = dict[str, Any]

RATES = (3e-3, 6e-3, 1.2e-2)
MUON_RATES = (1e-2, 2e-2, 4e-2)
TUNING_SEED, FRESH_SEEDS = 0, (1, 2, 3)
STABILITY = 4
"""times the best rate"""
T_95 = {2: 12.706, 3: 4.303}
"""two-sided 95 % quantile of Student's t for so many seeds"""


class Variant(NamedTuple):
    """One change to the baseline."""

    options: tuple[str, ...] = ()
    rates: tuple[float, ...] = RATES


BASELINE = "AdamW"
VARIANTS = {
    BASELINE: Variant(),
    "query/key norm": Variant(("--arch.qk-norm",)),
    "xPos": Variant(("--arch.xpos-base", "512")),
    "StableAdamW": Variant(("--optim.name", "stable-adamw")),
    "Muon": Variant(("--optim.name", "muon"), MUON_RATES),
    "z-loss": Variant(("--z-loss", "1e-4")),
}
STEPS, BATCH_TOKENS = 160, 2048
TRAINED = 512
"""tokens of a training sequence in the extrapolation"""
LENGTHS = (512, 1024, 2048, 4096)
EDGES = (0, 64, 256, 512, 1024, 2048, 4096)
"""boundaries of the ranges of positions with separate losses"""
POSITIONS = {"rotary": (), "xPos": ("--arch.xpos-base", "512")}


def read(name: str) -> list[Row]:
    path = LOGS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(name: str, row: Row) -> None:
    LOGS.mkdir(exist_ok=True)
    with (LOGS / name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def openpalm(*command: str) -> None:
    from openpalm.cli.main import main

    if status := main(command):
        raise SystemExit(status)


def prepare(data: Path, *options: str) -> None:
    if not (data / "manifest.json").exists():
        openpalm("data", "prepare", *options, "--out", str(data))


def train(out: Path, data: Path, seed: int, *options: str) -> list[Row]:
    """The rows of a run of `openpalm train`, which resumes if it was interrupted."""
    from openpalm.train.logging.metrics import read_rows

    fixed = (
        "--model",
        "palm-tiny",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--keep-checkpoints",
        "1",
    )
    places = ("--data", str(data), "--out", str(out), "--seed", str(seed))
    openpalm("train", *fixed, *places, *options)
    return read_rows(out / "metrics.jsonl")


def rate_options(variant: Variant, rate: float) -> tuple[str, ...]:
    """Muon's rate goes up and down together with that of its AdamW."""
    if variant.rates is RATES:
        return ("--optim.lr", str(rate))
    adamw = RATES[1] * rate / MUON_RATES[1]
    return ("--optim.lr", f"{adamw:.6g}", "--optim.muon-lr", str(rate))


def key(row: Row) -> tuple[str, float, int]:
    return row["variant"], row["lr"], row["seed"]


def one(name: str, rate: float, seed: int, runs: Path) -> None:
    """Trains unless the log has it."""
    if (name, rate, seed) in map(key, read("variants.jsonl")):
        return
    variant = VARIANTS[name]
    length = ("--steps", str(STEPS), "--batch-tokens", str(BATCH_TOKENS))
    rare = ("--eval-every", str(STEPS), "--save-every", str(STEPS))
    out = runs / f"{name.replace('/', '-').replace(' ', '-')}-{rate:g}-{seed}"
    options = (*length, *rare, *variant.options, *rate_options(variant, rate))
    rows = train(out, runs / "docs", seed, *options)
    steps = [row for row in rows if "loss" in row]
    found = {"variant": name, "lr": rate, "seed": seed, "val_loss": rows[-1]["val_loss"]}
    found["skipped"] = sum("skipped" in row for row in steps)
    found["loss"] = [round(row["loss"], 3) for row in steps]
    append("variants.jsonl", found)


def best_rate(rows: Iterable[Row], name: str) -> float:
    """Of the rates that were tried, on the tuning seed."""
    tried = [row for row in rows if row["seed"] == TUNING_SEED and row["variant"] == name]
    searched = [row for row in tried if row["lr"] in VARIANTS[name].rates]
    return min(searched, key=lambda row: row["val_loss"])["lr"]


def variants(runs: Path, seeds: int) -> None:
    prepare(runs / "docs", "builtin:python-docs", "--tokenizer", "bpe:1024")
    for name, variant in VARIANTS.items():
        for rate in variant.rates:
            one(name, rate, TUNING_SEED, runs)
    rates = {name: best_rate(read("variants.jsonl"), name) for name in VARIANTS}
    for seed in FRESH_SEEDS[:seeds]:
        for name, rate in rates.items():
            one(name, rate, seed, runs)


def stability(runs: Path) -> None:
    for name in VARIANTS:
        rate = STABILITY * best_rate(read("variants.jsonl"), name)
        one(name, rate, TUNING_SEED, runs)


def by_range(model: Any, tokens: Any) -> list[float]:
    """Nats a token in each range of positions, over windows that overlap by half.

    tokens: int64 [n], longer than a window; every range reads nearly the same text.
    """
    import torch

    from openpalm.align.logprobs import token_log_probs

    sums, windows = torch.zeros(EDGES[-1], dtype=torch.float64), 0
    for start in range(0, len(tokens) - EDGES[-1], EDGES[-1] // 2):
        window = tokens[start : start + EDGES[-1] + 1]
        with torch.no_grad():
            sums -= token_log_probs(model, window[None, :-1], window[None, 1:])[0].double()
        windows += 1
    ends = pairwise(EDGES)
    return [round(float(sums[a:b].mean()) / windows, 4) for a, b in ends]


def extrapolate(name: str, seed: int, runs: Path, steps: int) -> None:
    if (name, seed) in ((row["positions"], row["seed"]) for row in read("extrapolation.jsonl")):
        return
    import torch

    from openpalm.checkpoint import directory as checkpoint
    from openpalm.data.dataset.shards import open_dataset
    from openpalm.evaluate.perplexity import dataset_loss

    out, data = runs / f"long-{name}-{seed}", runs / "long"
    length = ("--steps", str(steps), "--batch-tokens", "2048", "--sequence-length", str(TRAINED))
    rare = ("--eval-every", str(steps), "--save-every", str(steps))
    train(out, data, seed, *length, *rare, "--optim.name", "muon", *POSITIONS[name])
    model, dataset = checkpoint.load(checkpoint.resolve(out), "cpu"), open_dataset(data)
    found: Row = {"positions": name, "seed": seed, "steps": steps, "nats": {}}
    for tokens in LENGTHS:
        result = dataset_loss(model, dataset, "val", tokens, torch.float32)
        found["nats"][str(tokens)] = round(result.nats_per_token, 4)
    held_out = torch.from_numpy(dataset.tokens("val")[:].astype("int64"))
    append("extrapolation.jsonl", found | {"by_range": by_range(model, held_out)})


def extrapolation(runs: Path, text: str, seeds: int, steps: int) -> None:
    prepare(runs / "long", text, "--tokenizer", "byte", "--val", "tail:0.1")
    for seed in range(1, 1 + seeds):
        for name in POSITIONS:
            extrapolate(name, seed, runs, steps)


class Compared(NamedTuple):
    """A variant against the baseline at each one's best rate, over the fresh seeds."""

    rate: float
    loss: float
    difference: float
    half_width: float
    """of the 95 % interval of the difference"""

    @property
    def verdict(self) -> str:
        if abs(self.difference) <= self.half_width:
            return "no difference seen"
        return "lower" if self.difference < 0 else "higher"


def compare(rows: list[Row], name: str) -> Compared:
    """Differences are paired by seed: the same first weights and the same order of the data."""
    losses = {key(row): row["val_loss"] for row in rows}
    rate, base = best_rate(rows, name), best_rate(rows, BASELINE)
    seeds = [seed for seed in FRESH_SEEDS if (name, rate, seed) in losses]
    found = [losses[name, rate, seed] for seed in seeds]
    paired = [losses[name, rate, seed] - losses[BASELINE, base, seed] for seed in seeds]
    half_width = T_95[len(paired)] * statistics.stdev(paired) / len(paired) ** 0.5
    return Compared(rate, statistics.mean(found), statistics.mean(paired), half_width)


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def variants_table(rows: list[Row]) -> str:
    lines = []
    for name in VARIANTS:
        found = compare(rows, name)
        result = f"{found.difference:+.3f} ± {found.half_width:.3f}", found.verdict
        paired = ("", "") if name == BASELINE else result
        lines.append((name, f"{found.rate:g}", f"{found.loss:.3f}", *paired))
    return table(("variant", "rate", "nats per token", "less the baseline's", "seen"), lines)


def search_table(rows: list[Row]) -> str:
    losses, lines = {key(row): row["val_loss"] for row in rows}, []
    for name, variant in VARIANTS.items():
        tried = (f"{losses[name, rate, TUNING_SEED]:.3f} at {rate:g}" for rate in variant.rates)
        fast = STABILITY * best_rate(rows, name)
        faster = losses.get((name, fast, TUNING_SEED))
        result = "not run" if faster is None else f"{faster:.3f} at {fast:g}"
        lines.append((name, *tried, result))
    return table(("variant", "lowest", "middle", "highest", "4 times the best"), lines)


def by_positions(rows: list[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row["positions"] == name] for name in POSITIONS}


def spread(values: list[float]) -> str:
    """The mean, and from the lowest to the highest."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def extrapolation_tables(rows: list[Row]) -> str:
    found, lengths, ranges = by_positions(rows), [], []
    for n in LENGTHS:
        losses = ([row["nats"][str(n)] for row in runs] for runs in found.values())
        lengths.append((f"{n:,}", *map(spread, losses)))
    for i, (a, b) in enumerate(pairwise(EDGES)):
        losses = ([row["by_range"][i] for row in runs] for runs in found.values())
        ranges.append((f"{a:,} to {b - 1:,}", *map(spread, losses)))
    first, second = ("window, tokens", *found), ("positions in windows of 4,096", *found)
    return f"{table(first, lengths)}\n\n{table(second, ranges)}"


def smooth(values: list[float], width: int = 9) -> list[float]:
    return [statistics.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def draw_variants(rows: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (curves, rates) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, variant) in enumerate(VARIANTS.items()):
        best = best_rate(rows, name)
        fresh = [r["loss"] for r in rows if key(r)[:2] == (name, best) and r["seed"] in FRESH_SEEDS]
        mean = smooth([statistics.mean(losses) for losses in zip(*fresh, strict=True)])
        style = {"color": f"C{i}", "linewidth": 1.2, "label": name}
        curves.plot(range(1, len(mean) + 1), mean, **style)
        tried = sorted(
            (r["lr"] / variant.rates[1], r["val_loss"])
            for r in rows
            if r["variant"] == name and r["seed"] == TUNING_SEED
        )
        rates.plot(*zip(*tried, strict=True), marker="o", markersize=4, **style)
    first = max(fresh[0][STEPS // 20 :])
    curves.set(xlabel="step", ylabel="training loss, nats per token", ylim=(None, first))
    rates.set(xlabel="learning rate over the middle one that was tried", xscale="log")
    rates.set(ylabel="validation, nats per token")
    ticks = sorted({r["lr"] / VARIANTS[r["variant"]].rates[1] for r in rows})
    rates.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    rates.minorticks_off()
    curves.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_extrapolation(rows: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (windows, ranges) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    middles = [max(a, b / 2) * 2**0.5 for a, b in pairwise(EDGES)]
    for i, (name, runs) in enumerate(by_positions(rows).items()):
        for j, run in enumerate(runs):
            style = {"color": f"C{i}", "marker": "o", "markersize": 4, "linewidth": 1.2}
            label = None if j else name
            windows.plot(LENGTHS, run["nats"].values(), label=label, **style)
            ranges.plot(middles, run["by_range"], label=label, **style)
    windows.set(xlabel="tokens in a window", ylabel="nats per token", xscale="log")
    windows.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    ranges.set(xlabel="position in windows of 4,096", xscale="log")
    ranges.set_xticks(EDGES[1:], [f"{n:,}" for n in EDGES[1:]])
    for panel in (windows, ranges):
        panel.minorticks_off()
        panel.axvline(TRAINED, color="0.7", linewidth=1, zorder=0)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw() -> None:
    docs = HERE.parent / "docs"
    if rows := read("variants.jsonl"):
        print(f"{variants_table(rows)}\n\n{search_table(rows)}\n")
        draw_variants(rows, docs / "experiments.png")
    if rows := read("extrapolation.jsonl"):
        print(extrapolation_tables(rows))
        draw_extrapolation(rows, docs / "extrapolation.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["variants", "stability", "extrapolation", "draw"])
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/experiments"))
    parser.add_argument("--text", default="builtin:python-docs", help="of the extrapolation")
    parser.add_argument("--seeds", type=int, default=3, help="fresh ones, 2 or 3")
    parser.add_argument("--steps", type=int, default=300, help="of the extrapolation")
    how = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if how.what == "variants":
        variants(how.runs, how.seeds)
    elif how.what == "stability":
        stability(how.runs)
    elif how.what == "extrapolation":
        extrapolation(how.runs, how.text, how.seeds, how.steps)
    else:
        draw()


if __name__ == "__main__":
    main()
