"""Quantization to int8 and int4, and fast layouts of float32 and bfloat16, for decoding.

Decoding one token reads every weight once and computes little, so memory bandwidth sets its speed:
fewer bytes per weight, stored in the order that the kernel reads. Fused and quantized modules
replace project_in, project_out and the head; the rest of the model is unchanged.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.base.device import multiplies_bfloat16, multiplies_int8
from openpalm.errors import SettingsError
from openpalm.model.block import Block, ProjectIn, ProjectOut
from openpalm.model.embedding_head import ProjectHead
from openpalm.model.lora import merged, shallow_copy_as
from openpalm.model.transformer import Transformer

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
Side = Literal["project_in", "project_out"]
SIDES: tuple[Side, ...] = ("project_in", "project_out")
INT4_GROUP = 32
"""Neighbouring weights of a row that share a scale and a zero point."""
ONEDNN_FLOAT32_ROWS = 8
"""Number of input rows that oneDNN's float32 layout is chosen for: fast for 1 and for hundreds."""
ROUNDED_ELEMENTS = 1 << 22
"""Weights rounded to int8 at a time."""
WIDENED_ELEMENTS = 1 << 18
"""Weights converted to float32 at a time: a megabyte, which fits the processor's cache."""


class Matrix(Protocol):
    """A matrix [rows, columns] in the layout of its kernel: x [..., columns] -> [..., rows]."""

    def __call__(self, x: Tensor) -> Tensor: ...


def quantize(model: Transformer, weights: WeightFormat) -> Transformer:
    """Returns the model for inference with its matrices in this format; an adapter is merged.

    float32 and bfloat16 change the layout only. int8 keeps one scale per row and, where the
    processor multiplies 8-bit numbers, quantizes each token's activations too. int4 keeps a scale
    and a zero point for each group of 32 weights of a row. Both compute in bfloat16. Other
    parameters are shared with `model`. A quantized model is returned as it is. Raises SettingsError
    where the device has no kernel for it.
    """
    if is_quantized(model):
        return model
    check_format(weights, model.embedding.device.type)
    model = merged(model)  # before rounding, which would lose the small low-rank update
    if weights != "float32":
        model = _in_dtype(model, torch.bfloat16)
    quantized = shallow_copy_as(model, type(model))
    quantized.blocks = nn.ModuleList(quantized_block(block, weights) for block in model.blocks)
    unembedding = model.embedding if model.unembedding is None else model.unembedding
    quantized.project_head = quantized_head(unembedding, weights)
    return quantized.eval()


def check_format(weights: WeightFormat, device: str) -> None:
    """Raises SettingsError where the device has no kernel for the format."""
    if weights in ("int8", "int4") and torch.device(device).type != "cpu":
        raise SettingsError(f"--quantize {weights}: needs a CPU so far; leave it out on a GPU")


def quantized_head(table: Tensor, weights: WeightFormat) -> ProjectHead:
    """The head over a table in this format."""
    # bfloat16 logits are 1/16 apart, which is too coarse, so the head returns float32 if it can.
    return QuantizedHead(make_matrix(table, weights, torch.float32))


def is_quantized(model: Transformer) -> bool:
    """Whether `quantize` made this model."""
    return isinstance(model.project_head, QuantizedHead)


def with_matrices(
    model: Transformer, replaced: Callable[[Matrix, int, Side], Matrix]
) -> Transformer:
    """A copy of a quantized model with other matrices in its blocks.

    `replaced` gets each fused matrix, the number of its block and its side of the block.
    Everything else is shared with `model`.
    """
    twin = shallow_copy_as(model, type(model))
    twin.blocks = nn.ModuleList(shallow_copy_as(block, type(block)) for block in model.blocks)
    for layer, block in enumerate(twin.blocks):
        for side in SIDES:
            projection = block._modules[side]
            assert isinstance(projection, _FusedIn | _FusedOut)
            own = shallow_copy_as(projection, type(projection))
            own.matrix = replaced(projection.matrix, layer, side)
            block._modules[side] = own
    return twin


def copy_unquantized_parts(model: Transformer) -> Transformer:
    """Returns the model with its own tables, norms and biases, which `quantize` would share.

    The matrices of the blocks, which `quantize` copies, and parameters that only training needs (a
    critic) stay shared with `model`.
    """
    published = {id(parameter) for _, parameter in model.published_parameters()}
    shared = [parameter for parameter in model.parameters() if id(parameter) not in published]
    for block in model.blocks:
        assert isinstance(block, Block)
        for projection in (block.project_in, block.project_out):
            shared += [p for p in projection.parameters(recurse=False) if p.dim() == 2]
    # deepcopy returns an object that is in its memo as it is, so these are not copied.
    return copy.deepcopy(model, {id(parameter): parameter for parameter in shared})


class _FusedIn(nn.Module):
    """All input projections as one matrix: one kernel call instead of three or four."""

    def __init__(self, plain: ProjectIn, weights: WeightFormat):
        super().__init__()
        self.rows = plain.rows
        self.matrix = make_matrix(torch.cat([getattr(plain, name) for name in plain.rows]), weights)
        self.up_bias = plain.up_bias

    def forward(self, n: Tensor, names: Sequence[str] = ()) -> tuple[Tensor, ...]:
        # All outputs are computed even if `names` asks for fewer: one call reads all rows anyway.
        *outputs, up = self.matrix(n).split(list(self.rows.values()), dim=-1)
        outputs.append(up if self.up_bias is None else up + self.up_bias)
        return tuple(
            x for name, x in zip(self.rows, outputs, strict=True) if name in (names or self.rows)
        )


class _FusedOut(nn.Module):
    """Both output projections as one matrix over [attended, hidden]."""

    def __init__(self, plain: ProjectOut, weights: WeightFormat):
        super().__init__()
        self.matrix = make_matrix(torch.cat([plain.out, plain.down], dim=1), weights)
        self.down_bias = plain.down_bias

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        update = self.matrix(torch.cat([attended, hidden], dim=-1))
        return update if self.down_bias is None else update + self.down_bias


class QuantizedHead(ProjectHead):
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
        size: int,
        targets: Tensor,
        z_loss: float,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Without a gradient, because a quantized matrix is not trained."""
        logits = self.matrix(states)[:, :size].float()
        logits = logits if bias is None else logits + bias[:size]
        z = z_loss * logits.logsumexp(-1).square().sum()
        return F.cross_entropy(logits, targets, reduction="sum"), z


class _Dense:
    """The matrix as it is, for a GPU and for processors without a oneDNN layout."""

    def __init__(self, weight: Tensor):
        self.weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _OneDnn:
    """float32 or bfloat16 on a CPU, reordered once into the blocked layout of oneDNN's kernels.

    In float32 the product of a row does not depend on the number of rows. That is not so with
    F.linear, which changes kernels with the number of rows.
    """

    def __init__(self, weight: Tensor):
        rows = 1 if weight.dtype == torch.bfloat16 else ONEDNN_FLOAT32_ROWS
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        # For some shapes oneDNN has another kernel for a single row, which adds in another order.
        # Such a row is multiplied twice, so that it gets the same bits alone as in a batch.
        self.doubles_single_row = False
        if weight.dtype == torch.float32:
            generator = torch.Generator().manual_seed(0)
            one = torch.randn(1, weight.shape[1], generator=generator)
            alone, in_batch = self._multiply(one), self._multiply(one.tile(2, 1))[:1]
            self.doubles_single_row = not torch.equal(alone, in_batch)

    def __call__(self, x: Tensor) -> Tensor:
        if self.doubles_single_row and x.numel() == x.shape[-1]:
            twice = x.reshape(1, -1).tile(2, 1)
            return self._multiply(twice)[:1].view(*x.shape[:-1], -1)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class _Widened:
    """bfloat16 weights on a CPU without bfloat16 instructions: multiplied in float32.

    A few rows of the weights at a time are converted and multiplied while they are in the
    processor's cache, so that memory is read at two bytes per weight.
    """

    def __init__(self, weight: Tensor, result: torch.dtype):
        self.weight, self.result = weight.contiguous(), result
        self.rows = max(1, WIDENED_ELEMENTS // weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        # Converted once, not once for each group of rows.
        wide = x.float()
        products = [F.linear(wide, rows.float()) for rows in self.weight.split(self.rows)]
        return torch.cat(products, dim=-1).to(self.result)


class _Int8:
    """int8 weights with one scale per row; activations stay bfloat16."""

    def __init__(self, weight: Tensor):
        codes, scales = _round_to_int8(weight)
        # The kernel is several times slower with float32 activations and scales.
        self.weight, self.scales = codes, scales.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)
        return out.unflatten(0, x.shape[:-1])


class _Int8Dot:
    """int8 weights as in _Int8, and int8 activations with one scale per token.

    For processors that multiply 8-bit numbers directly. _Int8 is bound by arithmetic there; this
    reaches 1.7 times its tokens/s in a batch of 16 (benchmarks/RESULTS.md).
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        codes, self.scales = _round_to_int8(weight)
        self.dtype = dtype
        self.zeros = torch.zeros(len(codes), dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(codes, [1, codes.shape[1]])
        # The kernel's activations are unsigned, with zero at 128. Conversion to uint8 truncates,
        # so the half makes it round to the nearest.
        self.middle = torch.tensor(128.5)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
        # A token of zeros would otherwise be divided by zero.
        largest.clamp_min_(1e-12)
        codes = torch.addcmul(self.middle, rows, 127 / largest).to(torch.uint8)
        # The kernel takes one scale for all rows, so each row's own is applied to its product.
        out = torch.ops.onednn.qlinear_pointwise(
            *(codes, 1 / 127, 128),
            *(self.weight, self.scales, self.zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return out.mul_(largest).to(self.dtype).unflatten(0, x.shape[:-1])


class _Int4:
    """int4 weights: w = (q - 8) scale + zero with q in 0..15, for each group of a row."""

    def __init__(self, weight: Tensor):
        groups = weight.float().unflatten(1, (-1, INT4_GROUP))
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        # Lowest and highest weight become codes 0 and 15; equal weights would give scale zero.
        scale = ((high - low) / 15).clamp_min(1e-12)
        zero = low + 8 * scale
        q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
        codes = q.to(torch.int32).flatten(1)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # The kernel reads [groups, rows, 2]: the scales and zeros of a group for all rows.
        self.scales_zeros = torch.stack([scale, zero], dim=-1).transpose(0, 1)
        self.scales_zeros = self.scales_zeros.contiguous().to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, INT4_GROUP, self.scales_zeros
        )
        return out.unflatten(0, x.shape[:-1])


def make_matrix(
    weight: Tensor, weights: WeightFormat, result: torch.dtype = torch.bfloat16
) -> Matrix:
    """The weight in this format; products are in `result` where the kernel leaves a choice."""
    weight = weight.detach()
    # First, because all other kernels here run on a CPU only.
    if weight.device.type != "cpu":
        return _Dense(weight)
    if weights == "bfloat16" and not multiplies_bfloat16():
        return _Widened(weight, result)
    if weights in ("float32", "bfloat16"):
        return _onednn_or_dense(weight)
    if weights == "int8":
        return _Int8Dot(weight, result) if multiplies_int8() else _Int8(weight)
    if weight.shape[1] % INT4_GROUP or weight.shape[0] % 16:
        raise SettingsError(
            f"--quantize int4: needs matrices in multiples of 16 x {INT4_GROUP}, not "
            f"{weight.shape[0]} x {weight.shape[1]}; use int8"
        )
    return _Int4(weight)


def _onednn_or_dense(weight: Tensor) -> Matrix:
    """oneDNN's layout where torch has oneDNN and it supports this matrix on this processor."""
    if not torch.backends.mkldnn.is_available():
        return _Dense(weight)
    try:
        return _OneDnn(weight)
    # torch has no query for this; it raises where oneDNN has no kernel for the shape.
    except RuntimeError:
        return _Dense(weight)


def _round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [rows, columns] and the float32 scale of each row."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)
    # Some rows at a time, because their float32 copies are four times as large as the codes.
    rows = max(1, ROUNDED_ELEMENTS // weight.shape[1])
    parts = (tensor.split(rows) for tensor in (weight, codes, scales))
    for some, code, scale in zip(*parts, strict=True):
        wide = some.float()
        scale.copy_(wide.abs().amax(dim=1).clamp_min_(1e-12) / 127)
        # Codes are -127 .. 127, symmetric: a weight of zero stays exactly zero.
        code.copy_((wide / scale[:, None]).round_())
    return codes, scales


def quantized_block(block: nn.Module, weights: WeightFormat) -> nn.Module:
    assert isinstance(block, Block)
    quantized = shallow_copy_as(block, Block)
    quantized._modules["project_in"] = _FusedIn(block.project_in, weights)
    quantized._modules["project_out"] = _FusedOut(block.project_out, weights)
    return quantized


def _in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy of the model in `dtype`, or `model` itself if it has that dtype."""
    if model.embedding.dtype == dtype:
        return model
    # `to` changes a module in place, and this one belongs to the caller.
    return copy.deepcopy(model).to(dtype)
