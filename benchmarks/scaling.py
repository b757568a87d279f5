"""Scaling rules of `openpalm train --depth`: the small runs and the fit to their results.

    python benchmarks/scaling.py [--data DIR] [--runs scaling.csv] [--picture docs/scaling.png]

DIR: `openpalm data prepare builtin:python-docs --out DIR --tokenizer bpe:1024`. A sweep is a line
of runs that differ in one setting, by factors of two; it continues until the best run has a worse
one on either side. Runs in the csv are not repeated, so a stopped sweep resumes; without --data
only the fit is computed.
"""

import argparse
import csv
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from openpalm.data.batches.loader import evaluation_batches, token_loader
from openpalm.data.dataset.shards import Dataset, open_dataset
from openpalm.evaluate.perplexity import split_loss
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import OptimSettings
from openpalm.train.objective import NextToken
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer

LENGTH = 256


@dataclass(frozen=True)
class Run:
    """One training run: what its loss depends on."""

    depth: int
    optimizer: str
    lr: float
    """AdamW learning rate: of all parameters, or with muon of the embedding and the norms"""
    muon_lr: float = 0.02
    batch_tokens: int = 2048
    weight_decay: float = 0.1
    tokens: int = 1 << 19
    seed: int = 0


def of_depth(depth: int, vocab: int) -> ModelConfig:
    dim = 64 * depth
    return ModelConfig(vocab, dim, depth, depth, 64, 4 * dim, context=LENGTH)


def trained(run: Run, data: Dataset) -> float:
    """Validation loss of the run in nats per token."""
    torch.manual_seed(run.seed)
    model = Transformer(of_depth(run.depth, data.tokenizer().vocab_size))
    initialise(model, run.seed)
    settings = OptimSettings(
        name="muon" if run.optimizer == "muon" else "adamw",
        muon_lr=run.muon_lr,
        weight_decay=run.weight_decay,
    )
    steps, rows = run.tokens // run.batch_tokens, run.batch_tokens // LENGTH
    held = min(rows, 16)
    loader = token_loader(data.tokens("train"), sequence_length=LENGTH, rows=held, seed=run.seed)
    trainer = Trainer(
        model,
        NextToken(),
        Optimizer(model, settings, run.lr),
        loader,
        steps=steps,
        accumulation=rows // held,
        dtype=torch.bfloat16,
    )
    for _ in range(steps):
        trainer.train_step()
    model.eval()
    batches = evaluation_batches(data.tokens("val"), sequence_length=LENGTH, rows=32)
    return split_loss(model, batches, 1, torch.float32).nats_per_token


class Runs:
    """The runs of a csv, which grows by those that it lacks."""

    def __init__(self, path: Path, data: Dataset | None):
        self.path, self.data = path, data
        self.losses: dict[Run, float] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    loss = float(row.pop("val_loss"))
                    kinds = {field.name: field.type for field in fields(Run)}
                    self.losses[Run(**{n: kinds[n](v) for n, v in row.items()})] = loss

    def loss(self, run: Run) -> float:
        if run not in self.losses:
            assert self.data is not None
            self.losses[run] = round(trained(run, self.data), 5)
            self._write()
            print(f"{run}: {self.losses[run]}", flush=True)
        return self.losses[run]

    def _write(self) -> None:
        rows = [asdict(run) | {"val_loss": loss} for run, loss in self.losses.items()]
        with self.path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    def sweep(self, start: Run, field: str) -> Run:
        """The best run of a sweep: `field` of `start`, times powers of two."""
        best = start
        for factor in (2.0, 0.5):
            while self.loss(run := changed(best, field, factor)) < self.loss(best):
                best = run
        return best


def changed(run: Run, field: str, factor: float) -> Run:
    return replace(run, **{field: float(f"{getattr(run, field) * factor:.6g}")})


def sweeps(runs: Runs) -> None:
    """Everything that the rules need, what matters most first."""
    tuned = runs.sweep(runs.sweep(Run(2, "muon", lr=4e-3), "lr"), "muon_lr")
    runs.sweep(runs.sweep(replace(tuned, depth=1), "muon_lr"), "lr")
    runs.sweep(replace(tuned, depth=3), "muon_lr")
    for tokens in (1 << 17, 1 << 18, 1 << 20):
        runs.sweep(replace(tuned, depth=1, tokens=tokens), "muon_lr")
    for batch in (512, 1024, 4096):
        runs.sweep(replace(tuned, batch_tokens=batch), "muon_lr")
    runs.sweep(Run(2, "adamw", lr=4e-3), "lr")
    runs.sweep(replace(tuned, depth=4), "muon_lr")
    for depth in (2, 3):
        runs.sweep(replace(tuned, depth=depth, muon_lr=0.04), "lr")
    # Held out from the fit, to test its predictions. The second is all that --depth 1 derives.
    runs.sweep(replace(tuned, muon_lr=0.04, tokens=1 << 20), "muon_lr")
    whole = Run(1, "muon", lr=0.0328, muon_lr=0.0239, weight_decay=0.146, tokens=1282 * 2048)
    runs.sweep(whole, "muon_lr")


Points = dict[float, float]
"""learning rate -> validation loss"""


@dataclass(frozen=True)
class Optimum:
    """Of a sweep: where the parabola through its best three runs, in log rate, is lowest."""

    rate: float
    loss: float

    @classmethod
    def of(cls, points: Points) -> "Optimum":
        rates = sorted(points)
        middle = min(max(1, rates.index(min(points, key=points.__getitem__))), len(rates) - 2)
        three = rates[middle - 1 : middle + 2]
        a, b, c = np.polyfit(np.log2(three), [points[rate] for rate in three], 2)
        return cls(2 ** (-b / (2 * a)), c - b * b / (4 * a))


def swept(losses: dict[Run, float], rate: str, over: str, base: Run) -> dict[int, Points]:
    """The sweeps of `rate` at each value of `over`, all else as in `base`."""
    found: dict[int, Points] = {}
    for run, loss in losses.items():
        if replace(run, **{name: getattr(base, name) for name in (rate, over)}) == base:
            found.setdefault(getattr(run, over), {})[getattr(run, rate)] = loss
    return {value: found[value] for value in sorted(found) if len(found[value]) >= 3}


def power(optima: dict[int, Optimum]) -> tuple[float, float]:
    """Exponent and factor of rate = factor * value^exponent, by least squares of logarithms."""
    exponent, offset = np.polyfit(
        np.log(list(optima)), [math.log(o.rate) for o in optima.values()], 1
    )
    return float(exponent), math.exp(offset)


TITLES = {
    "depth": "depth (2^19 tokens, batch 2,048)",
    "tokens": "tokens (depth 1, batch 2,048)",
    "batch_tokens": "batch (depth 2, 2^19 tokens)",
}
SWEEPS = {
    "muon_lr against depth": ("muon_lr", "depth", Run(2, "muon", lr=0.064)),
    "muon_lr against tokens": ("muon_lr", "tokens", Run(1, "muon", lr=0.064)),
    "muon_lr against batch": ("muon_lr", "batch_tokens", Run(2, "muon", lr=0.064)),
    "lr beside muon against depth": ("lr", "depth", Run(2, "muon", lr=0.064, muon_lr=0.04)),
    "lr of adamw against depth": ("lr", "depth", Run(2, "adamw", lr=4e-3)),
}


def optima(losses: dict[Run, float], sweep: str) -> dict[int, Optimum]:
    rate, over, base = SWEEPS[sweep]
    return {v: Optimum.of(points) for v, points in swept(losses, rate, over, base).items()}


def best_batch(losses: dict[Run, float]) -> float:
    """Tokens in a step, where each batch has its own best rate."""
    found = optima(losses, "muon_lr against batch")
    return Optimum.of({batch: optimum.loss for batch, optimum in found.items()}).rate


def fit(losses: dict[Run, float]) -> None:
    """Prints the optimum of each sweep, and the power law through those of several."""
    for name in SWEEPS:
        found = optima(losses, name)
        rates = ", ".join(f"{v}: {o.rate:.3g} (loss {o.loss:.3f})" for v, o in found.items())
        law = "; {1:.3g} x^{0:.2f}".format(*power(found)) if len(found) > 1 else ""
        print(f"{name}: {rates}{law}")
    print(f"best batch: {best_batch(losses):.0f}")


def draw(losses: dict[Run, float], path: Path) -> None:
    """Three panels of loss against muon_lr: by depth, tokens and batch, with fitted optima."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (rate, over, base) in zip(axes, list(SWEEPS.values())[:3], strict=True):
        for value, points in swept(losses, rate, over, base).items():
            best = Optimum.of(points)
            rates = sorted(points)
            shown = f"{value:,}" if over != "depth" else str(value)
            (line,) = axis.plot(rates, [points[r] - best.loss for r in rates], "o", label=shown)
            three = sorted(rates, key=lambda r: abs(math.log(r / best.rate)))[:3]
            parabola = np.polyfit(np.log2(three), [points[r] - best.loss for r in three], 2)
            xs = np.geomspace(min(three), max(three), 60)
            axis.plot(xs, np.polyval(parabola, np.log2(xs)), color=line.get_color())
            axis.axvline(best.rate, color=line.get_color(), linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="muon_lr", title=TITLES[over])
        axis.set_xticks(ticks := [0.01, 0.02, 0.04, 0.08, 0.16], [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    axes[0].set_ylabel("nats per token above the optimum")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="trains what the csv lacks")
    parser.add_argument("--runs", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--picture", type=Path)
    how = parser.parse_args()
    runs = Runs(how.runs, open_dataset(how.data) if how.data else None)
    if how.data:
        sweeps(runs)
    fit(runs.losses)
    if how.picture:
        draw(runs.losses, how.picture)


if __name__ == "__main__":
    main()
