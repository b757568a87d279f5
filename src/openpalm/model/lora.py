"""LoRA, low-rank adaptation: W x becomes W x + (alpha / rank) B A x, and only A and B are trained.

Source: Hu et al. 2021, equation 3. A is initialised as in their implementation and B at zero, so a
new adapter changes nothing. It is attached from outside: modules that wrap `project_in` and
`project_out` of every block take their place, with the same parameters under the same names. The
factors of matrix q of block 0 are `blocks.0.project_in.lora.q.a` and `.b`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.model.block import Block, Projection
from openpalm.model.config import LORA_TARGETS, LoraConfig
from openpalm.model.sharding import assign
from openpalm.model.transformer import Transformer

M = TypeVar("M", bound=nn.Module)
INPUTS = ("q", "k", "v", "gate", "up")
"""Targets in project_in; the other targets are in project_out."""


class Factors(Projection):
    """A [rank, columns] and B [rows, rank] of one target: x [..., columns] -> [..., rows]."""

    def __init__(self, rank: int, rows: int, columns: int, scale: float, like: Tensor):
        super().__init__()
        self.a = nn.Parameter(like.new_empty(rank, columns))
        self.b = nn.Parameter(like.new_empty(rows, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.read("a"), self.read("b")
        assert a is not None
        assert b is not None
        return F.linear(F.linear(x, a) * self.scale, b)


class _Adapted(nn.Module):
    """A projection with factors for some of its matrices.

    The wrapped projection is no submodule: both have the same dict of parameters, so that their
    names do not change and a replaced parameter is replaced in both.
    """

    inner: nn.Module
    lora: nn.ModuleDict

    def __init__(self, inner: nn.Module, lora: nn.ModuleDict, config: LoraConfig):
        super().__init__()
        self.__dict__["inner"] = inner
        self._parameters = inner._parameters
        self._modules.update(inner._modules)
        self.lora = lora
        self.config = config
        self.active = True

    @property
    def readers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return cast("dict[str, Callable[[Tensor], Tensor]]", self.inner.readers)

    @property
    def rows(self) -> dict[str, int]:
        return cast("dict[str, int]", self.inner.rows)


class AdaptedIn(_Adapted):
    def forward(self, n: Tensor, names: Sequence[str] = ()) -> tuple[Tensor, ...]:
        products = self.inner(n, names)
        if not self.active:
            return products
        named = zip(names or self.rows, products, strict=True)
        return tuple(self._updated(n, name, product) for name, product in named)

    def _updated(self, n: Tensor, name: str, product: Tensor) -> Tensor:
        # Keys and values are one matrix with separate targets.
        targets = ("k", "v") if name == "kv" else (name,)
        if not any(target in self.lora for target in targets):
            return product
        width = product.shape[-1] // len(targets)
        updates = [
            self.lora[target](n) if target in self.lora else product.new_zeros(*n.shape[:-1], width)
            for target in targets
        ]
        return product + (updates[0] if len(updates) == 1 else torch.cat(updates, dim=-1))


class AdaptedOut(_Adapted):
    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        update = self.inner(attended, hidden)
        for name, x in (("out", attended), ("down", hidden)):
            if self.active and name in self.lora:
                update = update + self.lora[name](x)
        return update


A = TypeVar("A", AdaptedIn, AdaptedOut)


def attach(model: Transformer, config: LoraConfig, seed: int | None = None) -> None:
    """Adds an adapter to every block and freezes the other parameters of the Transformer.

    Heads that a subclass adds stay trainable. Factors have the device and dtype of the embedding.
    A is drawn from `seed`, with equal values on every device, and B is zero. Without a seed both
    are uninitialised, for a checkpoint or `initialise_adapter` to fill. Raises SettingsError if the
    config does not fit the model.
    """
    assert not is_attached(model), "this model has an adapter already"
    config.check(model.config)
    for parameter in trunk(model):
        parameter.requires_grad_(False)
    for block in _blocks(model):
        block._modules["project_in"] = _adapted(AdaptedIn, block.project_in, config, model)
        block._modules["project_out"] = _adapted(AdaptedOut, block.project_out, config, model)
    if seed is not None:
        initialise_adapter(model, seed)


def is_attached(model: Transformer) -> bool:
    return any(_adapters(model))


def config_of(model: Transformer) -> LoraConfig | None:
    """The attached adapter's config, or None."""
    return next((adapter.config for adapter in _adapters(model)), None)


def adapter_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """The adapter's factors by full name; empty without an adapter."""
    return {name: p for name, p in model.named_parameters() if ".lora." in name}


def trunk(model: Transformer) -> Iterator[nn.Parameter]:
    """Parameters of the Transformer itself, without the heads that a subclass adds."""
    yield from (model.embedding, *model.blocks.parameters(), *model.norm.parameters())
    optional = (model.embedding_bias, model.unembedding, model.head_bias)
    yield from (p for p in optional if p is not None)


@contextmanager
def detached(model: Transformer) -> Iterator[None]:
    """Disables the adapter inside the `with` block: the model then equals its base, bit for bit."""
    before = [(adapter, adapter.active) for adapter in _adapters(model)]
    try:
        for adapter, _ in before:
            adapter.active = False
        yield
    finally:
        for adapter, active in before:
            adapter.active = active


def merge(model: Transformer) -> None:
    """Merges B A into the matrices, in place, and removes the adapter.

    Every parameter becomes trainable again. Without an adapter nothing else changes.
    """
    for block in _blocks(model):
        block.project_in = _merged_projection(block.project_in)
        block.project_out = _merged_projection(block.project_out)
    model.requires_grad_(True)


def merged(model: Transformer) -> Transformer:
    """A merged copy of the model, or `model` itself if it has no adapter.

    Only the adapted matrices are copied. Everything else is shared with `model`, which does not
    change.
    """
    if not is_attached(model):
        return model
    twin = shallow_copy_as(model, type(model))
    twin.blocks = nn.ModuleList(shallow_copy_as(block, type(block)) for block in model.blocks)
    for block in _blocks(twin):
        block._modules["project_in"] = _merged_projection(block.project_in, copied=True)
        block._modules["project_out"] = _merged_projection(block.project_out, copied=True)
    return twin


def shallow_copy_as(module: nn.Module, kind: type[M]) -> M:
    """A `kind` with the same submodules and parameters; replacing one does not change `module`.

    Compilation and recomputation are dropped, because both are bound to the module's forward.
    """
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    for replaced in ("forward", "_compiled_call_impl"):
        twin.__dict__.pop(replaced, None)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    return twin


def _blocks(model: Transformer) -> Iterator[Block]:
    return (cast(Block, block) for block in model.blocks)


def _adapters(model: Transformer) -> Iterator[_Adapted]:
    for block in _blocks(model):
        for module in (block.project_in, block.project_out):
            if isinstance(module, _Adapted):
                yield module


def _adapted(kind: type[A], plain: nn.Module, config: LoraConfig, model: Transformer) -> A:
    """`plain` in an adapter with the same parameters."""
    shapes = model.config.matrices
    factors = {
        target: Factors(config.rank, *shapes[target], config.scale, model.embedding)
        for target in LORA_TARGETS
        if target in config.targets and (target in INPUTS) == (kind is AdaptedIn)
    }
    return kind(plain, nn.ModuleDict(factors), config)


@torch.no_grad()
def initialise_adapter(model: Transformer, seed: int) -> None:
    """Initialises A Kaiming-uniform with a = sqrt(5), that is +-1/sqrt(columns), and B at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, factor in adapter_parameters(model).items():
        if name.endswith(".b"):
            factor.zero_()
            continue
        bound = factor.shape[1] ** -0.5
        drawn = (2 * torch.rand(factor.shape, generator=generator) - 1) * bound
        assign(factor, drawn)


@torch.no_grad()
def _merged_projection(module: M, *, copied: bool = False) -> M:
    """The module with B A merged into its matrices or, if `copied`, into copies of them."""
    if not isinstance(module, _Adapted):
        return module
    plain = shallow_copy_as(module.inner, type(module.inner))
    for target, factors in module.lora.items() if module.active else ():
        assert isinstance(factors, Factors)
        name = "kv" if target in ("k", "v") else target
        matrix = plain._parameters[name]
        assert matrix is not None
        if copied and matrix is module._parameters[name]:
            matrix = plain._parameters[name] = nn.Parameter(matrix.clone())
        rows = matrix.chunk(2)["kv".index(target)] if name == "kv" else matrix
        rows.addmm_(factors.b, factors.a, alpha=factors.scale)
    return cast(M, plain)
