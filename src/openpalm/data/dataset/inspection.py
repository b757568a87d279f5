"""`openpalm data inspect`: counts, lengths and samples of a dataset, and a check of its files."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from openpalm.data.dataset.manifest import check_hashes
from openpalm.data.dataset.shards import Dataset
from openpalm.data.text.tokenizer import Tokenizer

PERCENTILES = (0, 10, 50, 90, 100)
SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SplitReport:
    """`length_percentiles`: tokens a document, at PERCENTILES; `samples`: beginnings.

    `lost`: bytes of text that the vocabulary could not spell; not in `bytes`.
    """

    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    length_percentiles: dict[str, int]
    samples: list[str]
    lost: int


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
    """Checks every file of a dataset. Raises DataError naming the first file that was altered.

    `progress` gets (bytes done, bytes in total).
    """
    files = dataset.manifest.files(dataset.path)
    check_hashes(files, progress)
    tokenizer = dataset.tokenizer()
    return Inspection(
        vocab_size=dataset.manifest.vocab_size,
        dtype=dataset.manifest.dtype,
        split_by=dataset.manifest.split_by,
        files_checked=len(files),
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
        lost=entry.lost,
    )
