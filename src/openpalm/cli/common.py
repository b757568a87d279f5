"""What several verbs compose alike: where weights come from, and what is looked at in training."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openpalm import checkpoint
from openpalm.adapter import load_adapter
from openpalm.convert import hub
from openpalm.data.documents import Documents
from openpalm.data.loader import evaluation_batches
from openpalm.data.sets import TokenSets
from openpalm.data.shards import Dataset
from openpalm.data.tokenizer import Tokenizer
from openpalm.distributed import pick_device, pick_dtype
from openpalm.errors import CheckpointError, SettingsError
from openpalm.evaluate.perplexity import SplitLoss, mixed_loss, split_loss
from openpalm.generate.engine import Engine
from openpalm.generate.sampling import Sampling
from openpalm.generate.text import complete, document_ends
from openpalm.model.transformer import Transformer
from openpalm.train.config import NO_INIT, TrainSettings
from openpalm.train.job import Probe
from openpalm.train.start import Start, check_reads, starting_point
from openpalm.typed import home

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0
"""of progress, where no terminal shows a bar"""
HELD_OUT_SHARE = 0.05
MAX_HELD_OUT = 64
BEGINNING_TOKENS = 64
"""of a document, enough for its first words"""
EVALUATION_TOKENS = 8192
"""Tokens of a validation split in memory at a time."""


def weights_path(name: str) -> Path:
    """A run, a checkpoint or a hub name as a path that `checkpoint.resolve` understands."""
    if name in hub.NAMES and not Path(name).exists():
        return hub.fetch(name)
    return Path(home(name))


def tokenizer_of(directory: Path, given: Path | None = None) -> Tokenizer | None:
    """The tokenizer at `given`, else the checkpoint's own, else None."""
    if given is not None:
        return Tokenizer.load(given)
    if checkpoint.tokenizer_json(directory) is None:
        return None
    return Tokenizer.load(directory / "tokenizer.json")


def fine_tuning_start(
    settings: TrainSettings, *, may_score: bool = False
) -> tuple[Path, Tokenizer, Start]:
    """The checkpoint that --init names, its tokenizer, and a start from it.

    Only where it `may_score` can it be a reward model.
    """
    if settings.init is None:
        raise SettingsError(NO_INIT)
    directory = checkpoint.resolve(weights_path(settings.init))
    tokenizer = tokenizer_of(directory)
    if tokenizer is None:
        raise CheckpointError(f"{directory}: has no tokenizer.json, so it cannot read text")
    return directory, tokenizer, starting_point(settings, directory, tokenizer, may_score=may_score)


def held_out(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """What is trained on, and the last items of a file, which only measure."""
    kept = len(items) - min(MAX_HELD_OUT, int(HELD_OUT_SHARE * len(items)))
    return items[:kept], items[kept:]


class ServingSettings(Protocol):
    """What a verb that generates says about the model's form."""

    @property
    def tokenizer(self) -> Path | None: ...

    @property
    def force(self) -> bool: ...

    @property
    def adapter(self) -> Path | None: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def quantize(self) -> Literal["int8", "int4"] | None: ...


def serving_engine(
    source: str, settings: ServingSettings, *, slots: int = 16
) -> tuple[Engine, Tokenizer]:
    """The engine and tokenizer of a run, checkpoint or hub name."""
    directory = checkpoint.resolve(weights_path(source))
    checkpoint.check_writes(directory)
    tokenizer = tokenizer_of(directory, settings.tokenizer)
    if tokenizer is None:
        raise CheckpointError(f"{directory}: has no tokenizer.json; give one with --tokenizer")
    if settings.tokenizer is not None:
        remedy = "give the model's own, or leave --tokenizer out"
        if forced := check_reads(directory, tokenizer, remedy, force=settings.force):
            print(f"openpalm: warning: {forced}", file=sys.stderr)
    device = pick_device(settings.device)
    model = checkpoint.load(directory, str(device), pick_dtype(settings.dtype, device))
    give_adapter(model, settings.adapter)
    return Engine(model, slots=slots, weights=settings.quantize), tokenizer


def give_adapter(model: Transformer, path: Path | None) -> None:
    """Attaches the adapter at `path`: a directory of its own, a run's or a checkpoint's."""
    if path is None:
        return
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        path = checkpoint.resolve(path) / "adapter"
    load_adapter(model, path)


def validation(
    model: Transformer,
    dataset: Dataset,
    split: str,
    sequence_length: int,
    dtype: torch.dtype,
    *,
    document_mask: bool = False,
) -> SplitLoss:
    """The model's loss over a whole split, in windows of `sequence_length`."""
    batches = evaluation_batches(
        dataset.tokens(split),
        sequence_length=sequence_length,
        rows=max(1, EVALUATION_TOKENS // sequence_length),
        documents=Documents([dataset], split) if document_mask else None,
    )
    return split_loss(model, batches, dataset.manifest.splits[split].bytes, dtype)


def validation_probe(sets: TokenSets, sequence_length: int, *, document_mask: bool) -> Probe:
    """val_loss in nats a token and val_bits_per_byte over the whole validation split.

    Of several sets each has columns of its own, and the figures without a name are those of a
    text mixed as they are trained on.
    """
    shares = sets.shares(sequence_length)

    def look(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
        found = [
            validation(model, dataset, "val", sequence_length, dtype, document_mask=document_mask)
            for dataset in sets.datasets
        ]
        if len(found) == 1:
            return _validation_columns(found[0])
        row = _validation_columns(mixed_loss(found, shares))
        for name, result in zip(sets.names, found, strict=True):
            row |= _validation_columns(result, f"/{name}")
        return row

    def tell(row: dict[str, Any]) -> str:
        said = (
            f"validation {row['val_loss']:.4f} nats a token, "
            f"{row['val_bits_per_byte']:.4f} bits a byte"
        )
        each = [f"{n} {row[f'val_loss/{n}']:.4f}" for n in sets.names if f"val_loss/{n}" in row]
        return f"{said} ({', '.join(each)})" if each else said

    return Probe(look, tell=tell)


def _validation_columns(loss: SplitLoss, of: str = "") -> dict[str, Any]:
    return {f"val_loss{of}": loss.nats_per_token, f"val_bits_per_byte{of}": loss.bits_per_byte}


def sample_probe(tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 48) -> Probe:
    """A few continuations, kept in samples.jsonl."""

    def look(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
        texts = complete(
            Engine(model),
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0.8, top_p=0.95),
        )
        return {"samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]}

    return Probe(look, file="samples.jsonl")


def beginnings(dataset: Dataset, count: int = 3, words: int = 4) -> list[str]:
    """The first words of some documents of the validation split, or of the training split."""
    split = "val" if dataset.manifest.splits["val"].tokens > 1 else "train"
    starts, tokens = dataset.document_offsets(split), dataset.tokens(split)
    tokenizer = dataset.tokenizer()
    chosen = (starts[len(starts) * i // count] for i in range(min(count, len(starts))))
    ids = (tokens[start : start + BEGINNING_TOKENS].tolist() for start in chosen)
    ends = document_ends(tokenizer)
    texts = (tokenizer.decode([*takewhile(lambda i: i not in ends, item)]) for item in ids)
    found = [" ".join(text.split()[:words]) for text in texts]
    return [text for text in dict.fromkeys(found) if text] or ["The"]


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, a line in 30 seconds elsewhere; call it with how many more are done."""
    columns = (TextColumn(label), BarColumn(bar_width=24), MofNCompleteColumn())
    console = Console(stderr=True)
    remaining = TimeRemainingColumn(compact=True)
    with Progress(*columns, remaining, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        said, done = time.monotonic(), 0

        def advance(more: int) -> None:
            nonlocal said, done
            done += more
            bar.advance(task, more)
            if not console.is_terminal and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{label}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield advance
