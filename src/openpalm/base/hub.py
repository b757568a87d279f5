"""The Hugging Face Hub: names of repositories, errors as one line, files of datasets.

huggingface_hub does the transfers, so its cache and its variables (HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_TOKEN) apply. Nothing in a repository is executed.
"""

import re
from pathlib import Path

from openpalm.base.console import shown
from openpalm.errors import DataError, SettingsError, WorkError

PREFIX = "hf://"
REPOSITORY = r"\w[\w.-]{0,95}/\w[\w.-]{0,95}"
"""ACCOUNT/NAME, for re.ASCII"""
_DATASET_FILE = re.compile(
    r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w.-]+(?:/[\w.-]+)*)", re.ASCII
)


def check_repository(name: str, option: str = "--repo") -> None:
    """Raises SettingsError for a name that no repository can have."""
    is_name = re.fullmatch(REPOSITORY, name, re.ASCII)
    if not is_name or "--" in name or ".." in name or name.endswith(".git"):
        raise SettingsError(
            f"{option} {shown(name)}: must be ACCOUNT/NAME, of letters, digits, -, _ and ."
        )


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the Hub refuses, is not reached or is switched off."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # OfflineModeIsEnabled is a ConnectionError.
    found = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError)
    return (*found, httpx2.HTTPError, ConnectionError)


def reason_of(error: BaseException) -> str:
    """What the server said, or the error that caused this one, in one line."""
    said = getattr(error, "server_message", None)
    while error.__cause__ and not said:
        error = error.__cause__
        said = getattr(error, "server_message", None)
    return " ".join((said or str(error)).split())[:200] or type(error).__name__


def upload_error(repository: str, error: Exception) -> WorkError:
    """The error to raise for an upload that failed; the same command repeats or continues it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedy = "check the name and the network, and run the command again"
    if status in (401, 403, 404):
        remedy = "log in with `hf auth login` or set HF_TOKEN to a token that may write"
    return WorkError(f"{repository}: cannot be uploaded ({reason_of(error)}); {remedy}")


def fetch_dataset_file(address: str) -> Path:
    """The local copy of hf://datasets/OWNER/NAME[@REVISION]/FILE; only this file is downloaded.

    Raises DataError for an address that is none or names nothing, WorkError when the network fails.
    """
    found = _DATASET_FILE.fullmatch(address)
    if found is None or {".", ".."} & {*address.split("/")}:
        raise DataError(f"{address}: write hf://datasets/OWNER/NAME/FILE.jsonl, or NAME@REVISION")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision, file = found.groups()
    absent = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (*absent, *hub_errors(), OSError) as error:
        reason = reason_of(error)
        # LocalEntryNotFoundError is an EntryNotFoundError, but of the network.
        if isinstance(error, absent) and not isinstance(error, LocalEntryNotFoundError):
            raise DataError(
                f"{address}: the Hub has no such file, or not for you ({reason}); check the name, "
                "or log in with `hf auth login`"
            ) from None
        raise WorkError(f"{address}: cannot be downloaded ({reason}); try again") from None
