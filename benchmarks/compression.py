"""Bits per byte of general compressors and a count model: see openpalm.evaluate.compression.

    python benchmarks/compression.py DATA [--json]

DATA is a folder written by `openpalm data prepare`.
"""

import argparse
import json
import sys
from pathlib import Path

from openpalm.data.dataset.shards import open_dataset
from openpalm.errors import OpenPalmError
from openpalm.evaluate.compression import compare, documents


def main() -> int:
    parser = argparse.ArgumentParser(description="Bits per byte of compressors and a count model.")
    parser.add_argument("data", type=Path, help="folder written by openpalm data prepare")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    try:
        dataset = open_dataset(options.data)
        training, validation = documents(dataset, "train"), documents(dataset, "val")
    except OpenPalmError as error:
        print(f"compression: error: {error}", file=sys.stderr)
        return error.exit_status
    figures = compare(training, validation)
    sizes = {"train_bytes": sum(map(len, training)), "val_bytes": sum(map(len, validation))}
    if options.json:
        print(json.dumps(sizes | {"bits_per_byte": figures}))
        return 0
    print(f"training {sizes['train_bytes']:,} bytes, validation {sizes['val_bytes']:,} bytes\n")
    print(f"{'':<40}bits per byte")
    for name, bits_per_byte in figures.items():
        print(f"{name:<40}{bits_per_byte:13.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
