"""Time of a training step on one GPU, by part.

Each part is an amount divided by a rate of the device. Arithmetic: matrix multiplications,
attention, elementwise passes over activations, the optimizer. Communication, by axis:

    shard       2 gathers of the weights and 1 reduction of the gradients a microbatch; they run
                beside the arithmetic, so only what takes longer than it counts
    replicate   one sum of the gradients a step
    tensor      2 gathers and 2 reductions of the states a block, forward and backward
    context     keys and values, forward and backward
    pipeline    the bubble, (p - 1) / (v m + p - 1) of the step
"""

import math
from dataclasses import dataclass, fields

from openpalm.model.config import ModelConfig
from openpalm.plan.devices import Device
from openpalm.plan.layouts import Layout
from openpalm.plan.memory import MOMENTS, Stage, block_matrices, stages
from openpalm.plan.training import Training

LINK_SHARE = 0.8
"""Share of a link's published rate that collectives reach; an assumption."""
FLOAT32 = 4
QUINTIC_STEPS = 5
"""Iterations of Muon."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part."""

    matmul: float
    attention: float
    elementwise: float
    """norms, activations, rotary positions, casts, the softmax of the loss"""
    optimizer: float
    shard: float
    """FSDP: gathering weights and reducing gradients, where not hidden behind arithmetic"""
    replicate: float
    tensor: float
    context: float
    pipeline: float
    """waiting in the bubble"""

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def step_time(training: Training, layout: Layout, device: Device, *, chunks: int = 1) -> StepTime:
    """The time of the stage that needs longest; `chunks` are a rank's stages (interleaved)."""
    stage = max(
        stages(training.config, layout),
        key=lambda stage: sum(_arithmetic(training, layout, stage, device)),
    )
    m, p = training.accumulation, layout.pipeline
    matmul, attention, elementwise = _arithmetic(training, layout, stage, device)
    arithmetic = matmul + attention + elementwise
    shard = max(0.0, _shard(training, layout, stage, device) - arithmetic)
    tensor = _tensor(training, layout, stage, device)
    context = _context(training, layout, stage, device)
    once = arithmetic + shard + tensor + context
    return StepTime(
        matmul=m * matmul,
        attention=m * attention,
        elementwise=m * elementwise,
        optimizer=_optimizer(training, layout, stage, device),
        shard=m * shard + _first_gather(training, layout, stage, device),
        replicate=_replicate(layout, stage, device),
        tensor=m * tensor,
        context=m * context,
        pipeline=once * (p - 1) / chunks + _sends(training, layout, device, chunks),
    )


def mfu(
    config: ModelConfig, context: int, tokens_per_s: float, gpus: int, peak_flops: float
) -> float:
    """Model FLOPs utilisation (PaLM, appendix B), of all GPUs."""
    return tokens_per_s * config.flops_per_token(context) / (gpus * peak_flops)


def _arithmetic(
    training: Training, layout: Layout, stage: Stage, device: Device
) -> tuple[float, float, float]:
    """Seconds of a microbatch: matrix multiplications, attention, elementwise passes."""
    tokens = training.tokens / layout.context
    passes, attention_passes = _passes(training)
    # Attention: 4 FLOPs a key forward, 10 backward (the weights are computed again); half of the
    # keys are in the future, and every kernel skips them.
    config, t = training.config, layout.tensor
    seen = training.context / (2 if config.causal else 1)
    inner = config.heads * config.head_dim / t
    attention = tokens * stage.blocks * seen * inner * (4 * attention_passes + 10)
    matmul = 2 * tokens * stage.blocks * block_matrices(config, t) * passes
    head = 2 * tokens * config.vocab_size * config.dim / t * stage.last
    matmul += head * (3 if training.trains_tables else 2)
    rate = device.flops(training.dtype)
    moved = tokens * (_moved_per_token(training, t) * stage.blocks + _moved_by_loss(training, t))
    return (
        matmul / (rate * device.matmul),
        attention / (rate * device.attention),
        moved / device.bandwidth,
    )


def _passes(training: Training) -> tuple[float, int]:
    """Passes over the blocks' matrices (forward and twice backward: 3), and forward attentions."""
    again = training.recompute in ("full", "offload")
    passes = 3.0 + again
    if training.lora is not None:  # no gradient of the frozen matrices
        passes -= 1
    return passes, 1 + (training.recompute != "none")


def _moved_per_token(training: Training, tensor: int) -> float:
    """Bytes that the elementwise operations of a block read and write per token."""
    config, item = training.config, training.item
    casts = 0 if item == FLOAT32 else 4 * (FLOAT32 + item)
    states = config.dim / tensor * (2 * FLOAT32 + casts + 4 * FLOAT32 + 3 * item)
    heads = (config.heads + 2 * config.kv_heads) * config.head_dim / tensor
    rotary = heads * (2 * item + 4 * FLOAT32)
    # silu reads and writes one, the product reads two and writes one; gelu reads and writes one.
    units = config.ff_dim / tensor * item * (5 if config.feedforward == "swiglu" else 2)
    forward = states + rotary + units
    return forward * (3 + (training.recompute != "none"))  # the backward pass moves twice as much


def _moved_by_loss(training: Training, tensor: int) -> float:
    """Bytes per token that the softmax of the chunked loss reads and writes."""
    passes = 7 * FLOAT32 + training.item * (0 if training.item == FLOAT32 else 2)
    return passes * training.config.vocab_size / tensor


def _optimizer(training: Training, layout: Layout, stage: Stage, device: Device) -> float:
    """Reads weights, gradients and moments, writes all but the gradients; clips before."""
    moments = MOMENTS.get(training.optimizer, 2)
    trained = stage.parameters if training.lora is None else stage.parameters * 0.01
    moved = FLOAT32 * (1 + 3 + 2 * moments) * trained / layout.shards
    seconds = moved / device.bandwidth
    if training.optimizer == "muon":
        ranks = layout.averaged  # matrices are dealt to ranks
        matrices = training.config.matrices.values()
        iteration = sum(_quintic_flops(*shape) for shape in matrices) * stage.blocks
        rate = device.flops(training.dtype) * device.matmul
        seconds += iteration / layout.tensor / ranks / rate
    return seconds


def _quintic_flops(rows: int, columns: int) -> float:
    """FLOPs of Muon's iteration on a matrix: two products with it, one of its square."""
    small, large = sorted((rows, columns))
    return QUINTIC_STEPS * (4 * small**2 * large + 2 * small**3)


def seconds_to_send(
    bytes_: float, group: tuple[int, int], device: Device, *, both: bool = False
) -> float:
    """Seconds of an all-gather (or reduce-scatter; `both`: all-reduce) of `bytes_` in a group.

    group: number of GPUs, and the distance in ranks between neighbours. Within a node each GPU
    receives (n - 1)/n of the bytes; between nodes a node does, by the links of all its GPUs in
    the group.
    """
    size, stride = group
    if size == 1:
        return 0.0
    here = max(1, min(size, device.per_node // stride))
    nodes = math.ceil(size / here)
    inside = bytes_ * (size - 1) / size / device.intra if here > 1 else 0.0
    outside = bytes_ * (nodes - 1) / nodes / (here * device.inter)
    return (2 if both else 1) * max(inside, outside) / LINK_SHARE


def _group(layout: Layout, axis: str) -> tuple[int, int]:
    """The group of an axis; FSDP's is of shard and context together."""
    if axis == "shard":
        return layout.shards, layout.stride("context")
    return layout.by_axis[axis], layout.stride(axis)


def _shard(training: Training, layout: Layout, stage: Stage, device: Device) -> float:
    """Seconds of a microbatch: weights gathered twice, gradients reduced in float32."""
    bytes_ = stage.parameters * (2 * training.item + FLOAT32)
    return seconds_to_send(bytes_, _group(layout, "shard"), device)


def _first_gather(training: Training, layout: Layout, stage: Stage, device: Device) -> float:
    """The first gather and the last reduction of a step have no arithmetic beside them."""
    bytes_ = (stage.block + stage.tables) * (training.item + FLOAT32)
    return seconds_to_send(bytes_, _group(layout, "shard"), device)


def _replicate(layout: Layout, stage: Stage, device: Device) -> float:
    """Gradients are summed over replicas after the last microbatch."""
    bytes_ = FLOAT32 * stage.parameters / layout.shards
    return seconds_to_send(bytes_, _group(layout, "replicate"), device, both=True)


def _tensor(training: Training, layout: Layout, stage: Stage, device: Device) -> float:
    tokens = training.tokens / layout.context
    # 2 gathers and 2 reductions; a block that is recomputed gathers and reduces once more.
    times = 4 + 2 * (training.recompute in ("full", "offload"))
    bytes_ = times * tokens * training.config.dim * training.item * stage.blocks
    return seconds_to_send(bytes_, _group(layout, "tensor"), device)


def _context(training: Training, layout: Layout, stage: Stage, device: Device) -> float:
    config = training.config
    keys = 2 * config.kv_heads * config.head_dim * training.item
    times = 2 + (training.recompute != "none")
    bytes_ = times * training.tokens * keys * stage.blocks
    return seconds_to_send(bytes_, _group(layout, "context"), device)


def _sends(training: Training, layout: Layout, device: Device, chunks: int) -> float:
    """States sent between stages while the pipeline fills and drains; else beside arithmetic."""
    if layout.pipeline == 1:
        return 0.0
    near = layout.stride("pipeline") < device.per_node
    bytes_ = training.tokens / layout.context * training.config.dim * FLOAT32 / layout.tensor
    link = device.intra if near else device.inter
    return 2 * (layout.pipeline - 1) * chunks * bytes_ / (link * LINK_SHARE)
