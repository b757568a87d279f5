"""`openpalm merge-lora`: a checkpoint with an adapter in, the same function without one out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpalm.base.settings import parse
from openpalm.errors import CheckpointError


@dataclass(frozen=True)
class MergeSettings:
    path: str
    """run or checkpoint that has an adapter, or whose model --adapter is for"""
    out: Path
    """the checkpoint to make; must not exist, or be empty"""
    adapter: Path | None = None
    """directory in PEFT's layout, or a run or checkpoint that has an adapter"""
    force: bool = False
    """use an adapter that was made for another checkpoint"""
    verify: bool = False
    """compare every file of the checkpoint with its manifest, the optimizer's state too"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        MergeSettings,
        argv,
        verb="merge-lora",
        about="Adds a low-rank adapter to the matrices it adapts, and writes a checkpoint without "
        "one. The model computes what it did.",
        examples=[
            "openpalm merge-lora runs/chat-lora --out models/chat",
            "openpalm merge-lora runs/tiny --adapter runs/chat-lora --out models/chat",
        ],
        positional=["path"],
    )
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.checkpoint import fingerprint
    from openpalm.checkpoint.manifest import read_manifest
    from openpalm.cli.common import give_adapter, weights_path
    from openpalm.convert import export
    from openpalm.model import lora

    directory = checkpoint.resolve(weights_path(settings.path), training=settings.verify)
    export.check_vacant(settings.out)
    model = checkpoint.load(directory)
    given = give_adapter(model, settings.adapter, directory, force=settings.force)
    if not lora.is_attached(model):
        raise CheckpointError(f"{directory}: has no adapter; name one with --adapter")
    before = fingerprint.compute(model)[1]
    lora.merge(model)
    change = (fingerprint.compute(model)[1] - before).abs().max().item()
    parent = read_manifest(directory)["sha256"]
    # "own": the merged checkpoint computes what its parent does, so its adapters fit here too.
    lineage = {"parent": parent, "merged": True, "adapter": given or "own"}
    text = checkpoint.tokenizer_json(directory)
    export.as_openpalm(model, settings.out, lineage=lineage, tokenizer_json=text)
    print(f"wrote {settings.out}: logits within {change:.1e} of those with the adapter")
