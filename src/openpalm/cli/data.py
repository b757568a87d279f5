"""`openpalm data prepare|build|inspect`: text to token shards, and a look at them."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpalm.base import settings
from openpalm.base.typed import home
from openpalm.errors import SettingsError, count_of

if TYPE_CHECKING:
    from openpalm.data.dataset.inspection import Inspection
    from openpalm.data.dataset.manifest import Manifest

USAGE = """usage: openpalm data prepare INPUT... --out DIR [options]
       openpalm data build PART... --out DIR
       openpalm data inspect DIR [options]

  prepare     text, .jsonl, .parquet, Hub datasets, built-in corpora -> token shards to train on
  build       the parts that several jobs prepared -> the shards that one would have made
  inspect     what a prepared folder holds, and whether it is intact

`openpalm data prepare --help` and so on show the options.
"""
SHOWN_AFTER_S = 2.0
SECONDS_BETWEEN_LINES = 30.0
"""of progress, where no terminal shows a bar"""


@dataclass(frozen=True)
class Prepare:
    inputs: list[str]
    """Files, folders, globs, hub:NAME[:SPLIT] or builtin:python-docs. A .jsonl, .ndjson or
    .json file (.gz and .zst too) has a document a line, a .parquet file one a row; a .bin holds
    uint16 token ids; any other file is one document."""
    out: Path
    """Folder for the dataset, new or holding this very dataset."""
    tokenizer: str = "bpe:4096"
    """byte, bpe:VOCAB (trained on the training text, VOCAB ids in all), or a tokenizer.json."""
    end_of_text: str | None = None
    """Token that ends a document, for a tokenizer.json where neither its name nor the files beside
    it (tokenizer_config.json and so on) tell; it is added where the vocabulary lacks it."""
    text_field: str = "text"
    """Field of a line or row that holds the text; where it is missing, `input_ids`."""
    val_fraction: float = 0.05
    """Share held out for validation, between 0 and 1."""
    val: str = "hash"
    """Which part is held out: hash (whole documents by the hash of their text; with fewer than 200
    documents, the tail) or tail:F (the last part F of the text)."""
    dedup: Literal["exact", "none"] = "exact"
    """Whether repeated documents are left out."""
    workers: int | None = None
    """Threads that parse and encode (all cores when not set); the bytes are always the same."""
    shard: str | None = None
    """I/N: prepare only part I (from 1) of N, for `openpalm data build` to join."""
    json: bool = False
    """Print the manifest as JSON."""


@dataclass(frozen=True)
class Build:
    parts: list[str]
    """The folders of --shard 1/N to N/N, in any order."""
    out: Path
    """Folder for the dataset."""
    json: bool = False
    """Print the manifest as JSON."""


@dataclass(frozen=True)
class Inspect:
    data: Path
    """Folder that `openpalm data prepare` wrote."""
    samples: int = 3
    """Beginnings of documents to show for each split."""
    json: bool = False
    """Print the figures as JSON."""


def run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "prepare":
        run_prepare(argv[1:])
    elif argv[0] == "build":
        run_build(argv[1:])
    elif argv[0] == "inspect":
        run_inspect(argv[1:])
    else:
        raise SettingsError(
            f"data {argv[0]}: must be prepare, build or inspect; see `openpalm data`"
        )


def run_prepare(argv: Sequence[str]) -> None:
    given = settings.parse(
        Prepare,
        argv,
        verb="data prepare",
        about="Pack text as token shards with a training and a validation split.",
        examples=(
            "openpalm data prepare builtin:python-docs --out data/docs",
            "openpalm data prepare 'books/*.txt' notes/ --out data/mine --tokenizer bpe:8192",
            "openpalm data prepare posts.jsonl.zst --text-field body --out data/posts --workers 4",
            "openpalm data prepare c4/ --tokenizer neox.json --out parts/1 --shard 1/8",
            "openpalm data prepare hub:roneneldan/TinyStories:train --out data/stories",
        ),
        positional=("inputs",),
    )
    from openpalm.data.prepare.preparation import PrepareRequest, prepare

    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    del values["json"]
    values["inputs"] = [home(name) for name in given.inputs]
    values["tokenizer"] = home(given.tokenizer)
    request = PrepareRequest(**values)
    with _progress("preparing") as progress:
        manifest = prepare(request, progress)
    print(
        manifest.to_json().decode().rstrip()
        if given.json
        else _prepared(given.out, manifest, given.shard)
    )


def run_build(argv: Sequence[str]) -> None:
    given = settings.parse(
        Build,
        argv,
        verb="data build",
        about="Join the parts that several jobs prepared into the bytes one would have written.",
        examples=("openpalm data build parts/* --out data/c4",),
        positional=("parts",),
    )
    from openpalm.data.prepare.parts import build

    with _progress("joining") as progress:
        manifest = build([Path(home(part)) for part in given.parts], given.out, progress)
    print(manifest.to_json().decode().rstrip() if given.json else _prepared(given.out, manifest))


def run_inspect(argv: Sequence[str]) -> None:
    given = settings.parse(
        Inspect,
        argv,
        verb="data inspect",
        about="Show what a prepared dataset holds and check every file against its hash.",
        examples=("openpalm data inspect data/docs", "openpalm data inspect data/docs --json"),
        positional=("data",),
    )
    from openpalm.data.dataset.inspection import inspect_dataset
    from openpalm.data.dataset.shards import open_dataset

    with _progress("checking") as progress:
        found = inspect_dataset(
            open_dataset(given.data), samples=max(0, given.samples), progress=progress
        )
    if given.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print(_inspected(given.data, found))


def _prepared(out: Path, manifest: "Manifest", shard: str | None = None) -> str:
    counts = manifest.documents
    lines = [f"{out}: already holds this dataset, nothing changed"] if manifest.unchanged else []
    lines.append(
        f"read {count_of(counts.read, 'document')}: {counts.duplicates:,} repeated and "
        f"{counts.blank:,} blank left out"
    )
    if manifest.left_out:
        counts = (f"{count:,} {reason}" for reason, count in manifest.left_out.items())
        lines.append(f"not read in folders: {', '.join(counts)}")
    for name, split in manifest.splits.items():
        per_token = split.bytes / max(1, split.tokens)
        lines.append(
            f"{name:<6}{split.documents:>10,} documents {split.tokens:>14,} tokens "
            f"{split.bytes:>14,} bytes {per_token:6.2f} bytes a token"
        )
        lines += _lost(name, split.lost, split.bytes)
    lines.append(f"vocabulary {manifest.vocab_size:,}, validation split by {manifest.split_by}")
    if shard:
        lines.append(f"part {shard}; next: openpalm data build PART... --out DIR")
    else:
        lines.append(f"next: openpalm train --model palm-tiny --data {out} --out runs/NAME")
    return "\n".join(lines)


def _lost(split: str, lost: int, kept: int) -> list[str]:
    if not lost:
        return []
    share = 100 * lost / (lost + kept)
    return [
        f"{split:<6}{lost:,} bytes ({share:.3g} % of the text) are lost: this tokenizer cannot "
        "spell them; bits a byte count only what is kept"
    ]


def _inspected(path: Path, found: "Inspection") -> str:
    lines = [
        f"{path}: vocabulary {found.vocab_size:,}, {found.dtype}, validation split by "
        f"{found.split_by}; {count_of(found.files_checked, 'file')} intact"
    ]
    for name, split in found.splits.items():
        levels = "  ".join(f"{level} {v:,}" for level, v in split.length_percentiles.items())
        lines += [
            "",
            f"{name}: {count_of(split.documents, 'document')}, {count_of(split.tokens, 'token')}, "
            f"{split.bytes:,} bytes, {split.bytes_per_token:.2f} bytes a token",
            f"  tokens a document: {levels}",
            *_lost(name, split.lost, split.bytes),
        ]
        lines += [f"  {json.dumps(text, ensure_ascii=False)}" for text in split.samples]
    return "\n".join(lines)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error once the work has taken SHOWN_AFTER_S; lines without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    task = bar.add_task(what, total=None)
    started = time.monotonic()
    shown = False
    said = started

    def report(done: int, total: int) -> None:
        nonlocal shown, said
        if not bar.console.is_terminal:
            if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                share = f" of {total / 1e6:,.0f}" if total else ""
                print(f"{what}: {done / 1e6:,.0f}{share} MB", file=sys.stderr, flush=True)
            return
        if not shown and time.monotonic() - started > SHOWN_AFTER_S:
            shown = True
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        if shown:
            bar.stop()
