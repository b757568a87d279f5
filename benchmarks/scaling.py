"""The small runs that the rules of `openpalm train --depth` were fitted on, and the fit.

    python benchmarks/scaling.py --data DIR --runs benchmarks/scaling.csv [--picture scaling.png]

DIR: `openpalm data prepare builtin:python-docs --out DIR --tokenizer bpe:1024`. A sweep is a line
of runs that differ in one setting, a factor of two apart; it goes on until its best run has a
worse one on either side. Runs that the csv holds are not repeated, so a stopped sweep goes on.
"""

import argparse
import csv
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from openpalm.data.loader import TokenLoader, evaluation_batches
from openpalm.data.shards import Dataset, open_dataset
from openpalm.evaluate.perplexity import split_loss
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import OptimSettings
from openpalm.train.objective import NextToken
from openpalm.train.optim import Optimizer
from openpalm.train.trainer import Trainer

LENGTH = 256


@dataclass(frozen=True)
class Run:
    """One training run: what its loss depends on."""

    depth: int
    optimizer: str
    lr: float
    """of AdamW: everything, or beside muon the embedding and the norms"""
    muon_lr: float = 0.02
    batch_tokens: int = 2048
    weight_decay: float = 0.1
    tokens: int = 1 << 19
    seed: int = 0


def of_depth(depth: int, vocab: int) -> ModelConfig:
    dim = 64 * depth
    return ModelConfig(vocab, dim, depth, depth, 64, 4 * dim, context=LENGTH)


def trained(run: Run, data: Dataset) -> float:
    """Validation loss of the run in nats a token."""
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
    loader = TokenLoader(data.tokens("train"), sequence_length=LENGTH, rows=held, seed=run.seed)
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

    def __init__(self, path: Path, data: Dataset):
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
        """The best of the runs whose `field` is that of `start` times a power of two."""
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
    for batch in (1024, 4096):
        runs.sweep(replace(tuned, batch_tokens=batch), "muon_lr")
    adamw = runs.sweep(Run(2, "adamw", lr=4e-3), "lr")
    runs.sweep(replace(tuned, depth=4), "muon_lr")
    runs.sweep(replace(tuned, depth=3), "lr")
    runs.sweep(replace(tuned, batch_tokens=8192), "muon_lr")
    for depth in (1, 3):
        runs.sweep(replace(adamw, depth=depth), "lr")
    runs.sweep(replace(tuned, tokens=1 << 20), "muon_lr")
    runs.sweep(tuned, "weight_decay")
