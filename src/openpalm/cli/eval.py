"""`openpalm eval`: validation loss and bits per byte of a checkpoint on prepared data."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openpalm.base.settings import check_field, parse
from openpalm.cli.model_options import LoadOptions


@dataclass(frozen=True)
class EvalSettings(LoadOptions):
    """The checkpoint, the data and the windows."""

    path: str
    """run, checkpoint or hub name"""
    data: Path
    """folder that `openpalm data prepare` wrote"""
    split: Literal["val", "train"] = "val"
    """split of the data"""
    sequence_length: int | None = None
    """tokens in a window; default: the model's context"""
    document_mask: bool = False
    """attention only within a document; for models trained with --document-mask"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of weights and arithmetic"""
    force: bool = False
    """accept data that was prepared with another tokenizer than the model's"""
    json: bool = False
    """print one JSON object"""

    def __post_init__(self) -> None:
        check_field(self, "sequence_length", lambda v: v >= 1, "1 or more")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        EvalSettings,
        argv,
        verb="eval",
        about="Measures the loss over a whole split, in windows that do not overlap.",
        examples=[
            "openpalm eval runs/tiny --data data/docs",
            "openpalm eval runs/tiny --data data/docs --quantize int4 --json",
        ],
        positional=["path"],
    )
    import torch
    from rich.console import Console

    from openpalm.base.device import pick_device
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import weights_path
    from openpalm.data.dataset.shards import open_dataset
    from openpalm.evaluate.perplexity import dataset_loss
    from openpalm.generate.quantize import quantize
    from openpalm.train.initial_weights import check_reads

    dataset = open_dataset(settings.data)
    directory = checkpoint.resolve(weights_path(settings.path), training=settings.verify)
    checkpoint.check_generates_text(directory)
    remedy = "prepare the data with the model's tokenizer"
    if forced := check_reads(directory, dataset.tokenizer(), remedy, force=settings.force):
        print(f"eval: warning: {forced}", file=sys.stderr)
    model = checkpoint.load(directory, str(pick_device(settings.device)))
    weights = settings.quantize or settings.dtype
    if weights != "float32":
        model = quantize(model, weights)
    length = settings.sequence_length or model.config.context
    with Console(stderr=True).status(f"reading the {settings.split} split"):
        result = dataset_loss(
            model,
            dataset,
            settings.split,
            length,
            torch.float32,
            document_mask=settings.document_mask,
        )
    row = {
        "split": settings.split,
        "weights": weights,
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "sequence_length": length,
        "document_mask": settings.document_mask,
    }
    if settings.json:
        print(json.dumps(row))
        return
    print(
        f"{settings.split}: {result.nats_per_token:.4f} nats per token, "
        f"{result.bits_per_byte:.4f} bits per byte "
        f"({result.tokens:,} tokens in windows of {length})"
    )
