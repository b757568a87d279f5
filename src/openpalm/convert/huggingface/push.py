"""Uploads a folder to a model repository of the Hugging Face Hub."""

from pathlib import Path

from openpalm import __version__
from openpalm.base.hub import hub_errors, upload_error


def upload(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Makes the repository if it is not there, uploads every file; returns the address.

    The token is the one of `hf auth login`, or HF_TOKEN. Files that the repository has and the
    folder has not are deleted, so that no shard of an earlier upload stays. Raises WorkError if
    the Hub refuses or the network fails.
    """
    from huggingface_hub import HfApi
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
    except (*hub_errors(), OSError, ValueError, RuntimeError) as error:
        raise upload_error(repository, error) from None
    finally:
        enable_progress_bars()
