"""Chunked linear cross entropy (a fused head and loss) with z-loss.

The logits, [positions, vocabulary], are the largest tensor of a training step. Here a chunk of
positions at a time goes through the head, and its gradient is computed at once from its logits.
That needs the same three matrix multiplies as head and backward, and memory for one chunk.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 128 << 20
"""Logits per chunk on a CPU; every chunk costs a pass over the table's gradient."""
_CHUNK_BYTES_CUDA = 1 << 30

_PIECE_BYTES = 4 << 20
"""Logits per softmax on a CPU; a piece stays in the processor's cache."""
_PIECE_BYTES_CUDA = 256 << 20


def linear_cross_entropy(
    states: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    losses: "Losses | None" = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy in nats of logits = states @ table^T + bias, and its z-loss.

    states [positions, dim], table [vocabulary, dim], bias [vocabulary], targets int64 [positions];
    chunk: positions per chunk; None takes `positions_per_chunk`. losses: how losses and gradients
    follow from logits, if the table has only some rows of the vocabulary.

    The z-loss is `z_loss` * sum of log^2 Z, which keeps the normaliser Z near 1 (PaLM, section 5,
    with 1e-4). The gradient of the first result includes the z-loss and its value does not, so
    runs with and without z-loss can be compared. Matrices are multiplied in autocast's dtype;
    everything else is float32.
    """
    dtype = computed_dtype(states)
    if chunk is None:
        chunk = positions_per_chunk(states, len(table))
    losses = losses or _losses
    return _LinearCrossEntropy.apply(states, table, bias, targets, z_loss, chunk, dtype, losses)


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def positions_per_chunk(states: Tensor, vocabulary: int) -> int:
    """As many as fit CHUNK_BYTES."""
    room = CHUNK_BYTES if states.device.type == "cpu" else _CHUNK_BYTES_CUDA
    return max(1, room // (computed_dtype(states).itemsize * vocabulary))


Losses = Callable[[Tensor, Tensor, float, torch.dtype, bool], Iterator[tuple[Tensor, Tensor]]]
"""(logits, targets, z_loss, wide, wanted) -> terms of summed nll and z-loss, computed in the dtype
`wide`; if `wanted`, overwrites `logits` [positions, vocabulary] by the gradient of the loss."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        table: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        z_loss: float,
        chunk: int,
        dtype: torch.dtype,
        losses: Losses,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        needed = ctx.needs_input_grad
        with torch.autocast(states.device.type, enabled=False):
            rows, matrix = states.to(dtype), table.to(dtype)
            grads = _Gradients(needed, rows, matrix, bias, wide)
            nll, z = rows.new_zeros((), dtype=wide), rows.new_zeros((), dtype=wide)
            for positions in _evenly(len(rows), chunk):
                logits = rows[positions] @ matrix.T
                if bias is not None:
                    logits += bias
                # In place: no second tensor of the size of the logits is needed.
                found = losses(logits, targets[positions], z_loss, wide, any(needed))
                for piece_nll, piece_z in found:
                    nll, z = nll + piece_nll, z + piece_z
                grads.add(positions, logits)
        ctx.save_for_backward(*grads.in_dtype_of(states, table, bias))
        ctx.mark_non_differentiable(z)
        return nll, z

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * grad_outputs[0] for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _evenly(length: int, most: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most `most`."""
    size = max(1, math.ceil(length / max(1, math.ceil(length / most))))
    for start in range(0, length, size):
        yield slice(start, start + size)


def pieces(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x that fit the processor's cache in float32."""
    room = _PIECE_BYTES if x.device.type == "cpu" else _PIECE_BYTES_CUDA
    return _evenly(len(x), max(1, room // (4 * x.shape[1])))


def _losses(
    logits: Tensor, targets: Tensor, z_loss: float, wide: torch.dtype, wanted: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The Losses of a whole vocabulary."""
    for piece in pieces(logits):
        yield _replace_by_gradient(logits[piece], targets[piece, None], z_loss, wide, wanted)


def _replace_by_gradient(
    logits: Tensor, index: Tensor, z_loss: float, wide: torch.dtype, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Summed nll and z-loss; if `wanted`, overwrites `logits` [rows, vocabulary] by the gradient.

    index: int64 [rows, 1], the targets. The gradient of log Z - logit_target + z log^2 Z is
    softmax * (1 + 2 z log Z), minus 1 at the target.
    """
    exact = logits.to(wide)
    share = exact.softmax(dim=-1)
    # The largest probability is exp(max logit - log Z), so no second pass over exp is needed.
    log_z = exact.amax(-1, keepdim=True) - share.amax(-1, keepdim=True).log()
    nll = (log_z - exact.gather(1, index)).sum()
    if wanted:
        if z_loss:
            share *= 1 + 2 * z_loss * log_z
        share.scatter_add_(1, index, share.new_full((), -1.0).expand(index.shape))
        logits.copy_(share)
    return nll, z_loss * log_z.square().sum()


class _Gradients:
    """Gradients of states, table and bias, summed over the chunks; None where not needed."""

    def __init__(
        self, needed: tuple[bool, ...], rows: Tensor, matrix: Tensor, bias: Tensor | None, wide: Any
    ):
        self._rows, self._matrix = rows, matrix
        self._states = torch.empty_like(rows) if needed[0] else None
        self._table = torch.zeros_like(matrix, dtype=wide) if needed[1] else None
        self._bias = torch.zeros_like(bias) if bias is not None and needed[2] else None

    def add(self, positions: slice, grad: Tensor) -> None:
        """Adds a chunk; grad: gradient of its logits, [positions, vocabulary]."""
        if self._states is not None:
            torch.mm(grad, self._matrix, out=self._states[positions])
        if self._table is not None and grad.dtype == self._table.dtype:
            self._table.addmm_(grad.T, self._rows[positions])
        elif self._table is not None:
            # A bfloat16 product is added to the float32 sum while it is in the cache.
            for piece in pieces(self._table):
                self._table[piece] += grad[:, piece].T @ self._rows[positions]
        if self._bias is not None:
            self._bias += grad.sum(dim=0)

    def in_dtype_of(self, *inputs: Tensor | None) -> list[Tensor | None]:
        found = (self._states, self._table, self._bias)
        return [
            None if grad is None or given is None else grad.to(given.dtype)
            for grad, given in zip(found, inputs, strict=True)
        ]
