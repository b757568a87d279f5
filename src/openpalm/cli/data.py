"""`openpalm data prepare|build|inspect`: makes token shards from text, joins and inspects them."""

import dataclasses
import json
from collections.abc import Sequence
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

  prepare     make token shards from text, .jsonl, .parquet, Hub datasets or built-in corpora
  build       join the parts that several `prepare --shard` jobs made
  inspect     show the contents of a prepared dataset and check its files

`openpalm data prepare --help`, and so on, show the options.
"""


@dataclass(frozen=True)
class Prepare:
    inputs: list[str]
    """files, folders, globs, hub:NAME[:SPLIT] or builtin:python-docs. A .jsonl, .ndjson or .json
    file (also .gz, .zst) has one document per line, a .parquet file one per row; a .bin file holds
    uint16 token ids; any other file is one document"""
    out: Path
    """output folder; new, empty, or with this same dataset"""
    tokenizer: str = "bpe:4096"
    """byte, bpe:VOCAB (trained on the training text; VOCAB ids in total) or a tokenizer.json"""
    end_of_text: str | None = None
    """end-of-text token of a tokenizer.json, if neither its name nor the files in its folder
    (tokenizer_config.json and others) give it; added to the vocabulary if it is missing"""
    text_field: str = "text"
    """field with the text in a line or row; if it is missing, `input_ids` is read"""
    val_fraction: float = 0.05
    """share of the text in the validation split, between 0 and 1"""
    val: str = "hash"
    """validation split: hash (documents chosen by the hash of their text; with fewer than 200
    documents, the tail) or tail:F (the last share F of the text)"""
    dedup: Literal["exact", "none"] = "exact"
    """exact drops documents with the same text as an earlier one"""
    workers: int | None = None
    """threads that parse and encode; default: all cores. The output does not depend on it"""
    shard: str | None = None
    """I/N: prepare only part I (from 1) of N; `openpalm data build` joins the parts"""
    json: bool = False
    """print the manifest as JSON"""


@dataclass(frozen=True)
class Build:
    parts: list[str]
    """output folders of --shard 1/N to N/N, in any order"""
    out: Path
    """output folder of the dataset"""
    json: bool = False
    """print the manifest as JSON"""


@dataclass(frozen=True)
class Inspect:
    data: Path
    """folder that `openpalm data prepare` wrote"""
    samples: int = 3
    """number of documents of each split to show the beginning of"""
    json: bool = False
    """print the figures as JSON"""


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
        about="Tokenizes text and writes token shards with a training and a validation split.",
        examples=(
            "openpalm data prepare builtin:python-docs --out data/docs",
            "openpalm data prepare 'books/*.txt' notes/ --out data/mine --tokenizer bpe:8192",
            "openpalm data prepare posts.jsonl.zst --text-field body --out data/posts --workers 4",
            "openpalm data prepare c4/ --tokenizer neox.json --out parts/1 --shard 1/8",
            "openpalm data prepare hub:roneneldan/TinyStories:train --out data/stories",
        ),
        positional=("inputs",),
    )
    from openpalm.base.progress_bar import LONG_JOB_S, ProgressBar
    from openpalm.data.prepare.preparation import PrepareRequest, prepare

    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    del values["json"]
    values["inputs"] = [home(name) for name in given.inputs]
    values["tokenizer"] = home(given.tokenizer)
    request = PrepareRequest(**values)
    with ProgressBar("preparing", in_bytes=True, delay_s=LONG_JOB_S) as bar:
        manifest = prepare(request, bar.move_to)
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
        about="Joins the parts that several `prepare --shard` jobs wrote; the result has the same "
        "bytes as one job would write.",
        examples=("openpalm data build parts/* --out data/c4",),
        positional=("parts",),
    )
    from openpalm.base.progress_bar import LONG_JOB_S, ProgressBar
    from openpalm.data.prepare.parts import build

    with ProgressBar("joining", in_bytes=True, delay_s=LONG_JOB_S) as bar:
        manifest = build([Path(home(part)) for part in given.parts], given.out, bar.move_to)
    print(manifest.to_json().decode().rstrip() if given.json else _prepared(given.out, manifest))


def run_inspect(argv: Sequence[str]) -> None:
    given = settings.parse(
        Inspect,
        argv,
        verb="data inspect",
        about="Shows figures and samples of a dataset and checks every file against its hash.",
        examples=("openpalm data inspect data/docs", "openpalm data inspect data/docs --json"),
        positional=("data",),
    )
    from openpalm.base.progress_bar import LONG_JOB_S, ProgressBar
    from openpalm.data.dataset.inspection import inspect_dataset
    from openpalm.data.dataset.shards import open_dataset

    with ProgressBar("checking", in_bytes=True, delay_s=LONG_JOB_S) as bar:
        found = inspect_dataset(
            open_dataset(given.data), samples=max(0, given.samples), progress=bar.move_to
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
        f"{counts.blank:,} blank dropped"
    )
    if manifest.left_out:
        counts = (f"{count:,} {reason}" for reason, count in manifest.left_out.items())
        lines.append(f"not read in folders: {', '.join(counts)}")
    for name, split in manifest.splits.items():
        per_token = split.bytes / max(1, split.tokens)
        lines.append(
            f"{name:<6}{split.documents:>10,} documents {split.tokens:>14,} tokens "
            f"{split.bytes:>14,} bytes {per_token:6.2f} bytes per token"
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
        "encode them; bits per byte count only the bytes that are kept"
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
            f"{split.bytes:,} bytes, {split.bytes_per_token:.2f} bytes per token",
            f"  tokens per document: {levels}",
            *_lost(name, split.lost, split.bytes),
        ]
        lines += [f"  {json.dumps(text, ensure_ascii=False)}" for text in split.samples]
    return "\n".join(lines)
