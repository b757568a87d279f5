"""Actor-critic: the policy with a value head (critic), scalar or over value bins.

One module, so one optimizer and one checkpoint. Only training needs the critic, so a checkpoint
stores it with the optimizer's state, apart from the published weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.model.config import ModelConfig
from openpalm.model.sharding import local_part
from openpalm.model.transformer import Transformer


@dataclass(frozen=True)
class Bins:
    """`count` equally spaced values from `low` to `high`, for a value head over bins."""

    count: int
    low: float
    high: float

    def centres(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.linspace(self.low, self.high, self.count, device=device)

    def expected(self, logits: Tensor) -> Tensor:
        """The expected value [...] under logits [..., count]."""
        return logits.softmax(dim=-1) @ self.centres(logits.device)


CriticKind = Literal["shared", "detached", "separate"]


class Critic(nn.Module):
    """Computes a value, or the logits of its bins, from states after the final norm."""

    def __init__(self, config: ModelConfig, kind: CriticKind, bins: Bins | None):
        super().__init__()
        self.kind: CriticKind = kind
        self.bins = bins
        self.trunk = Transformer(config) if kind == "separate" else None
        self.read = nn.Linear(config.dim, bins.count if bins else 1)

    def forward(self, states: Tensor) -> Tensor:
        weight, bias = local_part(self.read.weight), local_part(self.read.bias)
        read = F.linear(states, weight, bias).float()
        return read if self.bins else read.squeeze(-1)


class ActorCritic(Transformer):
    """A policy with its critic.

    kind: `shared` trains the policy's trunk on both losses; `detached` sends no gradient into the
    trunk; `separate` has its own trunk, initialised as a copy of the policy's.
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
        """Initialises the critic: values of zero (or the middle of the bins), trunk copied."""
        self.critic.read.weight.zero_()
        self.critic.read.bias.zero_()
        if self.critic.trunk is not None:
            own = dict(self.critic.trunk.named_parameters())
            for name, parameter in self.published_parameters():
                own[name].copy_(parameter)

    def values(self, inputs: Tensor, residual: Tensor, counts: Tensor) -> Tensor:
        """Values [tokens], or their bin logits [tokens, bins], where `counts` [rows, time] is True.

        inputs: ids [rows, time]; residual: the policy's residual stream there, [tokens, dim].
        """
        if self.critic.trunk is not None:
            return self.critic(self.critic.trunk.hidden(inputs)[counts])
        states = self.norm(residual)
        return self.critic(states.detach() if self.critic.kind == "detached" else states)

    def as_value(self, values: Tensor) -> Tensor:
        """Values [tokens] from the output of `values`: the expectation over bins, if any."""
        return self.critic.bins.expected(values) if self.critic.bins else values
