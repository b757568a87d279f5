"""A Hugging Face folder or hub name as a checkpoint: converted once, into the user's cache.

The key is the content of the files that are read, so a changed folder is converted again. A cached
conversion is verified when it is loaded, like any checkpoint.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openpalm.base.json_file import read_json
from openpalm.base.typed import home
from openpalm.convert import hub
from openpalm.convert.huggingface import read as palm
from openpalm.convert.huggingface.names import MODEL_TYPE
from openpalm.errors import CheckpointError, StorageError, WorkError

Say = Callable[[str], None]

WRITERS: dict[str, Callable[[Path, Path], None]] = {MODEL_TYPE: palm.write_checkpoint}
"""model_type in config.json -> function (folder, directory) that writes our checkpoint"""

_VERSION = 1
"""Increased when a conversion changes, so that cached ones are made again."""
_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *palm.TOKENIZER_FILES,
)
"""The files of a repository that are downloaded; code and pickles never are."""
_SCHEME = "hf://"
_TIMEOUT_S = 10
_HUB_NAME = re.compile(
    r"(?P<repository>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>[\w.-]{1,100}))?", re.ASCII
)


def checkpoint_path(name: str, say: Say | None = None) -> Path:
    """The path of the run or checkpoint that `name` means, converted first if it is foreign.

    name: a path, one of `hub.NAMES`, or a model of the Hugging Face Hub: ACCOUNT/NAME, where no
    local folder ACCOUNT exists, or hf://ACCOUNT/NAME, each optionally with @REVISION. Raises
    CheckpointError for a kind of model that is not read, WorkError when the network fails,
    StorageError when the disk is full.
    """
    say = say or (lambda line: print(line, file=sys.stderr))
    path = Path(home(name))
    if name in hub.NAMES and not path.exists():
        return hub.fetch(name)
    if is_huggingface_folder(path):
        return _converted(path, name, say)
    if name.startswith(_SCHEME) or (not path.exists() and not path.parent.exists()):
        found = _HUB_NAME.fullmatch(name.removeprefix(_SCHEME))
        if found is not None:
            return _converted(_downloaded(name, found, say), name, say)
        if name.startswith(_SCHEME):
            raise CheckpointError(f"{name}: must be hf://ACCOUNT/NAME")
    return path


def is_huggingface_folder(path: Path) -> bool:
    """Whether the folder holds a model of transformers and not a checkpoint or run of ours."""
    if not (path / "config.json").is_file() or (path / "checkpoints").is_dir():
        return False
    return not (path / "manifest.json").is_file() and "model_type" in _config(path)


def writer(folder: Path) -> Callable[[Path, Path], None]:
    """The function that converts this folder. Raises CheckpointError for an unknown model_type."""
    kind = _config(folder).get("model_type")
    if not isinstance(kind, str) or kind not in WRITERS:
        raise CheckpointError(
            f"{folder}: a Hugging Face model of type {str(kind)[:40]!r}; OpenPaLM reads "
            f"{' and '.join(sorted(WRITERS))}"
        )
    return WRITERS[kind]


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", "check the path", palm.MAX_CONFIG_BYTES)


def _converted(folder: Path, name: str, say: Say) -> Path:
    write = writer(folder)
    try:
        digest = hashlib.sha256(f"{_VERSION} {palm.folder_digest(folder)}".encode()).hexdigest()
        kept = hub.cache() / f"huggingface-{digest[:16]}"
        if (kept / "manifest.json").is_file():
            return kept
        say(f"{name}: converting it once, into {kept}")
        mine = kept.with_name(f".{kept.name}.{os.getpid()}")
        try:
            write(folder, mine)
            hub.keep(mine, kept)
        finally:
            shutil.rmtree(mine, ignore_errors=True)
    except OSError as error:
        where = error.filename or hub.cache()
        raise StorageError(f"{where}: {error.strerror or error}; free some space") from error
    return kept


def _downloaded(name: str, found: re.Match[str], say: Say) -> Path:
    """The model's files in Hugging Face's cache; config.json first, to refuse other models."""
    import httpx2
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = found["repository"], found["revision"]
    offline = False
    try:
        try:
            # Unlike a download it fails at once where there is no network: NAME may be a typo.
            HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S)
        except (httpx2.HTTPError, ConnectionError):
            cached = try_to_load_from_cache(repository, "config.json", revision=revision)
            if not isinstance(cached, str):
                raise
            offline = True
        which: Any = {"revision": revision, "local_files_only": offline}
        writer(Path(hf_hub_download(repository, "config.json", **which)).parent)
        say(f"{name}: reading it from {'the cache of ' * offline}the Hugging Face Hub")
        return Path(snapshot_download(repository, allow_patterns=list(_FILES), **which))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:200]
        if name.startswith(_SCHEME):
            raise WorkError(f"{name}: cannot be downloaded ({reason}); try again") from None
        raise CheckpointError(
            f"{name}: no such checkpoint or run; check the path (as the name of a model on the "
            f"Hugging Face Hub it cannot be read either: {reason})"
        ) from None
