"""The loss after equal minutes; see train.py."""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers_train import PEERS, Contender, Makers, OpenPalm, PalmRlhf, PalmRlhfFlash, Rules, built
from train_common import Row, random_batch, say, step_seconds, table

from openpalm.data.batches.loader import (
    IGNORE,
    Batch,
    Loader,
    Tokens,
    evaluation_batches,
    token_loader,
)
from openpalm.model.config import preset


@contextmanager
def dataset(data: str) -> Iterator[Any]:
    """A prepared directory, or text prepared for the time of the run: bytes, the tail held out."""
    from openpalm.cli.main import main as openpalm
    from openpalm.data.dataset.shards import open_dataset

    if (Path(data) / "manifest.json").is_file():
        yield open_dataset(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        words = ["data", "prepare", data, "--out", f"{folder}/data"]
        with redirect_stdout(sys.stderr):
            status = openpalm([*words, "--tokenizer", "byte", "--val", "tail:0.1"])
        if status:
            raise SystemExit(status)
        yield open_dataset(f"{folder}/data")


def trained(who: Contender, rules: Rules, loader: Loader[Batch]) -> None:
    """Takes a contender through all the steps of the schedule."""
    reported_at = time.perf_counter()
    for step in range(1, rules.steps + 1):
        loss = who.step(next(loader))
        if time.perf_counter() - reported_at > 15 or step == rules.steps:
            reported_at = time.perf_counter()
            say(f"  rate {rules.lr:g}: step {step} of {rules.steps}, loss {loss:.3f}")


@torch.no_grad()
def validation_loss(who: Contender, tokens: Tokens, rules: Rules) -> float:
    """Nats a token over the whole split, in the run's dtype: every token but the first, once."""
    device, dtype, nats = rules.device.type, rules.dtype, 0.0
    for batch in evaluation_batches(tokens, sequence_length=rules.config.context, rows=16):
        batch = batch.to(rules.device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = who.logits(batch.inputs).flatten(0, 1)
        nats += F.cross_entropy(
            logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
    return nats / (len(tokens) - 1) if math.isfinite(nats) else math.inf


def timed(makers: Makers, rules: Rules, rows: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of everyone who can take part, in turns after one to warm up."""
    found = built(makers, rules)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 1):
        for name, who in found.items():
            batch = random_batch(rules.config.vocab_size, rows, rules.config.context)
            taken = step_seconds(who, batch, 2, rules.device)
            if turn:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def equal_minutes(how: argparse.Namespace) -> list[Row]:
    named, device = preset(how.model), torch.device(how.device)
    ours: Makers = {
        "OpenPaLM, AdamW": partial(OpenPalm, optim={"name": "adamw"}),
        "OpenPaLM, Muon": partial(OpenPalm, optim={"name": "muon"}),
    }
    with dataset(how.data) as data:
        train, held_out = data.tokens("train"), data.tokens("val")
        vocab = data.tokenizer().vocab_size
        config = replace(named.config, vocab_size=vocab, context=how.length)
        rules = Rules(config, getattr(torch, how.dtype), device, lr=named.learning_rate)
        seconds = timed(ours | PEERS, rules, how.rows, how.rounds)
        slower = max((PalmRlhf.name, PalmRlhfFlash.name), key=lambda name: seconds.get(name, 0))
        seconds.pop(slower, None)

        def result(name: str, minutes: float, lr: float) -> Row:
            steps = max(1, round(60 * minutes / seconds[name]))
            say(f"{name}: {minutes:g} minutes, {steps} steps of {seconds[name]:.3f} s")
            loader = token_loader(train, sequence_length=how.length, rows=how.rows, seed=0)
            run = replace(rules, steps=steps, lr=lr)
            who, start = (ours | PEERS)[name](run), time.perf_counter()
            trained(who, run, loader)
            taken, loss = time.perf_counter() - start, validation_loss(who, held_out, run)
            say(f"  {taken:.0f} s, validation {loss:.4f} nats per token")
            row = {"who": name, "parameters": who.parameters, "lr": lr, "minutes": minutes}
            return row | {"steps": steps, "taken_s": taken, "val_loss": loss, "search": {}}

        rows = []
        for name in seconds:
            if name in ours:
                rows.append(result(name, how.minutes, named.learning_rate))
                continue
            rates = [float(rate) for rate in how.rates.split(",")]
            search = {lr: result(name, how.minutes / 2, lr)["val_loss"] for lr in rates}
            best = min(rates, key=lambda lr: search[lr])
            rows.append(result(name, how.minutes * 2, best) | {"search": search})
    return rows


def equal_minutes_table(rows: list[Row]) -> str:
    losses = table(
        ("who", "parameters", "learning rate", "minutes", "steps", "took, s", "nats per token"),
        [
            (
                row["who"],
                f"{row['parameters'] / 1e6:.2f}M",
                f"{row['lr']:g}",
                f"{row['minutes']:g}",
                row["steps"],
                f"{row['taken_s']:.0f}",
                f"{row['val_loss']:.4f}",
            )
            for row in rows
        ],
    )
    searched = [row for row in rows if row["search"]]
    if not searched:
        return losses
    head = ("nats per token at T/2, learning rate", *(f"{lr:g}" for lr in searched[0]["search"]))
    lines = [(row["who"], *(f"{loss:.4f}" for loss in row["search"].values())) for row in searched]
    return f"{losses}\n\n{table(head, lines)}"
