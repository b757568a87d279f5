"""The model: embedding, parallel blocks, final norm; hidden states or logits, by method.

Sees integer ids and tensors only, never a batch, a tokenizer or a file.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.model.block import Attend, Block, Norm, ProjectHead, attend_cached, attend_whole
from openpalm.model.cache import KVCache
from openpalm.model.config import ModelConfig
from openpalm.model.layout import Layout
from openpalm.model.rotary import Rotary


class Transformer(nn.Module):
    """A decoder (or, with causal=False, an encoder) of the PaLM family; see ModelConfig.

    Parameters are uninitialised until `initialise` or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.padded_vocab, config.dim))
        self.rotary = Rotary(config)
        self.blocks = nn.ModuleList(Block(config, self.rotary) for _ in range(config.depth))
        self.norm = Norm(config)
        self.project_head = ProjectHead()
        self.unembedding = None if config.tied else nn.Parameter(torch.empty_like(self.embedding))
        self.head_bias = nn.Parameter(torch.empty(config.padded_vocab)) if config.bias else None

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that a checkpoint holds for whoever uses the model."""
        return self.named_parameters()

    def logits(
        self, ids: Tensor, cache: KVCache | None = None, *, layout: Layout | None = None
    ) -> Tensor:
        """Unnormalised log-probabilities of the next token.

        ids: integers [batch, time]. Returns float32 [batch, time, vocab_size]: the padding rows
        of the table are cut off here, so no loss, sampler or metric can meet them. A `layout`
        says where the tokens stand, in rows that hold more than one sequence.
        """
        return self.head(self.residual(ids, cache, layout=layout))

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final-norm states [batch, time, dim] of ids [batch, time]."""
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

        `added`, of that shape, goes on top of the embeddings. With a cache the ids follow what
        each slot holds, and the cache advances: by `counts` tokens in each slot where given (the
        rest of the row is padding), else by all of them. `selected`, int64 [n], are those of the
        flattened ids whose states are wanted, [n, dim]: what only the others need is not computed.
        """
        positions, attend, longest = self._context(ids, cache, layout)
        tables = self.rotary(positions, longest)
        x = F.embedding(ids.clamp_min(0) if not self.config.causal else ids, self.embedding)
        x = x if added is None else x + added
        for layer, block in enumerate(self.blocks):
            last = layer == self.config.depth - 1
            x = block(layer, x, tables, attend, selected if last else None)
        if cache is not None:
            cache.advance(counts or [ids.shape[1]] * ids.shape[0])
        return x

    def head(self, residual: Tensor) -> Tensor:
        """Logits, float32 [..., vocab_size], of residual-stream states [..., dim]."""
        logits = self.project_head(self._states(residual), self._table, self.head_bias)
        return logits[..., : self.config.vocab_size].float()

    def cross_entropy(
        self, residual: Tensor, targets: Tensor, *, z_loss: float = 0.0, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed cross entropy and z-loss of residual-stream states [n, dim], int64 targets [n].

        The same as of `head`'s logits, without holding them: see linear_cross_entropy.
        """
        table, bias, size = self._table, self.head_bias, self.config.vocab_size
        if len(table) > size:  # not always: the gradient of a slice is a copy of the table's size
            table, bias = table[:size], None if bias is None else bias[:size]
        return self.project_head.cross_entropy(
            self._states(residual), table, bias, targets, z_loss, chunk
        )

    @property
    def _table(self) -> Tensor:
        return self.embedding if self.unembedding is None else self.unembedding

    def _states(self, residual: Tensor) -> Tensor:
        """What the head multiplies by its table."""
        states = self.norm(residual) if self.config.norm_before_head else residual
        return states if self.config.logit_scale == 1 else states * self.config.logit_scale

    def _context(
        self, ids: Tensor, cache: KVCache | None, layout: Layout | None
    ) -> tuple[Tensor, Attend, int]:
        """Positions of the ids, how they attend, and one more than the last position."""
        time = ids.shape[1]
        if layout is not None:
            if cache is not None or not self.config.causal:
                raise AssertionError("a layout is for causal models without a cache")
            return layout.positions, layout.attend, time
        if cache is None:
            positions = torch.arange(time, device=ids.device)
            mask = None if self.config.causal else (ids >= 0)[:, None]
            return positions, attend_whole(self.config.causal, mask), time
        if not self.config.causal:
            raise AssertionError("a bidirectional model has no cache")
        positions = cache.positions(time)
        return positions, attend_cached(cache, positions), max(cache.lengths) + time


Init = Literal["default", "palm"]


@torch.no_grad()
def initialise(model: Transformer, seed: int, init: Init = "default") -> None:
    """Fills every parameter from `seed`, the same on every device and for any dtype.

    Matrices are normal with deviation 1/sqrt(fan-in); norms start at one, biases at zero. By
    default those that write to the residual stream are divided by sqrt(2 depth), so that its
    variance does not grow with depth, and tables have deviation 0.02. palm shrinks none, and its
    embeddings have deviation 1 (Chowdhery et al. 2022, section 5), which the config's logit_scale
    answers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * _deviation(kind, parameter, model.config, init))
    for table in (model.embedding, model.unembedding):
        if table is not None:
            table[model.config.vocab_size :] = 0


def _deviation(kind: str, matrix: Tensor, config: ModelConfig, init: Init) -> float:
    fan_in = matrix.shape[1] ** -0.5
    if init == "palm":
        return 1.0 if kind == "embedding" else fan_in
    if "embedding" in kind:
        return 0.02
    return fan_in * (2 * config.depth) ** -0.5 if kind in ("out", "down") else fan_in
