"""`openpalm copy`: copies a checkpoint, a run or a dataset to or from a URL."""

from collections.abc import Sequence
from dataclasses import dataclass

from openpalm.base import settings
from openpalm.base.console import shown
from openpalm.base.typed import home
from openpalm.errors import count_of


@dataclass(frozen=True)
class Copy:
    source: str
    """folder to copy: a local path, or a URL such as s3://BUCKET/FOLDER"""
    target: str
    """folder to copy it to: a URL, or a local path"""


def run(argv: Sequence[str]) -> None:
    given = settings.parse(
        Copy,
        argv,
        verb="copy",
        about="Copies a folder with all its files to or from s3://, gs://, hf:// or another file "
        "system of fsspec. Its manifest.json is copied last, so that an interrupted copy is never "
        "taken for a checkpoint or dataset; repeat the command then.",
        examples=(
            "openpalm copy runs/tiny/checkpoints/step-00000200 s3://bucket/tiny",
            "openpalm copy gs://bucket/c4 data/c4",
            "openpalm copy hf://datasets/ACCOUNT/NAME data/blocks",
        ),
        positional=("source", "target"),
    )
    from openpalm.base.progress_bar import long_job
    from openpalm.base.remote import copy_folder

    source, target = home(given.source), home(given.target)
    with long_job("copying") as progress:
        copied = copy_folder(source, target, progress)
    if copied.files:
        files, size = count_of(copied.files, "file"), count_of(copied.bytes, "byte")
        print(f"{target}: {files}, {size} copied")
        if copied.left_out:
            print(f"not copied, hidden, unfinished or no plain file: {_some(copied.left_out)}")
    else:
        print(f"{target}: already holds this folder, nothing copied")


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    # Names from a bucket may hold what a terminal obeys.
    return ", ".join(n if n.isprintable() else shown(n) for n in names[:most]) + more
