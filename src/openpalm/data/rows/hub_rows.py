"""A file of a dataset on the Hugging Face Hub, downloaded once: hf://datasets/OWNER/NAME/FILE.

huggingface_hub downloads it, so its cache and its variables (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE)
apply. Nothing in a dataset is executed: only this one file is fetched.
"""

import re
from pathlib import Path

from openpalm.errors import DataError, WorkError

PREFIX = "hf://"
_FILE = re.compile(
    r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w.-]+(?:/[\w.-]+)*)", re.ASCII
)


def fetch_rows(address: str) -> Path:
    """The local copy of hf://datasets/OWNER/NAME[@REVISION]/FILE.

    Raises DataError for an address that is none or names nothing, WorkError when the network fails.
    """
    found = _FILE.fullmatch(address)
    if found is None or {".", ".."} & {*address.split("/")}:
        raise DataError(f"{address}: write hf://datasets/OWNER/NAME/FILE.jsonl, or NAME@REVISION")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision, file = found.groups()
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError, but of the network
        raise _unreachable(address, error) from None
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(
            f"{address}: the Hub has no such file, or not for you ({_first_line(error)}); check "
            "the name, or log in with `hf auth login`"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> WorkError:
    return WorkError(f"{address}: cannot be downloaded ({_first_line(error)}); try again")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
