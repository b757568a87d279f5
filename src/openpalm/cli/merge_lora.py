"""`openpalm merge-lora`: merges a LoRA adapter into the weights of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpalm.base.settings import parse
from openpalm.errors import CheckpointError


@dataclass(frozen=True)
class MergeSettings:
    path: str
    """run or checkpoint with an adapter, or the base model of --adapter"""
    out: Path
    """output checkpoint directory; must be new or empty"""
    adapter: Path | None = None
    """LoRA adapter: a directory in PEFT's layout, a run or a checkpoint"""
    force: bool = False
    """use an adapter that was made for another checkpoint"""
    verify: bool = False
    """check every file of the checkpoint against its manifest, the optimizer state included"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        MergeSettings,
        argv,
        verb="merge-lora",
        about="Adds a LoRA adapter to the weight matrices and writes a checkpoint that computes "
        "the same function without an adapter.",
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
    export.check_output_directory(settings.out)
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
    export.save_as_openpalm(model, settings.out, lineage=lineage, tokenizer_json=text)
    print(f"wrote {settings.out}: logits within {change:.1e} of those with the adapter")
