"""Compression baselines in bits per byte: gzip, xz and a Witten-Bell byte model.

Computed on the validation text of a prepared dataset, to compare with `val_bits_per_byte`:

- gzip -9 of the validation text alone;
- xz -9e primed with the training text: the size of both together minus that of the training text;
- an order-5 Witten-Bell byte model with counts from the training text.

Choices favour the baseline. Document separators, names and lengths are not scored. The compressors
read the documents joined, without separators. The byte model starts each document with separators
as context, so it learns how documents begin; with the previous document as context it is 0.006 bits
per byte worse on builtin:python-docs.
"""

import gzip
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openpalm.data.dataset.shards import Dataset
from openpalm.errors import DataError

ORDER = 5
BYTES = 256
SEPARATOR = 256  # context before a document's first byte; never predicted
SYMBOL_BITS = 9

Integers = NDArray[np.int64]


def gzip_bits(data: bytes) -> float:
    """Bits of `data` under gzip -9."""
    return 8.0 * len(gzip.compress(data, compresslevel=9, mtime=0))


def primed_xz_bits(training: bytes, data: bytes) -> float:
    """Bits that `data` adds to the training text under xz -9e; the window holds both."""
    window = max(1 << 16, len(training) + len(data))
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window},
    ]
    both, alone = (len(lzma.compress(x, filters=filters)) for x in (training + data, training))
    return 8.0 * (both - alone)


@dataclass(frozen=True)
class _Counts:
    """Symbol counts after each context of one length; a key packs context and next symbol."""

    keys: Integers  # sorted, unique
    seen: Integers  # how often each key occurred
    contexts: Integers  # sorted, unique
    total: Integers  # N: symbols that followed each context
    kinds: Integers  # T: different symbols that followed it

    @classmethod
    def of(cls, keys: Integers) -> "_Counts":
        unique, seen = np.unique(keys, return_counts=True)
        contexts, starts, kinds = np.unique(
            unique >> SYMBOL_BITS, return_index=True, return_counts=True
        )
        return cls(unique, seen, contexts, np.add.reduceat(seen, starts), kinds)


class WittenBell:
    """Witten-Bell byte model of fixed order.

    Witten and Bell (1991), method C, interpolated as Chen and Goodman (1998) do: with N(c) symbols
    of T(c) kinds seen after context c, and c' the context without its oldest symbol,

        p(b | c) = (count(c, b) + T(c) p(b | c')) / (N(c) + T(c))

    An unseen context is replaced by the shorter one; below order 0 each byte has probability 1/256.
    Separators are the context before the first byte of a document.
    """

    def __init__(self, training: Sequence[bytes], *, order: int = ORDER):
        if not 0 <= order <= ORDER:
            raise ValueError(f"order ({order}) must be 0 to {ORDER}, to fit packed keys in 63 bits")
        self.order = order
        symbols = _joined(training, order)
        predicted = symbols != SEPARATOR
        if not predicted.any():
            raise ValueError("the training text is empty; nothing can be counted")
        self._counts = [
            _Counts.of(_pack(context, symbols)[predicted]) for context in _contexts(symbols, order)
        ]

    def bits(self, documents: Sequence[bytes]) -> float:
        """Code length of the documents in bits, without separators."""
        symbols = _joined(documents, self.order)
        predicted = symbols != SEPARATOR
        contexts = [context[predicted] for context in _contexts(symbols, self.order)]
        return float(-np.log2(self._interpolate(contexts, symbols[predicted])).sum())

    def probabilities(self, context: bytes) -> NDArray[np.float64]:
        """p(next byte | the document's bytes so far) [256]."""
        symbols = _joined([context + b"\0"], self.order)
        next_byte = self.order + len(context)
        contexts = [np.full(BYTES, c[next_byte]) for c in _contexts(symbols, self.order)]
        return self._interpolate(contexts, np.arange(BYTES))

    def _interpolate(self, contexts: list[Integers], symbols: Integers) -> NDArray[np.float64]:
        p = np.full(len(symbols), 1.0 / BYTES)
        for counts, context in zip(self._counts, contexts, strict=True):
            total, kinds = _look_up(counts.contexts, context, counts.total, counts.kinds)
            (seen,) = _look_up(counts.keys, _pack(context, symbols), counts.seen)
            p = np.where(total > 0, (seen + kinds * p) / np.maximum(total + kinds, 1), p)
        return p


def _joined(documents: Sequence[bytes], order: int) -> Integers:
    """All documents as symbols, with `order` separators before each."""
    gap = np.full(order, SEPARATOR, dtype=np.int64)
    texts = (np.frombuffer(document, np.uint8).astype(np.int64) for document in documents)
    return np.concatenate([gap, *(part for text in texts for part in (text, gap))])


def _contexts(symbols: Integers, order: int) -> Iterator[Integers]:
    """For lengths 0 to `order`: the packed symbols before each position, the last one lowest."""
    context = np.zeros_like(symbols)
    yield context
    for length in range(1, order + 1):
        before = np.concatenate([np.full(length, SEPARATOR), symbols[:-length]])
        context = context | before << (SYMBOL_BITS * (length - 1))
        yield context


def _pack(context: Integers, symbols: Integers) -> Integers:
    return context << SYMBOL_BITS | symbols


def _look_up(keys: Integers, wanted: Integers, *columns: Integers) -> list[Integers]:
    """Values of the columns at the wanted keys, 0 for a missing key."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[at] == wanted
    return [np.where(found, column[at], 0) for column in columns]


def compare(training: Sequence[bytes], validation: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of the validation text under each baseline."""
    train, text = b"".join(training), b"".join(validation)
    return {
        "gzip -9": gzip_bits(text) / len(text),
        "xz -9e primed with the training text": primed_xz_bits(train, text) / len(text),
        f"order-{ORDER} Witten-Bell byte model": WittenBell(training).bits(validation) / len(text),
    }


def documents(dataset: Dataset, split: str) -> list[bytes]:
    """The documents of a split as bytes, decoded from their tokens.

    Raises DataError if their size differs from the prepared text: bits per byte would not compare.
    """
    tokenizer = dataset.tokenizer()
    starts = dataset.document_offsets(split)[1:]
    rows = [row.tolist() for row in np.split(dataset.tokens(split)[:], starts)]
    if tokenizer.is_byte_level:
        table = tokenizer.token_bytes  # exact if a split begins inside a character
        texts = [b"".join([table[i] for i in row]) for row in rows]
    else:
        texts = [tokenizer.decode(row).encode() for row in rows]
    size, expected = sum(map(len, texts)), dataset.manifest.splits[split].bytes
    if size != expected:
        raise DataError(
            f"{dataset.path}: the {split} tokens give {size} bytes of text, {expected} went in; "
            "prepare the data with a byte or bpe tokenizer"
        )
    return texts


def baselines(dataset: Dataset) -> dict[str, float]:
    """Bits per byte of the validation text: gzip, and a model of the last five bytes."""
    training, validation = documents(dataset, "train"), documents(dataset, "val")
    text = b"".join(validation)
    order5 = WittenBell(training).bits(validation)
    return {"gzip": gzip_bits(text) / len(text), "order5": order5 / len(text)}
