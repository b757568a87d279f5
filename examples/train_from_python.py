"""The training of `openpalm train` as a loop of your own.

    openpalm data prepare builtin:python-docs --out data/docs --tokenizer byte
    python examples/train_from_python.py data/docs models/mine

With the same settings the losses are those of `openpalm train --dtype float32`.
"""

import argparse
import dataclasses
from pathlib import Path

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.batches.loader import token_loader
from openpalm.data.dataset.shards import open_dataset
from openpalm.model.config import preset
from openpalm.model.transformer import initialise
from openpalm.train.objective import NextToken
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimization.schedule import learning_rate_factor
from openpalm.train.optimizer_settings import OptimSettings

parser = argparse.ArgumentParser(description="Trains palm-tiny on prepared data.")
parser.add_argument("data", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

# Data: windows of 128 tokens, 16 in a batch; each token of an epoch is a target at most once.
dataset = open_dataset(options.data)
batches = token_loader(dataset.tokens("train"), sequence_length=128, rows=16, seed=0)

# Model: a preset's sizes with the vocabulary of the data.
chosen = preset("palm-tiny")
vocab_size = dataset.tokenizer().vocab_size
config = dataclasses.replace(chosen.config, vocab_size=vocab_size, context=128)
model = openpalm.Transformer(config)
initialise(model, seed=0)

# Optimizer: AdamW with warm-up, cosine schedule and gradient clipping.
settings = OptimSettings()
optimizer = Optimizer(model, settings, lr=chosen.learning_rate)
objective = NextToken()

for step in range(1, options.steps + 1):
    batch = next(batches)
    # An objective sums over the batch: dividing by its count gives the mean.
    loss = objective.loss(model, batch)[0] / objective.count(batch)
    loss.backward()
    grad_norm = optimizer.clip()
    optimizer.step(learning_rate_factor(step, options.steps, settings))
    print(f"step {step}: loss {loss.item():.6f}, gradient norm {grad_norm:.3f}")

tokenizer = (options.data / "tokenizer.json").read_text(encoding="utf-8")
checkpoint.save(options.out, model, tokenizer_json=tokenizer)
print(openpalm.generate(options.out, "Return the", max_new_tokens=20))
