"""`openpalm push`: uploads a model to the Hugging Face Hub, with a card that tells its lineage."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openpalm.base.settings import parse


@dataclass(frozen=True)
class PushSettings:
    path: str
    """run or checkpoint, or a checkpoint of another project that `openpalm convert` reads"""
    repo: str
    """repository on the Hugging Face Hub, ACCOUNT/NAME; made if it does not exist"""
    private: bool = False
    """make a new repository private"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """data type of the weights; default: that of the checkpoint"""

    def __post_init__(self) -> None:
        from openpalm.base.hub import check_repository

        check_repository(self.repo)


def run(argv: Sequence[str]) -> None:
    settings = parse(
        PushSettings,
        argv,
        verb="push",
        about="Exports the model at PATH as `openpalm convert --to huggingface` does, and "
        "uploads it. The token is the one of `hf auth login`, or HF_TOKEN.",
        examples=[
            "openpalm push runs/chat --repo me/chat --private",
            "openpalm push runs/chat --repo me/chat --dtype bfloat16",
        ],
        positional=["path"],
    )
    from openpalm import __version__
    from openpalm.base.typed import home
    from openpalm.convert.huggingface.push import upload
    from openpalm.convert.source import open_source
    from openpalm.convert.stamps import refuse_changed, stamps
    from openpalm.convert.target import write

    path = Path(home(settings.path))
    before = stamps(path)
    source = open_source(path)
    print(f"read {settings.path}: {source.found}")
    with tempfile.TemporaryDirectory(prefix="openpalm-push-") as work:
        folder = Path(work) / "model"
        written = write(source, folder, "huggingface", dtype=settings.dtype)
        for note in written.notes:
            print(f"  {note}")
        what = "logits" if source.reward is None else "scores"
        print(f"exported: {what} within {written.difference:.1e} of the model that was read")
        if source.format != "openpalm":
            refuse_changed(path, before)
        message = f"Upload by OpenPaLM {__version__}"
        address = upload(folder, settings.repo, private=settings.private, message=message)
    print(f"uploaded to {address}")
