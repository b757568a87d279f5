"""A model's matrices made ready for decoding: fused, and stored as its kernels read fastest.

Decoding one token reads every weight once and does little else, so its speed is that of memory:
fewer bytes a weight, laid out as they are read. Packed modules take the place of project_in,
project_out and the head; the model stays the model.
"""

import copy
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.base.device import multiplies_bfloat16, multiplies_int8
from openpalm.errors import SettingsError
from openpalm.model.block import Block, ProjectHead, ProjectIn, ProjectOut
from openpalm.model.lora import merged, sharing
from openpalm.model.transformer import Transformer

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
INT4_GROUP = 32
"""Neighbouring weights that share a scale and a zero point."""
FEW_ROWS = 8
"""Rows that oneDNN's float32 layout is chosen for: fast for one row and for hundreds."""
WIDENED_NUMBERS = 1 << 18
"""Weights that are widened to float32 at a time: a megabyte."""


class Matrix(Protocol):
    """A packed matrix [rows, columns]: x [..., columns] -> [..., rows]."""

    def __call__(self, x: Tensor) -> Tensor: ...


def quantize(model: Transformer, weights: WeightFormat) -> Transformer:
    """The model with its matrices packed, an adapter's part folded in; the rest is shared.

    int8 keeps a scale a row (and where the processor multiplies 8-bit numbers, rounds each token's
    activations too), int4 a scale and zero point for each 32 weights of a row; both compute in
    bfloat16. Raises SettingsError where this device has no kernel for them.
    """
    table = model.embedding
    if weights in ("int8", "int4") and table.device.type != "cpu":
        raise SettingsError(f"--quantize {weights}: needs a CPU so far; leave it out on a GPU")
    model = merged(model)
    if weights != "float32":
        model = _as(model, torch.bfloat16)
    packed = sharing(model, type(model))
    packed.blocks = nn.ModuleList(_packed_block(block, weights) for block in model.blocks)
    unembedding = model.embedding if model.unembedding is None else model.unembedding
    # In bfloat16 logits are 1/16 apart: too coarse, where they can be had in float32.
    packed.project_head = _PackedHead(_matrix(unembedding, weights, torch.float32))
    return packed.eval()


class _PackedIn(nn.Module):
    def __init__(self, plain: ProjectIn, weights: WeightFormat):
        super().__init__()
        self.rows = plain.rows
        self.matrix = _matrix(torch.cat([getattr(plain, name) for name in plain.rows]), weights)
        self.up_bias = plain.up_bias

    def forward(self, n: Tensor, names: Sequence[str] = ()) -> tuple[Tensor, ...]:
        *parts, up = self.matrix(n).split(list(self.rows.values()), dim=-1)
        parts.append(up if self.up_bias is None else up + self.up_bias)
        return tuple(
            x for name, x in zip(self.rows, parts, strict=True) if name in (names or self.rows)
        )


class _PackedOut(nn.Module):
    """Both outputs as one matrix over [attended, hidden]."""

    def __init__(self, plain: ProjectOut, weights: WeightFormat):
        super().__init__()
        self.matrix = _matrix(torch.cat([plain.out, plain.down], dim=1), weights)
        self.down_bias = plain.down_bias

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        update = self.matrix(torch.cat([attended, hidden], dim=-1))
        return update if self.down_bias is None else update + self.down_bias


class _PackedHead(ProjectHead):
    def __init__(self, matrix: Matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        logits = self.matrix(states)
        return logits if bias is None else logits + bias

    def cross_entropy(
        self,
        states: Tensor,
        table: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        z_loss: float,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Without a gradient: there is nothing to train in a packed matrix."""
        logits = self.matrix(states)[:, : len(table)].float()
        logits = logits if bias is None else logits + bias
        z = z_loss * logits.logsumexp(-1).square().sum()
        return F.cross_entropy(logits, targets, reduction="sum"), z


class _Dense:
    def __init__(self, weight: Tensor):
        self.weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _OneDnn:
    """float32 or bfloat16 on a CPU, in the blocked layout that oneDNN's kernels want.

    In float32 a row's products do not depend on how many rows there are. F.linear's do: it
    changes kernels with the number of rows.
    """

    def __init__(self, weight: Tensor):
        rows = 1 if weight.dtype == torch.bfloat16 else FEW_ROWS
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.pairs = False
        if weight.dtype == torch.float32:
            generator = torch.Generator().manual_seed(0)
            one = torch.randn(1, weight.shape[1], generator=generator)
            self.pairs = not torch.equal(self._multiply(one), self._multiply(one.tile(2, 1))[:1])

    def __call__(self, x: Tensor) -> Tensor:
        if self.pairs and x.numel() == x.shape[-1]:
            twice = x.reshape(1, -1).tile(2, 1)
            return self._multiply(twice)[:1].view(*x.shape[:-1], -1)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class _Widened:
    """bfloat16 weights on a CPU that only emulates bfloat16: multiplied in float32, by blocks.

    A block of the weights is widened into the processor's cache and used there.
    """

    def __init__(self, weight: Tensor, result: torch.dtype):
        self.weight, self.result = weight.contiguous(), result
        self.rows = max(1, WIDENED_NUMBERS // weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        parts = [F.linear(wide, block.float()) for block in self.weight.split(self.rows)]
        return torch.cat(parts, dim=-1).to(self.result)


class _Int8:
    """Weights in 8 bits with a scale a row; activations stay bfloat16."""

    def __init__(self, weight: Tensor):
        codes, scales = _rounded_rows(weight)
        self.weight, self.scales = codes, scales.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)
        return out.unflatten(0, x.shape[:-1])


class _Int8Dot:
    """Weights as _Int8, and each token's activations in 8 bits with a scale of their own.

    For processors that multiply 8-bit numbers directly, where _Int8 is bound by
    arithmetic: 1.7 times the tokens/s in a batch of 16 (benchmarks/RESULTS.md).
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        codes, self.scales = _rounded_rows(weight)
        self.dtype = dtype
        self.zeros = torch.zeros(len(codes), dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(codes, [1, codes.shape[1]])
        # The kernel's activations are unsigned: 128 is zero, the half rounds to the nearest.
        self.middle = torch.tensor(128.5)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
        largest.clamp_min_(1e-12)
        codes = torch.addcmul(self.middle, rows, 127 / largest).to(torch.uint8)
        out = torch.ops.onednn.qlinear_pointwise(
            *(codes, 1 / 127, 128),
            *(self.weight, self.scales, self.zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return out.mul_(largest).to(self.dtype).unflatten(0, x.shape[:-1])


class _Int4:
    """w = (q - 8) scale + zero, q in 0..15, for each group of a row."""

    def __init__(self, weight: Tensor):
        groups = weight.float().unflatten(1, (-1, INT4_GROUP))
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        scale = ((high - low) / 15).clamp_min(1e-12)
        zero = low + 8 * scale
        q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
        codes = q.to(torch.int32).flatten(1)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales_zeros = torch.stack([scale, zero], dim=-1).transpose(0, 1)
        self.scales_zeros = self.scales_zeros.contiguous().to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, INT4_GROUP, self.scales_zeros
        )
        return out.unflatten(0, x.shape[:-1])


def _matrix(weight: Tensor, weights: WeightFormat, result: torch.dtype = torch.bfloat16) -> Matrix:
    """Packed; its products in `result` where the kernel leaves a choice."""
    weight = weight.detach()
    if weight.device.type != "cpu":
        return _Dense(weight)
    if weights == "bfloat16" and not multiplies_bfloat16():
        return _Widened(weight, result)
    if weights in ("float32", "bfloat16"):
        return _blocked(weight)
    if weights == "int8":
        return _Int8Dot(weight, result) if multiplies_int8() else _Int8(weight)
    if weight.shape[1] % INT4_GROUP or weight.shape[0] % 16:
        raise SettingsError(
            f"--quantize int4: needs matrices in multiples of 16 x {INT4_GROUP}, not "
            f"{weight.shape[0]} x {weight.shape[1]}; use int8"
        )
    return _Int4(weight)


def _blocked(weight: Tensor) -> Matrix:
    """In oneDNN's layout where torch has oneDNN and it takes the matrix on this processor."""
    if not torch.backends.mkldnn.is_available():
        return _Dense(weight)
    try:
        return _OneDnn(weight)
    except RuntimeError:
        return _Dense(weight)


def _rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [rows, columns] and the float32 scale of each row."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def _packed_block(block: nn.Module, weights: WeightFormat) -> nn.Module:
    assert isinstance(block, Block)
    packed = sharing(block, Block)
    packed._modules["project_in"] = _PackedIn(block.project_in, weights)
    packed._modules["project_out"] = _PackedOut(block.project_out, weights)
    return packed


def _as(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model in `dtype`, itself where it is already."""
    if model.embedding.dtype == dtype:
        return model
    return copy.deepcopy(model).to(dtype)
