"""Downloads the four published PaLMs by hub name and converts each once, into a cache.

huggingface_hub downloads from the publisher, so its cache and its variables (HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE) apply. Every download has a size limit, and one from another address a temporary
name, so that a part of a file is never used. A cached conversion is verified when it is loaded,
like any checkpoint.
"""

import dataclasses
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from openpalm.base.files import own_folder
from openpalm.base.hub import hub_errors, reason_of
from openpalm.base.progress_bar import ProgressBar
from openpalm.convert.detect import ForeignCheckpoint, read_foreign
from openpalm.convert.export import save_as_openpalm
from openpalm.errors import CheckpointError, StorageError, WorkError
from openpalm.model.config import ModelConfig, preset

NAMES = {
    "palm_150m_8k_v0": ("palm-150m", "conceptofmind/palm-150m"),
    "palm_410m_8k_v0": ("palm-410m", "conceptofmind/palm-410m"),
    "palm_1b_8k_v0": ("palm-1b", "conceptofmind/palm-1b"),
    "palm_2b_8k_v0": ("palm-2.1b", "conceptofmind/palm-2b"),
}
"""hub name -> (preset, repository)"""

ERA = "0.2.1"
"""Published in May 2023: logits already came from the final norm, gamma was not yet minus one."""

TOKENIZER = ("EleutherAI/gpt-neox-20b", "tokenizer.json")
_SIZES = ("vocab_size", "dim", "depth", "heads", "head_dim", "ff_dim")
_BYTES_PER_PARAMETER = 16  # float32 weights, and an optimizer's two moments in the same file
_SLACK_BYTES = 64 << 20
_TOKENIZER_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30


def fetch(
    name: str,
    *,
    path: str | None = None,
    url: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The checkpoint directory of a hub name, converted on first use.

    path: a local file, or a folder with one checkpoint file; url: another address to download
    from. OPENPALM_HUB, a folder or base URL that holds NAME.pt, replaces the publisher's address;
    OPENPALM_CACHE sets the cache directory. Raises CheckpointError for an unknown name or a file
    of another model, WorkError when the network fails, StorageError when the disk is full.
    """
    if name not in NAMES:
        raise CheckpointError(f"{name}: no such hub name; use one of {', '.join(NAMES)}")
    say = say or (lambda line: print(line, file=sys.stderr))
    local, url = _origin(name, path, url)
    kept = cache() / f"{name}-{_key(name, local, url)}"
    if (kept / "manifest.json").is_file():
        return kept
    try:
        if local is None and url is None:
            say(f"{name}: downloading from {NAMES[name][1]}")
            local = _published(name)
        elif url is not None:
            say(f"{name}: downloading {url}")
        with own_folder(kept) as work:
            if url is not None:
                _download(url, work / "download.pt", _bound(_expected(name)))
            _convert(name, local or work / "download.pt", work, kept, say)
    except OSError as error:
        raise StorageError(f"{cache()}: {error.strerror or error}; free some space") from error
    return kept


def cache() -> Path:
    """OPENPALM_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("OPENPALM_CACHE"):
        return Path(chosen) / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "openpalm" / "hub"


def _origin(name: str, path: str | None, url: str | None) -> tuple[Path | None, str | None]:
    """A local file, or an address to download from; (None, None) is the publisher's repository."""
    if path is not None and url is not None:
        raise CheckpointError(f"{name}: give path or url, not both")
    replacement = os.environ.get("OPENPALM_HUB")
    if path is None and url is None and replacement:
        is_url = replacement.startswith(("http://", "https://"))
        url = f"{replacement.rstrip('/')}/{name}.pt" if is_url else None
        path = None if is_url else str(Path(replacement) / f"{name}.pt")
    if url is not None and not url.startswith(("http://", "https://")):
        raise CheckpointError(f"{url}: not an http(s) address; use path for local files")
    return None if path is None else Path(path), url


def _key(name: str, local: Path | None, url: str | None) -> str:
    """Identifies one origin: another file or address is another cache entry."""
    origin = url or f"https://huggingface.co/{NAMES[name][1]}/resolve/main/{name}.pt"
    if local is not None:
        if not local.exists():
            raise CheckpointError(f"{local}: no such file; check the path or OPENPALM_HUB")
        stat = local.stat()
        origin = f"{local.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(origin.encode()).hexdigest()[:16]


def _expected(name: str) -> ModelConfig:
    return preset(NAMES[name][0]).config


def _bound(config: ModelConfig) -> int:
    return _BYTES_PER_PARAMETER * config.parameters + _SLACK_BYTES


def _convert(name: str, file: Path, work: Path, kept: Path, say: Callable[[str], None]) -> None:
    foreign = _read(name, file)
    tokenizer = _tokenizer(say)
    say(f"{name}: read as palm-rlhf-pytorch {foreign.era}, writing {kept}")
    lineage = foreign.lineage() | {"source_file": f"{name}.pt"}
    mine = work / "checkpoint"
    save_as_openpalm(foreign.model(), mine, lineage=lineage, tokenizer_json=tokenizer)
    keep(mine, kept)


def keep(mine: Path, kept: Path) -> None:
    """Gives this process's conversion its name in the cache, unless another process was first."""
    try:
        mine.rename(kept)
    except OSError:  # another process was first, or another file has the name
        shutil.rmtree(mine, ignore_errors=True)
        if not (kept / "manifest.json").is_file():
            raise


def _read(name: str, file: Path) -> ForeignCheckpoint:
    """Reads the file with the published era and context; refuses a model of another size."""
    expected = _expected(name)
    foreign = read_foreign(file, "palm-rlhf-pytorch", ERA)
    for field in _SIZES:
        wanted, found = getattr(expected, field), getattr(foreign.config, field)
        if wanted != found:
            raise CheckpointError(f"{file}: not {name}: its {field} is {found}, not {wanted}")
    config = dataclasses.replace(foreign.config, context=expected.context)
    return dataclasses.replace(foreign, config=config)


def _published(name: str) -> Path:
    """The publisher's file in Hugging Face's cache; huggingface_hub resumes a partial download."""
    from huggingface_hub import hf_hub_download

    repository = NAMES[name][1]
    try:
        _refuse_larger(repository, f"{name}.pt", _bound(_expected(name)))
        return Path(hf_hub_download(repository, f"{name}.pt"))
    except hub_errors() as error:
        raise _unreachable(f"{repository}/{name}.pt", reason_of(error)) from None


def _refuse_larger(repository: str, file: str, most: int) -> None:
    """Raises CheckpointError if the hub names a size above `most` bytes, before any download.

    A file in huggingface_hub's cache is not asked about: `_read` refuses a model of another size.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, file), str):
        return
    size = get_hf_file_metadata(hf_hub_url(repository, file), timeout=_TIMEOUT_S).size
    if size is not None and size > most:
        raise CheckpointError(
            f"{repository}/{file}: has {size:,} bytes, at most {most:,} are expected; not "
            "downloaded: get the file yourself and set OPENPALM_HUB to its folder if it is right"
        )


def _download(url: str, target: Path, most: int) -> None:
    """Downloads `url`, at most `most` bytes. Raises WorkError for a failed or short download."""
    import httpx2

    try:
        with (
            httpx2.stream("GET", url, timeout=_TIMEOUT_S, follow_redirects=True) as response,
            target.open("wb") as file,
            ProgressBar("download", in_bytes=True) as bar,
        ):
            response.raise_for_status()
            size = int(response.headers.get("Content-Length") or 0)
            bar.move_to(0, size)
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                if response.num_bytes_downloaded > most:
                    raise CheckpointError(f"{url}: more than {most} bytes; that is not this model")
                file.write(chunk)
                bar.advance(len(chunk))
    except httpx2.HTTPStatusError as error:
        reply = error.response
        raise _unreachable(url, f"{reply.status_code} {reply.reason_phrase}") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _unreachable(url, reason_of(error)) from None


def _unreachable(address: str, reason: str) -> WorkError:
    return WorkError(
        f"{address}: cannot be downloaded ({reason}); try again, or get the file elsewhere and "
        "set OPENPALM_HUB to its folder"
    )


def _tokenizer(say: Callable[[str], None]) -> str | None:
    """GPT-NeoX's tokenizer.json, or None with a note: the model is usable on ids without it."""
    try:
        from huggingface_hub import hf_hub_download

        _refuse_larger(*TOKENIZER, _TOKENIZER_BYTES)
        return Path(hf_hub_download(*TOKENIZER)).read_text(encoding="utf-8")
    # Errors of huggingface_hub, of httpx and of the system: the model works without a tokenizer.
    except Exception as error:
        reason = reason_of(error)
        say(f"note: no tokenizer, its download failed ({reason}); the model reads ids only")
        return None
