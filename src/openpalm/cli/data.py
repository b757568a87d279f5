"""`openpalm data prepare|build|blocks|inspect|push`: makes token shards or blocks from text."""

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
       openpalm data blocks INPUT... --out DIR [options]
       openpalm data inspect DIR [options]
       openpalm data push DIR --repo ACCOUNT/NAME [options]

  prepare     make token shards from text, .jsonl, .parquet, Hub datasets or built-in corpora
  build       join the parts that several `prepare --shard` jobs made
  blocks      make parquet files with rows of token ids, all of one length
  inspect     show the contents of a prepared dataset or blocks, and check the files
  push        upload a prepared dataset or blocks to the Hugging Face Hub

`openpalm data prepare --help`, and so on, show the options.
"""


@dataclass(frozen=True)
class Prepare:
    inputs: list[str]
    """files, folders, globs (also as s3://, gs://, hf:// or other URLs), hub:NAME[:SPLIT] or
    builtin:python-docs. A .jsonl, .ndjson or .json file has one document per line, a .parquet file
    one per row, a .tar or .tgz archive one per member, a .tfrecords file one of token ids per
    record (an .index file lists them); a .bin file holds uint16 token ids; any other file is one
    document; text may be packed as .gz, .zst, .xz"""
    out: Path
    """output folder; new, empty, or with this same dataset"""
    tokenizer: str = "bpe:4096"
    """byte, bpe:VOCAB (trained on the training text; VOCAB ids in total), a tokenizer.json, a
    folder with one or with GPT-2's vocab.json and merges.txt, or a name on the Hugging Face Hub
    (gpt2, hub:NAME)"""
    end_of_text: str | None = None
    """end-of-text token of a tokenizer.json, if neither its name nor the files in its folder
    (tokenizer_config.json and others) give it; added to the vocabulary if it is missing"""
    text_field: str = "text"
    """field with the text in a line or row; if it is missing, `input_ids` is read; of
    .tfrecords the feature with the ids"""
    split_text: str | None = None
    """text between documents, such as "<|endoftext|>": every text is split at it"""
    fix_text: Literal["none", "ftfy"] = "none"
    """ftfy repairs wrongly decoded text and applies Unicode NFKC, before documents are hashed"""
    detokenize: Literal["none", "wikitext"] = "none"
    """wikitext undoes the tokenization of WikiText (`a 1 @,@ 000 @-@ mile trip .`)"""
    val_fraction: float = 0.05
    """share of the text in the validation split, between 0 and 1"""
    val: str = "hash"
    """validation split: hash (documents chosen by the hash of their text; with fewer than 200
    documents, the tail) or tail:F (the last share F of the text)"""
    dedup: Literal["exact", "none"] = "exact"
    """exact drops documents with the same text as an earlier one"""
    min_unique_tokens: int = 0
    """drops sequences of --sequence-tokens with fewer distinct tokens than this, in both splits;
    the documents are joined and cut into sequences first"""
    sequence_tokens: int = 2048
    """length of the sequences of --min-unique-tokens"""
    repack_epochs: int = 1
    """writes the training split this many times; from the second on, its documents are in a new
    random order, so that other documents share a sequence"""
    keep_order: bool = False
    """with --repack-epochs: every epoch has the order of the inputs"""
    seed: int | None = None
    """random seed of the orders of --repack-epochs; default: 0"""
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
    """folder that `openpalm data prepare` or `data blocks` wrote"""
    samples: int = 3
    """number of documents of each split to show the beginning of"""
    json: bool = False
    """print the figures as JSON"""


def run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    from openpalm.cli.data_blocks import run_blocks
    from openpalm.cli.data_push import run_push

    verbs = {
        "prepare": run_prepare,
        "build": run_build,
        "blocks": run_blocks,
        "inspect": run_inspect,
        "push": run_push,
    }
    if argv[0] not in verbs:
        raise SettingsError(f"data {argv[0]}: must be {', '.join(verbs)}; see `openpalm data`")
    verbs[argv[0]](argv[1:])


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
            "openpalm data prepare books.tar.gz --tokenizer gpt2 --fix-text ftfy --out data/books",
        ),
        positional=("inputs",),
    )
    from openpalm.base.progress_bar import long_job
    from openpalm.data.prepare.preparation import PrepareRequest, prepare

    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    del values["json"]
    values["inputs"] = [home(name) for name in given.inputs]
    values["tokenizer"] = home(given.tokenizer)
    values["seed"] = given.seed or 0
    request = PrepareRequest(**values)
    with long_job("preparing") as progress:
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
        about="Joins the parts that several `prepare --shard` jobs wrote; the result has the same "
        "bytes as one job would write.",
        examples=("openpalm data build parts/* --out data/c4",),
        positional=("parts",),
    )
    from openpalm.base.progress_bar import long_job
    from openpalm.data.prepare.parts import build

    with long_job("joining") as progress:
        manifest = build([Path(home(part)) for part in given.parts], given.out, progress)
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
    from openpalm.base.progress_bar import long_job
    from openpalm.data.dataset.inspection import inspect_dataset
    from openpalm.data.dataset.shards import open_dataset

    with long_job("checking") as progress:
        found = inspect_dataset(
            open_dataset(given.data), samples=max(0, given.samples), progress=progress
        )
    if given.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print(_inspected(given.data, found))


def documents_read(out: Path, manifest: "Manifest") -> list[str]:
    """Lines with the counts of the documents that were read, dropped and not read."""
    counts = manifest.documents
    lines = [f"{out}: already holds this dataset, nothing changed"] if manifest.unchanged else []
    lines.append(
        f"read {count_of(counts.read, 'document')}: {counts.duplicates:,} repeated and "
        f"{counts.blank:,} blank dropped"
    )
    if manifest.left_out:
        counts = (f"{count:,} {reason}" for reason, count in manifest.left_out.items())
        lines.append(f"not read in folders: {', '.join(counts)}")
    return lines


def _prepared(out: Path, manifest: "Manifest", shard: str | None = None) -> str:
    lines = documents_read(out, manifest)
    for name, split in manifest.splits.items():
        per_token = split.bytes / max(1, split.tokens)
        lines.append(
            f"{name:<6}{split.documents:>10,} documents {split.tokens:>14,} tokens "
            f"{split.bytes:>14,} bytes {per_token:6.2f} bytes per token"
        )
        lines += lost_text(name, split.lost, split.bytes)
        lines += _dropped(name, split.dropped, manifest)
    if manifest.settings.repack_epochs > 1:
        order = "the order of the inputs" if manifest.settings.keep_order else "new orders"
        lines.append(
            f"train holds its documents {manifest.settings.repack_epochs} times, in {order}"
        )
    lines.append(f"vocabulary {manifest.vocab_size:,}, validation split by {manifest.split_by}")
    if shard:
        lines.append(f"part {shard}; next: openpalm data build PART... --out DIR")
    else:
        lines.append(f"next: openpalm train --model palm-tiny --data {out} --out runs/NAME")
    return "\n".join(lines)


def lost_text(split: str, lost: int, kept: int) -> list[str]:
    if not lost:
        return []
    share = 100 * lost / (lost + kept)
    return [
        f"{split:<6}{lost:,} bytes ({share:.3g} % of the text) are lost: this tokenizer cannot "
        "encode them; bits per byte count only the bytes that are kept"
    ]


def _dropped(split: str, dropped: int, manifest: "Manifest") -> list[str]:
    if not dropped:
        return []
    settings = manifest.settings
    return [
        f"{split:<6}{count_of(dropped, 'sequence')} of {settings.sequence_tokens} tokens dropped: "
        f"fewer than {settings.min_unique_tokens} distinct tokens"
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
            *lost_text(name, split.lost, split.bytes),
        ]
        lines += [f"  {json.dumps(text, ensure_ascii=False)}" for text in split.samples]
    return "\n".join(lines)
