"""Models, batches and trainers small enough for a test."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpalm.data.batches.loader import IGNORE, Batch, token_loader
from openpalm.data.batches.loader import Loader as DataLoader
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import OptimSettings
from openpalm.train.objective import Loader, NextToken
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer

VOCAB = 80
SENTENCE = "the model reads a word and then it writes the next word after that one"


def tiny(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "head_dim": 8,
        "ff_dim": 32,
        "context": 16,
    }
    return ModelConfig(**sizes | changes)


def made(config: ModelConfig | None = None, seed: int = 0) -> Transformer:
    model = Transformer(config or tiny())
    initialise(model, seed)
    return model


def weights(model: Transformer) -> dict[str, Tensor]:
    """A copy that later steps do not change."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names and equal bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ragged(rows: int = 6, time: int = 12, seed: int = 0) -> Batch:
    """Rows that count ever fewer targets: 12, 10, 8, ... of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, time + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(rows):
        targets[row, max(1, time - 2 * row) :] = IGNORE
    return Batch(ids[:, :-1].contiguous(), targets)


def rows_of(batch: Batch, *sizes: int) -> list[Batch]:
    """The batch cut into microbatches of so many rows."""
    pairs = zip(batch.inputs.split(sizes), batch.targets.split(sizes), strict=True)
    return [Batch(inputs, targets) for inputs, targets in pairs]


def random_loader(rows: int = 4, seed: int = 0, vocab: int = VOCAB) -> DataLoader[Batch]:
    tokens = np.random.default_rng(seed).integers(0, vocab, 2000).astype(np.uint16)
    return token_loader(tokens, sequence_length=12, rows=rows, seed=seed)


class Repeating:
    """A loader that gives the same batches over and over."""

    def __init__(self, *batches: Batch):
        self.batches = batches
        self.taken = 0

    def __next__(self) -> Batch:
        self.taken += 1
        return self.batches[(self.taken - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def trainer_of(
    model: Transformer | None = None,
    loader: Loader | None = None,
    *,
    objective: Any = None,
    optim: OptimSettings | None = None,
    lr: float = 1e-2,
    steps: int = 20,
    **more: Any,
) -> Trainer:
    model = model or made()
    optimizer = Optimizer(model, optim or OptimSettings(), lr)
    return Trainer(
        model,
        objective or NextToken(),
        optimizer,
        loader or random_loader(),
        steps=steps,
        **more,
    )


def write_dataset(folder: Path, *, seed: int = 0, tokenizer: str = "byte") -> Path:
    """`folder`/data: sentences of a few words, prepared with a tokenizer."""
    folder.mkdir(parents=True)
    drawn = random.Random(seed)
    text = "".join(
        " ".join(drawn.choices(SENTENCE.split(), k=drawn.randint(4, 9))) + ".\n" for _ in range(300)
    )
    (folder / "text.txt").write_text(text, encoding="utf-8")
    out = folder / "data"
    prepare(PrepareRequest(inputs=[str(folder / "text.txt")], out=out, tokenizer=tokenizer))
    return out
