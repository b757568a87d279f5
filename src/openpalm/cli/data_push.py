"""`openpalm data push`: uploads a prepared dataset or blocks to the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpalm.base import settings


@dataclass(frozen=True)
class Push:
    data: Path
    """folder that `openpalm data prepare`, `data build` or `data blocks` wrote"""
    repo: str
    """dataset repository ACCOUNT/NAME; created if there is none"""
    private: bool = False
    """a repository that is created is private"""


def run_push(argv: Sequence[str]) -> None:
    given = settings.parse(
        Push,
        argv,
        verb="data push",
        about="Uploads a prepared dataset or blocks to the Hugging Face Hub, with a dataset card. "
        "Every file is checked against its hash first. Repeat the command after an interruption: "
        "files that are there already are not sent again. HF_TOKEN or `hf auth login` gives the "
        "account, HF_ENDPOINT another Hub.",
        examples=("openpalm data push blocks/c4 --repo ME/c4-neox-8k --private",),
        positional=("data",),
    )
    push(given.data, given.repo, private=given.private)


def push(folder: Path, repo: str, *, private: bool) -> None:
    from openpalm.base.progress_bar import long_job
    from openpalm.data.dataset.push import push_dataset

    with long_job("uploading") as progress:
        url = push_dataset(folder, repo, private=private, progress=progress)
    print(f"{folder}: pushed to {url}")
    print(f"copy it back: openpalm copy hf://datasets/{repo} DIR")
