"""A Hugging Face folder or hub name as a checkpoint: converted once, into the user's cache.

The same for a folder of mesh-transformer-jax. The key is the content of the files that are read (of
mesh-transformer-jax: their path, size and time), so a changed folder is converted again. A cached
conversion is verified when it is loaded, like any checkpoint.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openpalm.base.files import own_folder
from openpalm.base.hub import PREFIX, REPOSITORY, hub_errors, reason_of
from openpalm.base.typed import home
from openpalm.convert import published
from openpalm.convert.huggingface.read import TOKENIZER_FILES
from openpalm.convert.source import Source, check_kind, detect, open_source
from openpalm.convert.stamps import refuse_changed, stamps
from openpalm.convert.target import write
from openpalm.errors import CheckpointError, StorageError, WorkError

Say = Callable[[str], None]

_FOREIGN = ("huggingface", "mesh-transformer-jax")
_VERSION = 2
"""Increased when a conversion changes, so that cached ones are made again."""
_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_OLD_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Only for repositories without safetensors; nothing in them is executed."""
_TIMEOUT_S = 10
_HUB_NAME = re.compile(rf"(?P<repository>{REPOSITORY})(@(?P<revision>[\w.-]{{1,100}}))?", re.ASCII)


def checkpoint_path(name: str, say: Say | None = None) -> Path:
    """The path of the run or checkpoint that `name` means, converted first if it is foreign.

    name: a path, one of `published.NAMES`, or a model of the Hugging Face Hub: ACCOUNT/NAME, if no
    local folder ACCOUNT exists, or hf://ACCOUNT/NAME, each optionally with @REVISION. Raises
    CheckpointError for a kind of model that is not read, WorkError when the network fails,
    StorageError when the disk is full.
    """
    say = say or (lambda line: print(line, file=sys.stderr))
    path = Path(home(name))
    if name in published.NAMES and not path.exists():
        return published.fetch(name)
    if path.is_dir() and detect(path) in _FOREIGN:
        return _converted(path, name, say)
    if name.startswith(PREFIX) or (not path.exists() and not path.parent.exists()):
        found = _HUB_NAME.fullmatch(name.removeprefix(PREFIX))
        if found is not None:
            return _converted(_downloaded(name, found, say), name, say)
        if name.startswith(PREFIX):
            raise CheckpointError(f"{name}: must be hf://ACCOUNT/NAME")
    return path


def _converted(folder: Path, name: str, say: Say) -> Path:
    try:
        before = stamps(folder)
        source = open_source(folder)
        # The checksums of mesh-transformer-jax's files are short: anyone can make others with them.
        own = (folder.resolve(), before) if source.format == "mesh-transformer-jax" else ()
        kept = published.cache() / f"{source.format}-{_key(source, own)}"
        if (kept / "manifest.json").is_file():
            return kept
        say(f"{name}: {source.found}; converting it once, into {kept}")
        with own_folder(kept) as work:
            mine = work / "checkpoint"
            write(source, mine, "openpalm")
            defaults = json.dumps(vars(source.defaults))
            (mine / "generation_config.json").write_text(defaults, encoding="utf-8")
            refuse_changed(folder, before)
            published.keep(mine, kept)
    except OSError as error:
        where = error.filename or published.cache()
        raise StorageError(f"{where}: {error.strerror or error}; free some space") from error
    return kept


def _key(source: Source, own: object) -> str:
    """Identifies everything that is read from a folder; `own` tells it from other folders."""
    parts = [_VERSION, source.lineage["source_sha256"], source.config, source.reward]
    parts += [source.tokenizer_json, source.defaults, own]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _downloaded(name: str, found: re.Match[str], say: Say) -> Path:
    """The model's files in Hugging Face's cache; config.json first, to refuse other models."""
    import httpx2
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache

    repository, revision = found["repository"], found["revision"]
    offline, weights = False, _WEIGHTS
    try:
        try:
            # Unlike a download it fails at once where there is no network: NAME may be a typo.
            info = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S)
            files = [each.rfilename for each in info.siblings or []]
            if not any(name.endswith(".safetensors") for name in files):
                weights = _OLD_WEIGHTS
        except (httpx2.HTTPError, ConnectionError):
            cached = try_to_load_from_cache(repository, "config.json", revision=revision)
            if not isinstance(cached, str):
                raise
            offline = True
        which: Any = {"revision": revision, "local_files_only": offline}
        check_kind(Path(hf_hub_download(repository, "config.json", **which)).parent)
        say(f"{name}: reading it from {'the cache of ' * offline}the Hugging Face Hub")
        patterns = [*_FILES, *weights]
        return Path(snapshot_download(repository, allow_patterns=patterns, **which))
    except hub_errors() as error:
        reason = reason_of(error)
        if name.startswith(PREFIX):
            raise WorkError(f"{name}: cannot be downloaded ({reason}); try again") from None
        raise CheckpointError(
            f"{name}: no such checkpoint or run; check the path (as the name of a model on the "
            f"Hugging Face Hub it cannot be read either: {reason})"
        ) from None
