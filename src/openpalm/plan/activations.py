"""Bytes that a block keeps for the backward pass, per token, as the code of model/ keeps them.

A list of the tensors that autograd saves. A change of model/block.py or model/attention.py changes
these sums; tests/plan/test_memory.py measures them.
"""

import math

from openpalm.plan.layouts import Layout
from openpalm.plan.training import Training

WIDE = 4
"""Bytes of float32: the residual stream, norms and statistics."""
BLOCK, KEPT = 256, 1024
"""model/attention.py's: the CPU's bfloat16 kernel keeps the weights of sequences up to KEPT."""


def kept_per_token(training: Training, layout: Layout, *, cuda: bool) -> float:
    """Bytes that one block keeps per token from the forward to the backward pass."""
    if training.recompute == "none":
        return whole_block(training, layout, cuda=cuda)
    # offload moves the block's input to the CPU's memory; on a CPU that is a copy.
    inputs = stream_item(training, layout) * training.config.dim / layout.tensor
    if training.recompute == "offload":
        return 0 if cuda else inputs
    return inputs + (_products(training, layout.tensor) if training.recompute == "selective" else 0)


def stream_item(training: Training, layout: Layout) -> int:
    """Bytes of a number of the residual stream.

    FSDP gathers the embedding in the arithmetic's dtype, and so is what the blocks add to it.
    """
    return training.item if layout.gathers else WIDE


def norm_item(training: Training, layout: Layout, *, cuda: bool) -> int:
    """Bytes of a number of a norm's input and output: autocast casts both to float32 on a GPU."""
    return WIDE if cuda else stream_item(training, layout)


def whole_block(training: Training, layout: Layout, *, cuda: bool) -> float:
    """Bytes of everything that a block's backward pass needs, per token."""
    config, item, tensor = training.config, training.item, layout.tensor
    statistics = 2 * WIDE
    residual = (norm_item(training, layout, cuda=cuda) * config.dim + statistics) / tensor
    mask = config.dim * (1 if cuda else item) / tensor if config.dropout else 0
    return (
        residual
        + mask
        + _projection_inputs(training, layout, cuda=cuda)
        + _attention(training, layout, cuda=cuda)
        + _feedforward(training, tensor)
        + _adapter(training)
    )


def _projection_inputs(training: Training, layout: Layout, *, cuda: bool) -> float:
    """The normalised states: autocast makes a bfloat16 copy for each matrix that reads them."""
    config, item, lora = training.config, training.item, training.lora
    readers = 4 if config.feedforward == "swiglu" else 3
    if lora is not None:  # frozen matrices keep no input, their adapters do
        readers = len({"q", "k", "v", "gate", "up"} & {*lora.targets})
    if training.dtype == "float32":
        return WIDE * config.dim * (readers > 0)
    # A rank of a tensor-parallel group sends them in bfloat16.
    once = layout.tensor > 1 or norm_item(training, layout, cuda=cuda) == item
    return item * config.dim * (min(readers, 1) if once else readers)


def _attention(training: Training, layout: Layout, *, cuda: bool) -> float:
    config, item, tensor = training.config, training.item, layout.tensor
    queries = config.heads * config.head_dim / tensor
    keys = _kv_heads(config.kv_heads, tensor) * config.head_dim
    # In float32; the CPU's kernel also keeps the result before it is scaled.
    normed = WIDE * (queries + keys) * (1 if cuda else 2) if config.qk_norm else 0
    outputs = item * 2 * queries  # rotated queries, and the result
    if layout.context > 1:
        # The keys and values of whole rows; the results of both chunks and the joined one.
        kept = item * (2 * keys * layout.context + queries)
        weights = 0 if cuda else _chunk_weights(training, layout) / tensor
        return normed + outputs + kept + weights + WIDE * config.heads / tensor
    if not cuda and training.dtype == "bfloat16":
        return normed + outputs + item * (2 * keys + _cpu_weights(training) / tensor)
    # The values are a view of the product of the keys and values, which is kept as a whole.
    kept = item * 3 * keys
    if cuda and 1 < config.kv_heads < config.heads:
        kept += item * 2 * queries  # keys and values are copied for each query head
    return normed + outputs + kept + WIDE * config.heads / tensor


def _kv_heads(kv_heads: int, tensor: int) -> int:
    """Key/value heads of a rank: replicated unless they divide."""
    return kv_heads if kv_heads % tensor else kv_heads // tensor


def _chunk_weights(training: Training, layout: Layout) -> float:
    """Bytes of attention weights per token that the CPU's kernel keeps, of a rank's two chunks.

    The two have 2 x context + 1 chunks of keys between them.
    """
    chunk = training.context / (2 * layout.context)
    if chunk * training.context > KEPT**2:
        return 0
    return training.item * training.config.heads * chunk * (2 * layout.context + 1) / 2


def _cpu_weights(training: Training) -> float:
    """Attention weights per token that the CPU's bfloat16 kernel keeps, over all heads."""
    length = training.context
    if length > KEPT:
        return 0
    ends = [min(start + BLOCK, length) for start in range(0, length, BLOCK)]
    starts = range(0, length, BLOCK)
    scores = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
    return training.config.heads * scores / length


def _feedforward(training: Training, tensor: int) -> float:
    config = training.config
    # gate, silu(gate), up and their product; or the input and output of gelu.
    numbers = 4 if config.feedforward == "swiglu" else 2
    return numbers * training.item * config.ff_dim / tensor


def _adapter(training: Training) -> float:
    """What LoRA adds: the scaled product with A, of each target."""
    if training.lora is None:
        return 0
    return training.item * training.lora.rank * len(training.lora.targets)


def _products(training: Training, tensor: int) -> float:
    """Outputs of the matrices, which `selective` keeps."""
    rows = {name: shape[0] for name, shape in training.config.matrices.items()}
    keys = _kv_heads(training.config.kv_heads, tensor) * training.config.head_dim
    cut = sum(rows[name] for name in rows if name not in ("k", "v", "out", "down")) / tensor
    whole = 2 * keys + rows["out"] + rows["down"]
    adapter = 0
    if training.lora is not None:
        adapter = sum(training.lora.rank + rows[name] for name in training.lora.targets)
    return training.item * (cut + whole + adapter)


def inside_block(training: Training, layout: Layout, *, cuda: bool) -> float:
    """Bytes that the backward pass of one block needs beside what the block kept."""
    config, item, tensor = training.config, training.item, layout.tensor
    tokens = training.tokens / layout.context
    again = 0.0
    if training.recompute != "none":
        again = whole_block(training, layout, cuda=cuda)
        again -= kept_per_token(training, layout, cuda=cuda)
    residual = stream_item(training, layout) * config.dim / tensor
    units = item * config.ff_dim / tensor
    moments = [*_feedforward_backward(training, tokens, units, tensor)]
    if not cuda and training.dtype == "bfloat16":
        moments.append(_cpu_attention_backward(training, tokens, units, tensor))
    return tokens * (again + residual) + max(moments)


def _feedforward_backward(
    training: Training, tokens: float, units: float, tensor: int
) -> tuple[float, float]:
    """Bytes at two moments of the feed-forward layer's backward pass.

    First there are the gradients of the hidden units and of `down`; with bfloat16 the latter is in
    memory in both dtypes until it is added. Then the hidden units are freed, and the gradients of
    their factors are in memory.
    """
    config, item = training.config, training.item
    matrix = config.dim * config.ff_dim / tensor * (item if item == WIDE else item + WIDE)
    matrix *= training.lora is None
    factors = 2 if config.feedforward == "swiglu" else 1
    return tokens * units + matrix, tokens * factors * units


def _cpu_attention_backward(training: Training, tokens: float, units: float, tensor: int) -> float:
    """The CPU's bfloat16 kernel: a block of weights, their gradients and those of the scores.

    At that moment the hidden units are freed, and their gradients are still in memory.
    """
    config, item, length = training.config, training.item, training.context
    freed = (2 if config.feedforward == "swiglu" else 1) * units
    heads = config.heads / tensor
    queries, keys = heads * config.head_dim, _kv_heads(config.kv_heads, tensor) * config.head_dim
    grads = item * 2 * queries + WIDE * 2 * keys
    products = 2 if length <= KEPT else 5  # longer sequences compute their weights again
    block = training.rows * heads * min(BLOCK, length) * length * item
    return tokens * (grads - freed) + products * block


def rotary_tables(training: Training) -> int:
    """Bytes of the cos and sin tables: those that grow with the longest input, and a look-up."""
    longest = max(256, 1 << (training.context - 1).bit_length())
    return 4 * WIDE * training.config.rotated * (longest + training.context)


def evenly(length: int, most: int) -> int:
    """The largest part, if a length is cut into equal parts of at most `most`."""
    return math.ceil(length / max(1, math.ceil(length / most)))
