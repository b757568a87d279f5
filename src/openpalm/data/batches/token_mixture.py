"""Pretraining data: one prepared dataset, or a mixture of several by weight (a .yaml file).

The datasets form one array of tokens, of which the order draws windows; nothing is copied.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from openpalm.base.permutation import mix64
from openpalm.base.typed import at
from openpalm.data.batches.order import Draws, interleaved, windows
from openpalm.data.dataset.blocks import BlockArray
from openpalm.data.dataset.document_index import Documents
from openpalm.data.dataset.shards import Dataset, TokenArray, open_dataset
from openpalm.data.rows.tasks import Mixture, read_mixture
from openpalm.errors import DataError


@dataclass(frozen=True, slots=True)
class TokenSets:
    """Datasets of one tokenizer, with their names and weights."""

    names: tuple[str, ...]
    datasets: tuple[Dataset, ...]
    mixture: Mixture

    @property
    def digest(self) -> str:
        """Identifies the data and the weights."""
        digests = [dataset.manifest.digest for dataset in self.datasets]
        if len(digests) == 1:
            return digests[0]
        weights = [task.weight and float(task.weight) for task in self.mixture.tasks]
        content = json.dumps(list(zip(digests, weights, strict=True)))
        return hashlib.sha256(content.encode()).hexdigest()

    def tokens(self, split: str) -> "JoinedTokens":
        return JoinedTokens([dataset.tokens(split) for dataset in self.datasets])

    def documents(self, split: str) -> Documents:
        return Documents(self.datasets, split)

    def shares(self, sequence_length: int) -> list[int]:
        """Windows of each set in an epoch.

        An epoch has as many windows as all sets together. A set with a larger weight than its
        size is repeated within an epoch; of one with a smaller weight an epoch has a part.
        """
        return self.mixture.shares([max(1, size // sequence_length) for size in self._sizes])

    def draws(self, sequence_length: int, seed: int) -> Draws:
        """The start of each window in `tokens("train")`.

        Sets are interleaved in proportion to their shares; each uses all its windows before it
        repeats one. Raises DataError where a set has too few tokens.
        """
        if len(self.datasets) == 1:
            return windows(self._sizes[0], sequence_length, seed)
        own = [
            at(name, windows, size, sequence_length, mix64(seed + number + 1))
            for number, (name, size) in enumerate(zip(self.names, self._sizes, strict=True))
        ]
        return interleaved(own, self._sizes, self.shares(sequence_length))

    @property
    def _sizes(self) -> list[int]:
        return [dataset.manifest.splits["train"].tokens for dataset in self.datasets]


def open_sets(path: Path) -> TokenSets:
    """Opens the dataset in a directory, or the datasets of a .yaml file with their weights.

        tasks:
          - {data: docs, weight: 3}     # relative to the YAML file
          - {data: code, weight: 1}

    Weights are shares of the training tokens; the default is a set's number of tokens. Raises
    DataError where a dataset is missing or damaged, or tokenizers differ.
    """
    mixture = read_mixture(path)
    paths = [task.data for task in mixture.tasks]
    if mixture.cap is not None or any(task.templates for task in mixture.tasks):
        raise DataError(
            f"{path}: cap and templates are of fine-tuning; a task here has data and weight"
        )
    names = tuple(task.name for task in paths)
    if len(set(names)) < len(names):
        names = tuple(map(str, paths))
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: names {twice[0]} twice; name it once, with a larger weight")
    datasets = tuple(open_dataset(path) for path in paths)
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise DataError(
                f"{path}: {other.path} was prepared with another tokenizer than {first.path}; "
                f"prepare it with --tokenizer {first.path / 'tokenizer.json'}"
            )
    return TokenSets(names, datasets, mixture)


class JoinedTokens:
    """Several token arrays as one array; slices are NumPy arrays."""

    def __init__(self, arrays: Sequence[TokenArray | BlockArray]):
        self._arrays = arrays
        self._ends = list(accumulate(map(len, arrays)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        number = min(bisect_right(self._ends, start), len(self._arrays) - 1)
        parts = []
        for array, end in zip(self._arrays[number:], self._ends[number:], strict=True):
            first = end - len(array)
            parts.append(array[max(0, start - first) : max(0, stop - first) : step])
            if end >= stop:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
