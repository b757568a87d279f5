"""`openpalm data push`: uploads a prepared dataset or blocks to the Hugging Face Hub.

Data files come first, in commits of a few files, and the manifest last: an upload that was
interrupted is no dataset yet. A file that the Hub has already is not sent again.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpalm.base.hub import check_repository, hub_errors, upload_error
from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.blocks import BlocksManifest
from openpalm.data.dataset.manifest import FileEntry, Manifest, check_hashes
from openpalm.data.dataset.shards import open_dataset

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_FILES = 32
DATA_FILE = re.compile(r"(train|val)-\d{5}\.(parquet|bin|idx)")
NAMED_SPLITS = {"train": "train", "val": "validation"}


def push_dataset(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Uploads a dataset folder to the dataset repository ACCOUNT/NAME; returns its address.

    The repository is made if there is none. `progress` gets (bytes checked, bytes in total) of the
    comparison with the hashes. Raises DataError for a folder that cannot be used, SettingsError
    for a name that no repository can have, WorkError where the Hub refuses or cannot be reached.
    """
    check_repository(repo)
    dataset = open_dataset(folder)
    dataset.tokenizer()
    check_hashes(dataset.manifest.files(folder), progress)
    try:
        return _upload(folder, dataset.manifest, repo, private)
    except (*hub_errors(), ValueError, RuntimeError, OSError) as error:
        raise upload_error(repo, error) from None


def dataset_card(manifest: Manifest, repo: str) -> str:
    """The README.md of the repository: sources, tokenizer, counts and hashes."""
    parts = [_front_matter(manifest), f"# {repo.rpartition('/')[2]}", _about(manifest)]
    parts += ["## Read it", _usage(manifest, repo), "## Sources", _sources(manifest)]
    parts += ["## Files", _files(manifest)]
    return "\n\n".join(parts) + "\n"


def _upload(folder: Path, manifest: Manifest, repo: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    url = api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
    names = [entry.name for _, entry in manifest.files(folder)]
    for number, some in enumerate(_batches(names), start=1):
        added = [CommitOperationAdd(name, folder / name) for name in some]
        _commit(api, repo, added, f"Files {some[0]} to {some[-1]} ({number})")
    card = dataset_card(manifest, repo).encode()
    last: list[Any] = [
        CommitOperationAdd("tokenizer.json", folder / "tokenizer.json"),
        CommitOperationAdd("README.md", card),
        CommitOperationAdd(manifest_file.NAME, folder / manifest_file.NAME),
    ]
    _commit(api, repo, last + _stale(api, repo, set(names)), "Manifest and dataset card")
    return str(url)


def _batches(names: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(names), COMMIT_FILES):
        yield names[first : first + COMMIT_FILES]


def _commit(api: "HfApi", repo: str, operations: list[Any], message: str) -> None:
    api.create_commit(repo, operations, commit_message=message, repo_type="dataset")


def _stale(api: "HfApi", repo: str, names: set[str]) -> list[Any]:
    """Deletes the data files of an earlier dataset with more files."""
    from huggingface_hub import CommitOperationDelete

    found = api.list_repo_files(repo, repo_type="dataset")
    old = (name for name in found if DATA_FILE.fullmatch(name) and name not in names)
    return [CommitOperationDelete(name) for name in sorted(old)]


def _front_matter(manifest: Manifest) -> str:
    lines = ["---", "tags:", "- openpalm"]
    if isinstance(manifest, BlocksManifest):
        lines += ["configs:", "- config_name: default", "  data_files:"]
        for split, name in NAMED_SPLITS.items():
            if manifest.splits[split].files:
                lines += [f"  - split: {name}", f"    path: {split}-*.parquet"]
    return "\n".join([*lines, "---"])


def _about(manifest: Manifest) -> str:
    counts = [
        f"| {split} | {entry.documents:,} | {entry.tokens:,} | {entry.bytes:,} |"
        for split, entry in manifest.splits.items()
    ]
    rows = ["| split | documents | tokens | bytes of text |", "|---|---|---|---|", *counts]
    lines = [
        f"Text as token ids, made with OpenPaLM; vocabulary of {manifest.vocab_size:,} ids "
        f"(`tokenizer.json`, SHA-256 `{manifest.tokenizer}`). Every document ends with the "
        "end-of-text token.",
    ]
    if isinstance(manifest, BlocksManifest):
        dropped = sum(manifest.rest.values())
        lines.append(
            f"Each row's `input_ids` has {manifest.sequence_length:,} ids: the documents, joined "
            f"and cut; order {manifest.order}. {dropped:,} tokens at the ends of the splits fill "
            "no row and are left out."
        )
    return "\n\n".join([*lines, "\n".join(rows)])


def _usage(manifest: Manifest, repo: str) -> str:
    lines = [
        f"openpalm copy hf://datasets/{repo} data/here",
        "openpalm train --model palm-tiny --data data/here --out runs/here",
    ]
    text = "```bash\n" + "\n".join(lines) + "\n```"
    if isinstance(manifest, BlocksManifest):
        text += f'\n\nor `datasets.load_dataset("{repo}")`.'
    return text


def _sources(manifest: Manifest) -> str:
    rows = ["| input | files | bytes | SHA-256 |", "|---|---|---|---|"]
    for entry in manifest.inputs:
        # A path on the maker's disk says nothing to others; its last name does.
        is_local = not re.match(r"\w+:", entry.given)
        name = Path(entry.given).name if is_local else entry.given
        rows.append(f"| `{name}` | {entry.files:,} | {entry.bytes:,} | `{entry.sha256}` |")
    counts = manifest.documents
    rows.append(
        f"\n{counts.read:,} documents read; {counts.duplicates:,} repeated and {counts.blank:,} "
        "blank ones dropped."
    )
    return "\n".join(rows)


def _files(manifest: Manifest) -> str:
    rows = ["| file | bytes | SHA-256 |", "|---|---|---|"]
    files: list[FileEntry] = [file for entry in manifest.splits.values() for file in entry.files]
    rows += [f"| {file.name} | {file.size:,} | `{file.sha256}` |" for file in files]
    return "\n".join(rows)
