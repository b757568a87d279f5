"""Loads a checkpoint for inference, quantizing block by block.

At no time are the checkpoint's own weights in memory together: int8 of a model takes the memory of
int8, and of one block in the checkpoint's type.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint import fingerprint
from openpalm.checkpoint.manifest import WEIGHTS, is_listed
from openpalm.checkpoint.tensors import opened
from openpalm.generate.quantize import WeightFormat, check_format, quantized_block, quantized_head
from openpalm.model.transformer import Transformer


@torch.no_grad()
def load_quantized(
    directory: Path,
    weights: WeightFormat,
    device: str = "cpu",
    *,
    allow: Callable[[str], None] | None = None,
) -> Transformer:
    """`quantize` of the language model of a checkpoint without an adapter.

    `directory` is what `resolve` returned. float32 is checked against the stored fingerprint.
    Raises CheckpointError, also for weights that are not finite unless `allow` is given, which
    then gets the message; SettingsError where the device has no kernel for `weights`.
    """
    check_format(weights, device)
    config = checkpoint.load_configs(directory).model
    dtype = torch.float32 if weights == "float32" else torch.bfloat16

    def read(name: str) -> Tensor:
        # Opened for each tensor: pages of the file that stay mapped would count as memory.
        with opened(directory / WEIGHTS) as file:
            return file.finite(name, allow).to(device=device, dtype=dtype, copy=True)

    def fill(module: nn.Module, prefix: str) -> None:
        own = {name: read(prefix + name) for name, _ in module.named_parameters()}
        module.load_state_dict(own, assign=True)

    with torch.device("meta"):
        model = Transformer(config).requires_grad_(False)
    for layer, block in enumerate(model.blocks):
        fill(block, f"blocks.{layer}.")
        model.blocks[layer] = quantized_block(block, weights)
    fill(model.norm, "norm.")
    for name, _ in list(model.named_parameters(recurse=False)):
        if name != "unembedding":
            setattr(model, name, nn.Parameter(read(name), requires_grad=False))
    # An unembedding of its own stays on "meta": the quantized head replaces it.
    table = model.embedding if config.tied else read("unembedding")
    model.project_head = quantized_head(table, weights)
    if weights == "float32" and is_listed(directory, fingerprint.FILE):
        fingerprint.check(model, directory / fingerprint.FILE)
    return model.eval()
