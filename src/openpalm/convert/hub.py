"""The four published PaLMs by name: found or downloaded, converted once, kept in a cache.

Downloads are bounded, go to a temporary name and are never used in part; a cached conversion is
verified like any checkpoint when it is loaded.
"""

import dataclasses
import hashlib
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from openpalm.convert.detect import Foreign, read_foreign
from openpalm.convert.export import as_openpalm
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
"""They were published in May 2023: after the final norm was applied, before gamma changed."""

TOKENIZER = ("EleutherAI/gpt-neox-20b", "tokenizer.json")
_SIZES = ("vocab_size", "dim", "depth", "heads", "head_dim", "ff_dim")
_BYTES_PER_PARAMETER = 16  # float32 weights with an optimizer's two moments saved beside them
_SLACK_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ValueError,  # a malformed address or header
)


def fetch(
    name: str,
    *,
    path: str | None = None,
    url: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The checkpoint directory of a hub name, converted on first use.

    path: a local file (or a folder holding one); url: where to download from instead;
    OPENPALM_HUB, a folder or base URL holding NAME.pt, stands in for the publisher;
    OPENPALM_CACHE says where the cache is. Raises CheckpointError for an unknown name or a file
    of another model, WorkError when the network fails.
    """
    if name not in NAMES:
        raise CheckpointError(f"{name}: no such hub name; use one of {', '.join(NAMES)}")
    say = say or (lambda line: print(line, file=sys.stderr))
    local, address = _origin(name, path, url)
    kept = cache() / f"{name}-{_key(local, address)}"
    if (kept / "manifest.json").is_file():
        return kept
    if local is not None:
        _convert(name, local, kept, say)
        return kept
    download = cache() / f".{name}.part-{os.getpid()}.pt"
    try:
        cache().mkdir(parents=True, exist_ok=True)
        say(f"{name}: downloading {address}")
        _download(address, download, _bound(_expected(name)))
        _convert(name, download, kept, say)
    except OSError as error:
        raise StorageError(f"{cache()}: {error.strerror or error}; free some space") from error
    finally:
        download.unlink(missing_ok=True)
    return kept


def cache() -> Path:
    """OPENPALM_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("OPENPALM_CACHE"):
        return Path(chosen) / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "openpalm" / "hub"


def _origin(name: str, path: str | None, url: str | None) -> tuple[Path | None, str]:
    """A local file, or the address to download from."""
    if path is not None and url is not None:
        raise CheckpointError(f"{name}: give path or url, not both")
    stand_in = os.environ.get("OPENPALM_HUB")
    if path is None and url is None and stand_in:
        is_url = stand_in.startswith(("http://", "https://"))
        url = f"{stand_in.rstrip('/')}/{name}.pt" if is_url else None
        path = None if is_url else str(Path(stand_in) / f"{name}.pt")
    if path is not None:
        return Path(path), ""
    repository = NAMES[name][1]
    address = url or f"https://huggingface.co/{repository}/resolve/main/{name}.pt"
    if not address.startswith(("http://", "https://")):
        raise CheckpointError(f"{address}: not an http(s) address; use path for local files")
    return None, address


def _key(local: Path | None, address: str) -> str:
    """Names one origin, so that another file or address is converted anew."""
    if local is not None:
        if not local.exists():
            raise CheckpointError(f"{local}: no such file; check the path or OPENPALM_HUB")
        stat = local.stat()
        address = f"{local.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _expected(name: str) -> ModelConfig:
    return preset(NAMES[name][0]).config


def _bound(config: ModelConfig) -> int:
    return _BYTES_PER_PARAMETER * config.parameters + _SLACK_BYTES


def _convert(name: str, file: Path, kept: Path, say: Callable[[str], None]) -> None:
    foreign = _read(name, file)
    tokenizer = _tokenizer(say)
    say(f"{name}: read as palm-rlhf-pytorch {foreign.era}, writing {kept}")
    lineage = foreign.lineage() | {"source_file": f"{name}.pt"}
    mine = kept.with_name(f".{kept.name}.{os.getpid()}")
    as_openpalm(foreign.model(), mine, lineage=lineage, tokenizer_json=tokenizer)
    try:
        mine.rename(kept)
    except OSError:  # another process was first, or something else is in the way
        shutil.rmtree(mine, ignore_errors=True)
        if not (kept / "manifest.json").is_file():
            raise


def _read(name: str, file: Path) -> Foreign:
    """The file as the published era and context; of that size and no other."""
    expected = _expected(name)
    foreign = read_foreign(file, "palm-rlhf-pytorch", ERA)
    for field in _SIZES:
        wanted, found = getattr(expected, field), getattr(foreign.config, field)
        if wanted != found:
            raise CheckpointError(f"{file}: not {name}: its {field} is {found}, not {wanted}")
    config = dataclasses.replace(foreign.config, context=expected.context)
    return dataclasses.replace(foreign, config=config)


def _download(address: str, target: Path, most: int) -> None:
    """Fetches all of `address`, at most `most` bytes, or raises."""
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn())
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "openpalm"})
        with (
            urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer,
            target.open("wb") as file,
            Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar,
        ):
            announced = int(answer.headers.get("Content-Length") or 0)
            task = bar.add_task("download", total=announced or None)
            received = _copy(answer, file, most, lambda count: bar.advance(task, count))
    except urllib.error.HTTPError as error:
        raise _unreachable(address, f"{error.code} {error.reason}") from None
    except _NETWORK_ERRORS as error:
        raise _unreachable(address, str(getattr(error, "reason", error))) from None
    if announced and received != announced:
        raise _unreachable(address, f"ended after {received} of {announced} bytes")


def _copy(source: IO[bytes], target: IO[bytes], most: int, advance: Callable[[int], None]) -> int:
    received = 0
    while chunk := source.read(_CHUNK_BYTES):
        received += len(chunk)
        if received > most:
            raise CheckpointError(f"more than {most} bytes came; that is not this model")
        target.write(chunk)
        advance(len(chunk))
    return received


def _unreachable(address: str, reason: str) -> WorkError:
    return WorkError(
        f"{address}: cannot be downloaded ({reason}); try again, or get the file elsewhere and "
        "give its path (OPENPALM_HUB=FOLDER)"
    )


def _tokenizer(say: Callable[[str], None]) -> str | None:
    """GPT-NeoX's tokenizer.json, or None with a note: the model is usable on ids without it."""
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(*TOKENIZER)).read_text(encoding="utf-8")
    # The client raises errors of its own, of httpx and of the system; none of them may stop us.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        say(f"note: no tokenizer, its download failed ({reason}); the model reads ids only")
        return None
