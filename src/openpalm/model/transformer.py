"""The Transformer: embedding, parallel blocks, final norm, head; and its initialisation.

Takes integer ids and tensors; knows nothing about batches, tokenizers or files.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from openpalm.model.block import (
    Attend,
    Block,
    Norm,
    ResidualStream,
    attend_cached,
    attend_uncached,
)
from openpalm.model.cache import KVCache
from openpalm.model.config import ModelConfig
from openpalm.model.embedding_head import Embedding, ProjectHead
from openpalm.model.layout import Layout
from openpalm.model.rotary import Rotary
from openpalm.model.sharding import assign, local_part_or_none

T = TypeVar("T")


class Transformer(nn.Module):
    """A decoder (or, with causal=False, an encoder) of the PaLM family; see ModelConfig.

    Its parameters are uninitialised; `initialise` or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.kv_heads = config.kv_heads
        """key/value heads that this process computes"""
        self.embedding = nn.Parameter(torch.empty(config.padded_vocab, config.dim))
        has_bias = config.embedding_bias
        self.embedding_bias = nn.Parameter(torch.empty(config.dim)) if has_bias else None
        self.embed = Embedding()
        self.stream = ResidualStream()
        self.rotary = Rotary(config)
        self.blocks = nn.ModuleList(Block(config, self.rotary) for _ in range(config.depth))
        self.norm = Norm(config)
        self.project_head = ProjectHead()
        self.unembedding = None if config.tied else nn.Parameter(torch.empty_like(self.embedding))
        self.head_bias = nn.Parameter(torch.empty(config.padded_vocab)) if config.bias else None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, compute: Callable[..., T], *args: Any) -> T:
        """Returns compute(self, *args).

        The entry for sharded models: FSDP gathers the weights outside of blocks around this call,
        and sums their gradients once. Every computation of a training run goes through it.
        """
        return compute(self, *args)

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of a published checkpoint; subclasses leave out training-only ones."""
        return self.named_parameters()

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Shapes of all parameters, in their order, those of other pipeline stages included."""
        return {name: parameter.shape for name, parameter in self.named_parameters()}

    def logits(
        self, ids: Tensor, cache: KVCache | None = None, *, layout: Layout | None = None
    ) -> Tensor:
        """Logits of the next token at every position, float32 [batch, time, vocab_size].

        ids: integers [batch, time]. The padding rows of the table are cut off here, so no loss,
        sampler or metric sees them. layout: for rows with several sequences.
        """
        return self.head(self.residual(ids, cache, layout=layout))

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """States after the final norm, [batch, time, dim], of ids [batch, time]."""
        return self.norm(self.residual(ids, cache))

    def residual(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        counts: list[int] | None = None,
        *,
        added: Tensor | None = None,
        layout: Layout | None = None,
        selected: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the last block, [batch, time, dim].

        cache: the ids continue the tokens of each slot, and the cache advances.
        counts: tokens by which each slot advances; the rest of its row is padding. None: all.
        added: [batch, time, dim], added to the embeddings.
        layout: positions and attention of rows with several sequences.
        selected: int64 [n], indices into the flattened ids; returns only their states, [n, dim],
        and skips the last block's feed-forward at the other positions.
        """
        positions, attend, longest = self._context(ids, cache, layout)
        tables = self.rotary(positions, longest)
        x = self._embedded(ids, added)
        for layer, block in self._numbered_blocks():
            last = layer == self.config.depth - 1
            x = block(layer, x, tables, attend, selected if last else None)
        if cache is not None:
            cache.advance(counts or [ids.shape[1]] * ids.shape[0])
        # At selected positions the last block has returned whole states.
        return x if selected is not None else self._whole(x, ids.shape[1])

    def _embedded(self, ids: Tensor, added: Tensor | None) -> Tensor:
        """The residual stream before the first block."""
        # Negative ids are an encoder's padding; any row of the table serves, since it is masked.
        x = self.embed(ids if self.config.causal else ids.clamp_min(0), self.embedding)
        for vector in (local_part_or_none(self.embedding_bias), added):
            x = x if vector is None else x + self.stream.part(vector)
        return x

    def _whole(self, x: Tensor, time: int) -> Tensor:
        """The residual stream at all positions, after the last block."""
        return self.stream.whole(x, time)

    def _numbered_blocks(self) -> Iterable[tuple[int, nn.Module]]:
        return enumerate(self.blocks)

    @property
    def computes_loss(self) -> bool:
        """Whether `cross_entropy` gets final states; false at a pipeline's earlier stages."""
        return True

    def head(self, residual: Tensor) -> Tensor:
        """Logits, float32 [..., vocab_size], from the residual stream [..., dim]."""
        logits = self.project_head(self._states(residual), self._table, self.head_bias)
        return logits[..., : self.config.vocab_size].float()

    def cross_entropy(
        self, residual: Tensor, targets: Tensor, *, z_loss: float = 0.0, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed cross entropy and z-loss from the residual stream [n, dim], int64 targets [n].

        Equals the loss of `head`'s logits, but does not hold them all: see linear_cross_entropy.
        """
        states, size = self._states(residual), self.config.vocab_size
        return self.project_head.cross_entropy(
            states, self._table, self.head_bias, size, targets, z_loss, chunk
        )

    @property
    def _table(self) -> Tensor:
        return self.embedding if self.unembedding is None else self.unembedding

    def _states(self, residual: Tensor) -> Tensor:
        """Input of the head: normalised and scaled states."""
        states = self.norm(residual) if self.config.norm_before_head else residual
        return states if self.config.logit_scale == 1 else states * self.config.logit_scale

    def _context(
        self, ids: Tensor, cache: KVCache | None, layout: Layout | None
    ) -> tuple[Tensor, Attend, int]:
        """Positions of the ids, their attention, and the length that rotary tables must cover."""
        time = ids.shape[1]
        if layout is not None:
            if cache is not None or not self.config.causal:
                raise AssertionError("a layout is for causal models without a cache")
            return layout.positions, layout.attend, layout.longest or time
        if cache is None:
            positions = torch.arange(time, device=ids.device)
            mask = None if self.config.causal else (ids >= 0)[:, None]
            return positions, attend_uncached(self.config.causal, mask), time
        if not self.config.causal:
            raise AssertionError("a bidirectional model has no cache")
        positions = cache.positions(time)
        return positions, attend_cached(cache, positions), max(cache.lengths) + time


Init = Literal["default", "palm"]


@torch.no_grad()
def initialise(model: Transformer, seed: int, init: Init = "default") -> None:
    """Initialises every parameter from `seed`, with equal values on every device and dtype.

    An adapter's factors are left out. Sharded parameters, and those of pipeline stages, get the
    same values as on one process. Matrices are normal with standard deviation 1/sqrt(fan-in);
    norms are one, biases zero.
    default: matrices that write to the residual stream are divided by sqrt(2 depth), so that its
    variance does not grow with depth; embeddings have standard deviation 0.02.
    palm: no such division; embeddings have standard deviation 1 (Chowdhery et al. 2022, section
    5), which needs logit_scale 1/sqrt(dim).
    """
    generator = torch.Generator().manual_seed(seed)
    own = dict(model.named_parameters())
    for name, shape in model.parameter_shapes().items():
        kind, parameter = name.rsplit(".", 1)[-1], own.get(name)
        if ".lora." in name:
            continue
        if len(shape) > 1 and not kind.endswith("bias"):
            # Drawn for another stage's matrix too: the values depend on those drawn before them.
            drawn = torch.randn(shape, generator=generator)
            if parameter is None:
                continue
            drawn *= _deviation(kind, shape, model.config, init)
            if kind in ("embedding", "unembedding"):
                drawn[model.config.vocab_size :] = 0  # padding rows: no token uses them
            assign(parameter, drawn)
        elif parameter is not None:
            parameter.fill_(0.0 if kind.endswith("bias") else 1.0)


def _deviation(kind: str, shape: torch.Size, config: ModelConfig, init: Init) -> float:
    fan_in = shape[1] ** -0.5
    if init == "palm":
        return 1.0 if kind == "embedding" else fan_in
    if "embedding" in kind:
        return 0.02
    return fan_in * (2 * config.depth) ** -0.5 if kind in ("out", "down") else fan_in
