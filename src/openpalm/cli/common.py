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

from openpalm.base.device import pick_device, pick_dtype
from openpalm.base.hashing import sha256_of
from openpalm.base.typed import home
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from openpalm.checkpoint.manifest import is_listed, read_manifest
from openpalm.convert import hub
from openpalm.data.batches.loader import evaluation_batches
from openpalm.data.batches.token_mixture import TokenSets
from openpalm.data.dataset.document_index import Documents
from openpalm.data.dataset.shards import Dataset
from openpalm.data.rows.usable import Usable
from openpalm.data.text.tokenizer import Tokenizer, is_bpe
from openpalm.errors import CheckpointError, SettingsError
from openpalm.evaluate.perplexity import SplitLoss, mixed_loss, split_loss
from openpalm.generate.defaults import SamplingDefaults, sampling_defaults
from openpalm.generate.engine import Engine
from openpalm.generate.sampling import Sampling
from openpalm.generate.streaming import complete, document_ends
from openpalm.model.transformer import Transformer
from openpalm.train.config import NO_INIT, TrainSettings
from openpalm.train.initial_weights import Start, check_reads, starting_point
from openpalm.train.probes import Probe

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
    """The tokenizer at `given`, else the checkpoint's own, else None.

    The files beside `given` name its end of text, as they do for `data prepare`.
    """
    if given is not None:
        if is_bpe(str(given)):
            raise SettingsError(
                f"--tokenizer {given}: there is no text to train it on; give byte or a "
                "tokenizer.json"
            )
        return Tokenizer.from_spec(str(given), ())
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
        raise CheckpointError(
            f"{directory}: its manifest lists no tokenizer.json, so it cannot read text"
        )
    return directory, tokenizer, starting_point(settings, directory, tokenizer, may_score=may_score)


def held_out(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """What is trained on, and the last items of a file, which only measure."""
    kept = len(items) - min(MAX_HELD_OUT, int(HELD_OUT_SHARE * len(items)))
    return items[:kept], items[kept:]


def report_unused(label: str, path: Path, given: Usable[T], what: str) -> Usable[T]:
    """Says what of a file is left out, by reason and line, and which fields are not used.

    Raises DataError where nothing is left.
    """
    given.refuse_empty(path, what)
    for line in given.report():
        print(f"{label}: {path}: {line}", file=sys.stderr)
    return given


class ServingSettings(Protocol):
    """What a verb that generates says about the model's form."""

    @property
    def tokenizer(self) -> Path | None: ...

    @property
    def adapter(self) -> Path | None: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def quantize(self) -> Literal["int8", "int4"] | None: ...

    @property
    def verify(self) -> bool: ...

    @property
    def force(self) -> bool: ...


def serving_engine(
    source: str,
    settings: ServingSettings,
    *,
    slots: int = 16,
    allow: Callable[[str], None] | None = None,
) -> tuple[Engine, Tokenizer]:
    """The engine and tokenizer of a run, checkpoint or hub name."""
    return serving_model(source, settings, slots=slots, allow=allow)[:2]


def serving_model(
    source: str,
    settings: ServingSettings,
    *,
    slots: int = 16,
    allow: Callable[[str], None] | None = None,
) -> tuple[Engine, Tokenizer, SamplingDefaults]:
    """Those, and how tokens are chosen where nobody says.

    Weights that are not finite raise CheckpointError, unless `allow` is given, which gets the
    message.
    """
    directory = checkpoint.resolve(weights_path(source), training=settings.verify)
    checkpoint.check_generates_text(directory)
    tokenizer = tokenizer_of(directory, settings.tokenizer)
    if tokenizer is None:
        raise CheckpointError(
            f"{directory}: its manifest lists no tokenizer.json; give one with --tokenizer"
        )
    if settings.tokenizer is not None:
        remedy = "give the model's own, or leave --tokenizer out"
        if forced := check_reads(directory, tokenizer, remedy, force=settings.force):
            print(f"openpalm: warning: {forced}", file=sys.stderr)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    model = checkpoint.load(directory, str(device), dtype, allow=allow)
    give_adapter(model, settings.adapter, directory, force=settings.force)
    engine = Engine(model, slots=slots, weights=settings.quantize, owned=True)
    return engine, tokenizer, sampling_defaults(directory)


def give_adapter(
    model: Transformer, path: Path | None, base: Path, *, force: bool = False
) -> str | None:
    """Attaches the adapter at `path` to the model of checkpoint `base`; returns its hash.

    `path` is a directory of its own, a run's or a checkpoint's. Raises CheckpointError for an
    adapter that is known to be made for other weights; with `force` it is used, and that is said.
    """
    if path is None:
        return None
    holder = path.parent if (path.parent / "manifest.json").is_file() else path
    made_for = None
    if (holder / "manifest.json").is_file() or (holder / "checkpoints").is_dir():
        holder = checkpoint.resolve(holder)
        path = holder / "adapter"
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not is_listed(holder, f"adapter/{name}"):
                raise CheckpointError(f"{holder}: its manifest lists no adapter/{name}")
        made_for = read_manifest(holder)["lineage"].get("parent")

    def forced(reason: str) -> None:
        print(f"--force: used all the same: {reason}", file=sys.stderr)

    allow = forced if force else None
    load_adapter(model, path, bases=_computing_as(base), made_for=made_for, allow=allow)
    return sha256_of(path / WEIGHTS_FILE)


def _computing_as(directory: Path) -> set[str]:
    """Hashes of the checkpoint and of the one whose own adapter was merged to make it."""
    manifest = read_manifest(directory)
    lineage = manifest["lineage"]
    merged = {lineage["parent"]} if lineage.get("adapter") == "own" else set()
    return {manifest["sha256"]} | merged


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

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
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

    def describe(row: dict[str, Any]) -> str:
        said = (
            f"validation {row['val_loss']:.4f} nats a token, "
            f"{row['val_bits_per_byte']:.4f} bits a byte"
        )
        each = [f"{n} {row[f'val_loss/{n}']:.4f}" for n in sets.names if f"val_loss/{n}" in row]
        return f"{said} ({', '.join(each)})" if each else said

    tokens = sum(dataset.manifest.splits["val"].tokens for dataset in sets.datasets)
    return Probe(measure, describe=describe, tokens=tokens)


def _validation_columns(loss: SplitLoss, of: str = "") -> dict[str, Any]:
    return {f"val_loss{of}": loss.nats_per_token, f"val_bits_per_byte{of}": loss.bits_per_byte}


def sample_probe(tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = 48) -> Probe:
    """A few continuations, kept in samples.jsonl."""

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
        texts = complete(
            Engine(model, owned=True),
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0.8, top_p=0.95),
        )
        return {"samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]}

    return Probe(measure, file="samples.jsonl")


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
