"""Heads beside the vocabulary's: a critic, in the same module as its policy.

One module, so one optimizer, one wrap, one checkpoint; the critic is needed only in training, so it
is saved with the optimizer's state and not with what is served.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer


@dataclass(frozen=True)
class Bins:
    """`count` values from `low` to `high` that a head chooses among."""

    count: int
    low: float
    high: float

    def centres(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.linspace(self.low, self.high, self.count, device=device)

    def expected(self, logits: Tensor) -> Tensor:
        """The mean value [...] of logits [..., count]."""
        return logits.softmax(dim=-1) @ self.centres(logits.device)


CriticKind = Literal["shared", "detached", "separate"]


class Critic(nn.Module):
    """Reads a value, or the logits of its bins, from final-norm states."""

    def __init__(self, config: ModelConfig, kind: CriticKind, bins: Bins | None):
        super().__init__()
        self.kind: CriticKind = kind
        self.bins = bins
        self.trunk = Transformer(config) if kind == "separate" else None
        self.read = nn.Linear(config.dim, bins.count if bins else 1)

    def forward(self, states: Tensor) -> Tensor:
        read = self.read(states).float()
        return read if self.bins else read.squeeze(-1)


class ActorCritic(Transformer):
    """A policy with its critic.

    kind: `shared` trains the policy's trunk on both losses, `detached` reads its states without
    changing them, `separate` has a trunk of its own that starts as the policy's.
    """

    def __init__(self, config: ModelConfig, kind: CriticKind = "shared", bins: Bins | None = None):
        super().__init__(config)
        self.critic = Critic(config, kind, bins)

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (
            item for item in super().published_parameters() if not item[0].startswith("critic.")
        )

    @torch.no_grad()
    def reset_critic(self) -> None:
        """The critic's start: values of zero (or the middle bin's), a trunk like the policy's."""
        self.critic.read.weight.zero_()
        self.critic.read.bias.zero_()
        if self.critic.trunk is not None:
            own = dict(self.critic.trunk.named_parameters())
            for name, parameter in self.published_parameters():
                own[name].copy_(parameter)

    def values(self, inputs: Tensor, residual: Tensor, counts: Tensor) -> Tensor:
        """What the critic reads where `counts` [rows, time] is True: [tokens], or [tokens, bins].

        residual: the policy's states there, [tokens, dim], of inputs [rows, time].
        """
        if self.critic.trunk is not None:
            return self.critic(self.critic.trunk.hidden(inputs)[counts])
        states = self.norm(residual)
        return self.critic(states.detach() if self.critic.kind == "detached" else states)

    def as_value(self, read: Tensor) -> Tensor:
        """The values [tokens] of what `values` gave."""
        return self.critic.bins.expected(read) if self.critic.bins else read
