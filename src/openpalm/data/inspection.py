"""What is in a prepared dataset: counts, lengths, samples, and whether its files are intact."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpalm.data.manifest import Manifest
from openpalm.data.shards import Dataset
from openpalm.data.tokenizer import Tokenizer
from openpalm.errors import DataError

PERCENTILES = (0, 10, 50, 90, 100)
SAMPLE_TOKENS = 64
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class SplitReport:
    """`length_percentiles`: tokens a document, at PERCENTILES; `samples`: beginnings."""

    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    length_percentiles: dict[str, int]
    samples: list[str]


@dataclass(frozen=True, slots=True)
class Inspection:
    """`files_checked` counts the files whose SHA-256 was compared with the manifest's."""

    vocab_size: int
    dtype: str
    split_by: str
    files_checked: int
    splits: dict[str, SplitReport]


def inspect_dataset(
    dataset: Dataset, *, samples: int = 3, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Reads every byte of a dataset. Raises DataError naming the first file that was altered.

    `progress` is told (bytes done, bytes in total).
    """
    checked = check_hashes([(dataset.path, dataset.manifest)], progress)
    tokenizer = dataset.tokenizer()
    return Inspection(
        vocab_size=dataset.manifest.vocab_size,
        dtype=dataset.manifest.dtype,
        split_by=dataset.manifest.split_by,
        files_checked=checked,
        splits={
            split: _report(dataset, split, tokenizer, samples) for split in dataset.manifest.splits
        },
    )


def _report(dataset: Dataset, split: str, tokenizer: Tokenizer, samples: int) -> SplitReport:
    entry = dataset.manifest.splits[split]
    starts = dataset.document_offsets(split)
    lengths = np.diff(starts, append=entry.tokens)
    levels = np.percentile(lengths, PERCENTILES, method="nearest")
    # Evenly spread over the split: the first documents are often alike.
    chosen = np.unique(np.linspace(0, len(starts) - 1, num=samples, dtype=np.int64))
    tokens = dataset.tokens(split)
    texts = [
        tokenizer.decode(tokens[starts[i] : starts[i] + min(lengths[i], SAMPLE_TOKENS)].tolist())
        for i in chosen
    ]
    return SplitReport(
        documents=entry.documents,
        tokens=entry.tokens,
        bytes=entry.bytes,
        bytes_per_token=round(entry.bytes / entry.tokens, 3),
        length_percentiles={f"p{p}": int(v) for p, v in zip(PERCENTILES, levels, strict=True)},
        samples=texts,
    )


def check_hashes(
    datasets: Sequence[tuple[Path, Manifest]], progress: Callable[[int, int], None] | None
) -> int:
    """Reads the files of all folders; how many. DataError for the first that was altered."""
    files = [
        (folder / file.name, file)
        for folder, manifest in datasets
        for entry in manifest.splits.values()
        for file in entry.files
    ]
    total, done = sum(file.size for _, file in files), 0
    for path, file in files:
        digest = hashlib.sha256()
        for chunk in _chunks(path):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
        if digest.hexdigest() != file.sha256:
            raise DataError(
                f"{path}: was altered, its SHA-256 is not the manifest's; "
                "remove the folder and prepare it again"
            )
    return len(files)


def _chunks(path: Path):
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
