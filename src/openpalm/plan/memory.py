"""Memory of a training step on one GPU (or CPU), by part, at its peak.

The peak is the largest of these moments of a step:

    loss       every block has kept its activations, and the chunk with the logits is in memory
    backward   the gradient of the last block, when nothing is freed yet, or that of the first, when
               all other blocks have their gradients
    embedding  the gradient of the embedding, after those of all blocks
    update     the optimizer's step

Counted are the bytes of tensors.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from openpalm.model.config import ModelConfig
from openpalm.plan.activations import (
    WIDE,
    evenly,
    inside_block,
    kept_per_token,
    norm_item,
    rotary_tables,
    stream_item,
)
from openpalm.plan.layouts import Layout
from openpalm.plan.training import Training

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
PIECE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""model/cross_entropy.py's: logits per chunk, and per softmax."""
MOMENTS = {"adamw": 2, "stable-adamw": 2, "adafactor": 2, "lion": 1}
LISTWISE_COPIES = {"stable-adamw": 3, "adafactor": 3, "lion": 1}
"""Temporary copies of the gradients in a step; on a GPU of all parameters at once."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by part."""

    weights: float
    """float32 master weights"""
    gradients: float
    """float32"""
    moments: float
    """the optimizer's state, float32"""
    activations: float
    """kept for the backward pass, and the gradients inside one block"""
    loss: float
    """logits of a chunk, and gradients of the embedding table that are not yet summed"""
    gathered: float
    """copies of the weights in the arithmetic's dtype, and buffers of communication"""
    update: float
    """temporary tensors of the optimizer's step"""
    moment: str
    """the moment of the peak: loss, backward, embedding or update"""

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class Stage(NamedTuple):
    """The parameters of one GPU's pipeline stage, after tensor parallelism."""

    blocks: float
    """blocks (the stage with one more, if the depth does not divide)"""
    block: float
    """parameters of a block"""
    tables: float
    """parameters of the embedding and of the head, those of the final norm included"""
    first: bool
    last: bool

    @property
    def parameters(self) -> float:
        return self.blocks * self.block + self.tables


def parameters(config: ModelConfig) -> int:
    """Parameters as the tables hold them: the padding rows of the vocabulary included."""
    padding = config.padded_vocab - config.vocab_size
    return config.parameters + padding * (_tables(config) * config.dim + config.bias)


def block_parameters(config: ModelConfig, tensor: int = 1) -> float:
    """Parameters of a block on one rank of a tensor-parallel group."""
    kv = 2 * config.kv_heads * config.head_dim * config.dim
    matrices = sum(rows * columns for rows, columns in config.matrices.values())
    shared = kv if config.kv_heads % tensor else 0  # replicated heads
    vectors = config.dim * (3 if config.bias else 1) + 2 * config.head_dim * config.qk_norm
    biases = config.ff_dim / tensor if config.bias else 0
    return (matrices - shared) / tensor + shared + vectors + biases


def _tables(config: ModelConfig) -> int:
    return 1 if config.tied else 2


def stages(config: ModelConfig, layout: Layout) -> list[Stage]:
    """The stages that may need most: the only one, or the first and the last."""
    block = block_parameters(config, layout.tensor)
    table = config.padded_vocab * config.dim / layout.tensor
    first = table + config.dim * config.embedding_bias
    last = config.dim * (2 if config.bias else 1)
    last += config.padded_vocab / layout.tensor * config.bias
    if layout.pipeline == 1:
        return [Stage(config.depth, block, first + last + table * (not config.tied), True, True)]
    blocks = -(-config.depth // layout.pipeline)
    # Both ends of a pipeline hold a copy of a tied table.
    return [
        Stage(blocks, block, first, True, False),
        Stage(blocks, block, table + last, False, True),
    ]


def step_memory(training: Training, layout: Layout, *, cuda: bool) -> Memory:
    """The peak of the stage that needs most."""
    found = stages(training.config, layout)
    return max(
        (_of_stage(training, layout, stage, cuda=cuda) for stage in found),
        key=lambda memory: memory.total,
    )


def _of_stage(training: Training, layout: Layout, stage: Stage, *, cuda: bool) -> Memory:
    """The parts at the moment when their sum is largest."""
    trained = trained_parameters(training, stage, layout)
    matrices = stage.blocks * block_matrices(training.config, layout.tensor)
    matrices = min(matrices, trained) if training.trains_tables else trained
    state = Memory(
        weights=WIDE * (stage.parameters / layout.shards + _frozen(training, layout)),
        gradients=0.0,
        moments=WIDE * _moments(training, trained, matrices) / layout.shards,
        activations=0.0,
        loss=0.0,
        gathered=0.0,
        update=0.0,
        moment="update",
    )
    gradients = WIDE * trained / layout.shards
    # The first microbatch has no gradients yet, until its backward pass makes them.
    before = gradients if training.accumulation > 1 or layout.pipeline > 1 else 0.0
    return max(
        _at_loss(training, layout, stage, replace(state, gradients=before), cuda=cuda),
        _at_backward(training, layout, stage, replace(state, gradients=before), cuda=cuda),
        _at_first_block(training, layout, stage, replace(state, gradients=gradients), cuda=cuda),
        _at_embedding(training, layout, stage, replace(state, gradients=gradients)),
        _at_update(training, layout, matrices, replace(state, gradients=gradients), cuda=cuda),
        key=lambda memory: memory.total,
    )


def trained_parameters(training: Training, stage: Stage, layout: Layout) -> float:
    config = training.config
    share = stage.blocks / config.depth
    if training.lora is not None:
        # A and B of a target: one is cut with its matrix, the other is whole.
        return share * training.lora.parameters(config)
    if training.trained_layers is not None:
        blocks = min(stage.blocks, training.trained_layers)
        return blocks * stage.block + config.dim * (2 if config.bias else 1)
    return stage.parameters


def block_matrices(config: ModelConfig, tensor: int = 1) -> float:
    """Parameters of a block's matrices, which Muon trains and autocast copies."""
    vectors = config.dim * (3 if config.bias else 1) + 2 * config.head_dim * config.qk_norm
    vectors += config.ff_dim / tensor if config.bias else 0
    return block_parameters(config, tensor) - vectors


def _frozen(training: Training, layout: Layout) -> float:
    """Parameters of an adapter, and of further models, which every process holds whole."""
    more = float(training.frozen_copies * parameters(training.config))
    if training.lora is not None:
        parts = layout.shards * layout.tensor * layout.pipeline
        more += training.lora.parameters(training.config) / parts
    return more


def _moments(training: Training, trained: float, matrices: float) -> float:
    if training.optimizer == "muon":  # one momentum of matrices, AdamW's two of the rest
        return 2 * trained - matrices
    return MOMENTS[training.optimizer] * trained


def _kept(training: Training, layout: Layout, stage: Stage, *, cuda: bool) -> float:
    """Activations at the end of the forward pass, of all microbatches in flight."""
    tokens = training.tokens / layout.context
    per_block = tokens * kept_per_token(training, layout, cuda=cuda)
    blocks = stage.blocks
    if training.trained_layers is not None:  # frozen blocks before the first trained one keep none
        blocks = min(blocks, training.trained_layers)
    # 1F1B: the first stage holds as many microbatches as there are stages, the last one only one.
    waiting = min(layout.pipeline, training.accumulation) if stage.first else 1
    # All blocks share the rotary tables.
    kept = waiting * blocks * per_block + rotary_tables(training) + 8 * tokens
    stream = stream_item(training, layout) * training.config.dim
    # torch's schedules have a buffer for what each microbatch of a step receives from a neighbour,
    # the stream or its gradient, and keep what they sent until the backward pass.
    received = training.accumulation * ((not stage.first) + (not stage.last))
    exchanged = tokens * stream / layout.tensor * (received + waiting * (not stage.last))
    return kept + exchanged + tokens * (stream + 2 * WIDE) * stage.last


def _at_loss(
    training: Training, layout: Layout, stage: Stage, state: Memory, *, cuda: bool
) -> Memory:
    """The last stage computes the loss; the others are at the end of their forward pass."""
    copies, buffers = _copies(training, layout, stage, backward=False)
    kept = _kept(training, layout, stage, cuda=cuda)
    loss = _loss_bytes(training, layout, cuda=cuda) if stage.last else 0.0
    return replace(state, activations=kept, loss=loss, gathered=copies + buffers, moment="loss")


def _loss_bytes(training: Training, layout: Layout, *, cuda: bool) -> float:
    """The working memory of the chunked loss, its gradients included."""
    config, item, kind = training.config, training.item, "cuda" if cuda else "cpu"
    tokens = int(training.tokens / layout.context)
    vocabulary = -(-config.vocab_size // layout.tensor)
    most = training.loss_chunk or max(1, CHUNK_BYTES[kind] // (item * vocabulary))
    rows = evenly(tokens, most)
    piece = evenly(rows, max(1, PIECE_BYTES[kind] // (WIDE * vocabulary)))
    # The probabilities of a piece; in bfloat16 its logits in float32, too.
    softmax = piece * vocabulary * WIDE * (1 if item == WIDE or layout.tensor > 1 else 2)
    # The normalised states, in bfloat16 again (and the scaled ones), and their gradient.
    wide = norm_item(training, layout, cuda=cuda)
    states = wide * config.dim + item * config.dim + item * config.dim * (item != wide)
    states += wide * config.dim * (config.logit_scale != 1)
    # The table's gradient is summed in float32; with FSDP a copy has the gathered table's dtype.
    copied = layout.gathers and item != WIDE
    table = (WIDE + item * copied) * _table_numbers(training, layout)
    cast = item * vocabulary * config.dim if item != WIDE and not layout.gathers else 0
    return tokens * states + rows * vocabulary * item + softmax + table + cast


def _table_numbers(training: Training, layout: Layout) -> float:
    """Numbers in the gradient of the head's table, which the loss makes."""
    config = training.config
    return config.vocab_size * config.dim / layout.tensor * training.trains_tables


def _gradient_item(training: Training, layout: Layout) -> int:
    """Bytes of a number of a gradient before it is reduced or added."""
    return training.item if layout.gathers else WIDE


def _at_backward(
    training: Training, layout: Layout, stage: Stage, state: Memory, *, cuda: bool
) -> Memory:
    """The larger of two moments: the scaling of the table's gradient, and the last block."""
    tokens = training.tokens / layout.context
    kept = _kept(training, layout, stage, cuda=cuda)
    copies, buffers = _copies(training, layout, stage, backward=True)
    item = _gradient_item(training, layout)
    table = item * _table_numbers(training, layout) * stage.last
    inside = inside_block(training, layout, cuda=cuda)
    scaling = table + 2 * tokens * stream_item(training, layout) * training.config.dim * stage.last
    if inside + table * training.config.tied < table + scaling:
        more, loss = 0.0, table + scaling
    else:
        more, loss = inside, table * training.config.tied
    gathered = copies + buffers
    return replace(state, activations=kept + more, loss=loss, gathered=gathered, moment="backward")


def _at_first_block(
    training: Training, layout: Layout, stage: Stage, state: Memory, *, cuda: bool
) -> Memory:
    """The backward pass of the first block, when all others have their gradients."""
    kept = training.tokens / layout.context
    kept *= kept_per_token(training, layout, cuda=cuda)
    inside = inside_block(training, layout, cuda=cuda)
    copies, buffers = _copies(training, layout, stage, backward=True)
    if not layout.gathers and training.recompute == "none":
        copies /= stage.blocks
    activations = kept + inside + rotary_tables(training)
    if training.trains_tables and not training.config.tied:
        table = training.config.padded_vocab * training.config.dim / layout.tensor
        state = replace(state, gradients=state.gradients - WIDE * table / layout.shards)
    return replace(state, activations=activations, gathered=copies + buffers, moment="backward")


def _at_embedding(training: Training, layout: Layout, stage: Stage, state: Memory) -> Memory:
    """The embedding's gradient is dense; with a tied table the head's waits for it."""
    config = training.config
    table = config.padded_vocab * config.dim / layout.tensor * training.trains_tables
    item = _gradient_item(training, layout)
    copies = (1 + config.tied * stage.last) * item * table * stage.first
    if layout.gathers:
        copies += WIDE * table * stage.first  # to be reduced
    elif training.accumulation == 1:
        copies -= WIDE * table * stage.first  # the sum becomes the gradient
    kept = rotary_tables(training)
    return replace(state, activations=kept, loss=copies, moment="embedding")


def _at_update(
    training: Training, layout: Layout, matrices: float, state: Memory, *, cuda: bool
) -> Memory:
    config = training.config
    largest = max(
        config.padded_vocab * config.dim / layout.tensor / layout.shards * training.trains_tables,
        config.dim * config.ff_dim / layout.tensor / layout.shards,
    )
    copies = LISTWISE_COPIES.get(training.optimizer, 0)
    numbers = copies * (state.gradients / WIDE if cuda else largest)
    if training.optimizer == "muon":
        # One whole matrix: the update in float32, its copy in the iteration and two products.
        numbers = 4 * config.dim * config.ff_dim / layout.tensor
    kept = rotary_tables(training)
    return replace(state, activations=kept, update=WIDE * numbers, moment="update")


def _copies(
    training: Training, layout: Layout, stage: Stage, *, backward: bool
) -> tuple[float, float]:
    """Bytes of weights in the arithmetic's dtype, and of buffers that are sent.

    With FSDP: the blocks at work and next (all, without reshard), and the tables, which stay
    gathered; the gradient of the block before, in float32, while it is reduced.
    """
    config, item = training.config, training.item
    if layout.gathers:
        blocks = 2 * stage.block if training.reshard else stage.blocks * stage.block
        gathered = item * (blocks + stage.tables)
        sent = WIDE * stage.block if backward else 0
        return gathered, sent
    if training.dtype == "float32":
        return 0.0, 0.0
    # Autocast's: kept with the graph; if a block is recomputed, until the forward pass ends.
    matrices = item * block_matrices(config, layout.tensor)
    trained = training.trained_layers or stage.blocks
    if training.recompute == "none":
        return matrices * min(stage.blocks, trained), 0.0
    if backward:
        return matrices, 0.0
    return (0.0 if training.lora else matrices * stage.blocks), 0.0
