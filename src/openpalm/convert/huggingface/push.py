"""Uploads a folder to a model repository of the Hugging Face Hub."""

import re
from pathlib import Path

from openpalm import __version__
from openpalm.errors import SettingsError, WorkError

_NAME = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def check_repository(name: str) -> None:
    """Raises SettingsError for a name that no repository can have."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise SettingsError(f"--repo {name}: must be ACCOUNT/NAME, of letters, digits, -, _ and .")


def upload(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Makes the repository if it is not there, uploads every file; returns the address.

    The token is the one of `hf auth login`, or HF_TOKEN. Files that the repository has and the
    folder has not are deleted, so that no shard of an earlier upload stays. Raises WorkError if
    the Hub refuses or the network fails.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    api = HfApi(library_name="openpalm", library_version=__version__)
    disable_progress_bars()
    try:
        # None: what the account has as its default.
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, delete_patterns="*"
        )
        return str(made)
    # huggingface_hub raises RuntimeError where the upload of a large file fails.
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = (
            "log in with `hf auth login` or set HF_TOKEN"
            if status in (401, 403)
            else ("check the name and the network, and run the command again")
        )
        reason = " ".join(str(error).split())[:200]
        raise WorkError(f"{repository}: cannot be uploaded ({reason}); {remedy}") from None
    finally:
        enable_progress_bars()
