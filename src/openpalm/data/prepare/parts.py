"""Joins the parts that several `data prepare --shard I/N` jobs wrote into one dataset.

The files are byte for byte those that a single job would have written.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.manifest import Manifest, SplitEntry, check_hashes
from openpalm.data.prepare.preparation import TOKENIZER, parse_shard, refuse_unusable
from openpalm.data.prepare.progress_file import claim_folder
from openpalm.data.prepare.repack import base_name, repack
from openpalm.data.prepare.writing import SplitWriter
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError

CHUNK_TOKENS = 1 << 22

Part = tuple[Path, Manifest]


def build(
    folders: Sequence[Path], out: Path, progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """Joins the folders of --shard 1/N to N/N, given in any order, into `out`.

    Raises DataError where a part is missing, altered, or made from other inputs or settings.
    `progress` gets (bytes checked, bytes in total).
    """
    parts = _in_order(folders)
    planned = replace(parts[0][1], splits={})
    if (out / manifest_file.NAME).exists():
        existing = manifest_file.read_manifest(out)
        if replace(existing, splits={}) != planned:
            raise DataError(f"--out {out}: already holds another dataset; choose another --out")
        return replace(existing, unchanged=True)
    check_hashes([file for folder, part in parts for file in part.files(folder)], progress)
    files = "".join(str(manifest.splits) for _, manifest in parts).encode()
    with claim_folder(out, {"parts": hashlib.sha256(files).hexdigest()}) as unfinished:
        tokenizer, settings = Tokenizer.load(parts[0][0]), planned.settings
        tokenizer.save(out / TOKENIZER)
        with ExitStack() as stack:
            splits = {
                split: _joined(
                    stack.enter_context(
                        SplitWriter(
                            out,
                            base_name(split, settings, None),
                            planned.dtype,
                            settings.shard_tokens,
                        )
                    ),
                    [(folder, manifest.splits[split]) for folder, manifest in parts],
                )
                for split in manifest_file.SPLITS
            }
        if settings.repacks:
            splits = repack(unfinished, splits, settings, tokenizer, planned.dtype)
        manifest = replace(planned, splits=splits)
        refuse_unusable(manifest)
        unfinished.commit(manifest_file.NAME, manifest.to_json())
    return manifest


def _in_order(folders: Sequence[Path]) -> list[Part]:
    """The parts 1 to N, checked to be of the same inputs and settings."""
    read = [(folder, *manifest_file.read_part(folder)) for folder in folders]
    first, shard, wanted = read[0]
    jobs = parse_shard(shard)[1]
    found: dict[int, Part] = {}
    for folder, shard, manifest in read:
        index, count = parse_shard(shard)
        if index in found:
            first_given = found[index][0]
            raise DataError(f"{folder}: is part {shard}, and so is {first_given}; leave one out")
        if count != jobs or replace(manifest, splits={}) != replace(wanted, splits={}):
            raise DataError(
                f"{folder}: was made from other inputs or with other settings than {first}; "
                "prepare all parts with one command"
            )
        if Tokenizer.load(folder).digest != manifest.tokenizer:
            raise DataError(f"{folder / TOKENIZER}: was altered; {manifest_file.REMEDY}")
        found[index] = (folder, manifest)
    missing = [f"{i}/{jobs}" for i in range(1, jobs + 1) if i not in found]
    if missing:
        raise DataError(f"parts missing: {', '.join(missing[:8])}; prepare them with --shard")
    return [found[i] for i in sorted(found)]


def _joined(writer: SplitWriter, parts: Sequence[tuple[Path, SplitEntry]]) -> SplitEntry:
    for folder, entry in parts:
        for tokens, starts in _chunks(folder, entry, writer.dtype):
            writer.extend(tokens, starts, 0, 0)
        writer.bytes += entry.bytes
        writer.lost += entry.lost
    return writer.close()


def _chunks(
    folder: Path, entry: SplitEntry, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of a part in chunks, and the positions in a chunk where documents start."""
    before = 0
    for tokens_file, index_file in zip(entry.files[::2], entry.files[1::2], strict=True):
        tokens = np.memmap(folder / tokens_file.name, dtype=dtype, mode="r")
        starts = np.fromfile(folder / index_file.name, dtype="<u8").astype(np.int64) - before
        for at in range(0, len(tokens), CHUNK_TOKENS):
            first, last = np.searchsorted(starts, [at, at + CHUNK_TOKENS])
            yield tokens[at : at + CHUNK_TOKENS], starts[first:last] - at
        before += len(tokens)
