"""Probes of training: validation loss of each dataset, samples from the model, scores of tasks."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from openpalm.data.batches.token_mixture import TokenSets
from openpalm.data.dataset.shards import Dataset
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.evaluate.harness import HarnessModel
from openpalm.evaluate.perplexity import SplitLoss, dataset_loss, mixed_loss
from openpalm.evaluate.tasks import Tasks, run_tasks
from openpalm.generate.engine import Engine
from openpalm.generate.sampling import Sampling
from openpalm.generate.streaming import complete, document_ends
from openpalm.model.transformer import Transformer
from openpalm.train.probes import Probe

SAMPLE_TOKENS = 48
_FIRST_TOKENS = 64
"""tokens of a document in which its first words are looked for"""


def validation_probe(sets: TokenSets, sequence_length: int, *, document_mask: bool) -> Probe:
    """val_loss in nats per token and val_bits_per_byte, over the whole validation split.

    With several datasets, each has columns of its own (val_loss/NAME), and the columns without a
    name are of a text mixed in the proportions of training.
    """
    shares = sets.shares(sequence_length)

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
        losses = [
            dataset_loss(model, dataset, "val", sequence_length, dtype, document_mask=document_mask)
            for dataset in sets.datasets
        ]
        if len(losses) == 1:
            return _columns(losses[0])
        row = _columns(mixed_loss(losses, shares))
        for name, loss in zip(sets.names, losses, strict=True):
            row |= _columns(loss, f"/{name}")
        return row

    def describe(row: dict[str, Any]) -> str:
        line = (
            f"validation {row['val_loss']:.4f} nats per token, "
            f"{row['val_bits_per_byte']:.4f} bits per byte"
        )
        each = [f"{n} {row[f'val_loss/{n}']:.4f}" for n in sets.names if f"val_loss/{n}" in row]
        return f"{line} ({', '.join(each)})" if each else line

    tokens = sum(dataset.manifest.splits["val"].tokens for dataset in sets.datasets)
    return Probe(measure, describe=describe, tokens=tokens)


def _columns(loss: SplitLoss, suffix: str = "") -> dict[str, Any]:
    return {
        f"val_loss{suffix}": loss.nats_per_token,
        f"val_bits_per_byte{suffix}": loss.bits_per_byte,
    }


def sample_probe(tokenizer: Tokenizer, prompts: Sequence[str]) -> Probe:
    """Completions of the prompts, written to samples.jsonl."""

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
        texts = complete(
            Engine(model, owned=True),
            tokenizer,
            prompts,
            max_new_tokens=SAMPLE_TOKENS,
            sampling=Sampling(temperature=0.8, top_p=0.95),
        )
        return {"samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]}

    return Probe(measure, file="samples.jsonl", generates=True)


def task_probe(tokenizer: Tokenizer, tasks: Tasks, *, every: int | None) -> Probe:
    """The scores of tasks of lm-evaluation-harness, in columns task/NAME/METRIC."""

    seen: set[str] = set()  # a note is described once
    notes: list[str] = []

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
        asked = HarnessModel(Engine(model, owned=True), tokenizer)
        # Without standard errors: bootstrapping would take longer than a small model's answers.
        scores = run_tasks(asked, tasks, resamples=0)
        lines = [*tasks.warning_lines(), *asked.note_lines()]
        notes[:] = [line for line in lines if line not in seen]
        seen.update(notes)
        return {f"task/{score.task}/{score.metric}": score.value for score in scores}

    def describe(row: dict[str, Any]) -> str:
        figures = [f"{name.removeprefix('task/')} {value:.4g}" for name, value in row.items()]
        return ", ".join(figures) + (f" ({'; '.join(notes)})" if notes else "")

    return Probe(measure, describe=describe, every=every, generates=True)


def first_words(dataset: Dataset, count: int = 3, words: int = 4) -> list[str]:
    """The first words of some validation documents, or of training documents if there are none."""
    split = "val" if dataset.manifest.splits["val"].tokens > 1 else "train"
    starts, tokens = dataset.document_offsets(split), dataset.tokens(split)
    tokenizer = dataset.tokenizer()
    spread = (starts[len(starts) * i // count] for i in range(min(count, len(starts))))
    ids = (tokens[start : start + _FIRST_TOKENS].tolist() for start in spread)
    ends = document_ends(tokenizer)
    texts = (tokenizer.decode([*takewhile(lambda i: i not in ends, item)]) for item in ids)
    found = [" ".join(text.split()[:words]) for text in texts]
    return [text for text in dict.fromkeys(found) if text] or ["The"]
