"""Reads .parquet files and Hugging Face Hub datasets (streamed) as documents, one per row.

A row is a text, or token ids if the column holds lists of integers. Never runs code of a dataset;
checks the sizes that a file declares before reading its pages.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openpalm.base.console import shown
from openpalm.data.corpus.document import Document, no_text_field
from openpalm.data.corpus.json_lines import MAX_LINE_BYTES
from openpalm.data.corpus.line_streams import Unavailable, unreadable
from openpalm.errors import DataError, one_line

IDS_COLUMN = "input_ids"
# Limits of one file: a small footer can declare pages that fill any memory.
MAX_FOOTER_BYTES = 64 << 20
MAX_FOOTER_ITEMS = 1 << 20
MAX_CHUNK_BYTES = 4 << 30
MAX_CHUNK_VALUES = 1 << 28
BATCH_BYTES = 1 << 20
MAX_BATCH_ROWS = 1024


def parquet_documents(path: Path, text_field: str) -> Iterator[Document]:
    """The rows of a .parquet file, in order. Raises DataError for a damaged or oversized one."""
    pyarrow, parquet = arrow(path)
    limits = {
        "pre_buffer": False,
        "buffer_size": BATCH_BYTES,
        "thrift_string_size_limit": MAX_FOOTER_BYTES,
        "thrift_container_size_limit": MAX_FOOTER_ITEMS,
    }
    number = 0
    try:
        with parquet.ParquetFile(_openable(path), **limits) as file:
            metadata = file.metadata
            column = _column(file.schema_arrow.names, text_field, str(path))
            kind = file.schema_arrow.field(column).type
        groups = range(metadata.num_row_groups)
        wide = [_batch_rows(metadata, group, column, path) for group in groups]
        # Dictionary encoding stays on: a text that a small file repeats a million times is then one
        # text in memory.
        as_one = [column] if str(kind) in ("string", "large_string") else []
        with parquet.ParquetFile(_openable(path), read_dictionary=as_one, **limits) as file:
            for group, rows in enumerate(wide):
                batches = file.iter_batches(
                    rows, row_groups=[group], columns=[column], use_threads=False
                )
                for batch in batches:
                    for value in _values(batch.column(0)):
                        number += 1
                        yield _document(value, f"{path}:row {number}", column)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        # pyarrow raises OSError for damaged data, too, but without an errno.
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        reason = one_line(error, 200)
        raise DataError(
            f"{path}: parquet data damaged after row {number} ({reason}); fetch the file again"
        ) from None


def hub_documents(name: str, text_field: str) -> Iterator[Document]:
    """The rows of NAME[:SPLIT] or NAME:CONFIG:SPLIT, streamed; the default SPLIT is train."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"hub:{name}: needs datasets; pip install 'openpalm[hub]'") from None
    found, *rest = name.split(":")
    config, split = rest[:2] if len(rest) > 1 else (None, *(rest or ["train"]))
    try:
        rows = datasets.load_dataset(found, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            column = _column(row, text_field, f"hub:{name}")
            yield _document(row[column], f"hub:{name}:row {number}", column)
    except DataError:
        raise
    except Exception as error:  # network, Hub and file readers raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Unavailable(f"hub:{name}: cannot be read ({reason})") from None


def arrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: needs pyarrow; pip install 'openpalm[data]'") from None
    return pyarrow, pyarrow.parquet


def _openable(path: Path) -> Any:
    """A path for pyarrow; a file at a URL as an open file."""
    return path if isinstance(path, Path) else path.open("rb")


def _batch_rows(metadata: Any, group: int, column: str, path: Path) -> int:
    """The number of rows of about BATCH_BYTES, by the sizes that the footer declares."""
    rows = metadata.row_group(group).num_rows
    chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
    ours = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    size = sum(chunk.total_uncompressed_size for chunk in ours)
    values = sum(chunk.num_values for chunk in ours)
    if size > MAX_CHUNK_BYTES or values > MAX_CHUNK_VALUES:
        raise DataError(
            f"{path}: {size} bytes, {values} values in one row group, the limits are "
            f"{MAX_CHUNK_BYTES} and {MAX_CHUNK_VALUES}; write it with smaller row groups"
        )
    # Run-length encoding stores repeated ids in a few bytes; in memory each takes four.
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * rows // max(1, size, 4 * values)))


def _values(column: Any) -> Iterator[Any]:
    """The values of a column: texts, arrays of ids (None for a null inside), or other types."""
    import pyarrow

    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        for value in column:
            inner = value.values
            yield (
                None if inner is None or inner.null_count else inner.to_numpy(zero_copy_only=False)
            )
    else:
        for value in column:
            yield value.as_py()


def _column(columns: Any, text_field: str, where: str) -> str:
    for name in (text_field, IDS_COLUMN):
        if name in columns:
            return name
    raise no_text_field(where, text_field, columns)


def _document(value: Any, where: str, column: str) -> Document:
    if isinstance(value, str):
        if len(value) <= MAX_LINE_BYTES:
            return Document(value, where)
        raise DataError(f"{where}: a text of more than {MAX_LINE_BYTES} bytes; split this document")
    ids = np.asarray(value) if isinstance(value, list | np.ndarray) else None
    if ids is None or ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        kind = type(value).__name__
        raise DataError(
            f"{where}: field {shown(column)} is a {kind}, neither a text nor token ids; "
            "name another with --text-field"
        )
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
        raise DataError(f"{where}: field {shown(column)} holds numbers that are no token ids")
    return Document("", where, ids.astype(np.uint32))
