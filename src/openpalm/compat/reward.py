"""palm-rlhf-pytorch's RewardModel class, computed by our reward model."""

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.compat.palm import PaLM, stated_arguments
from openpalm.compat.state_dicts import OriginalModule, draw_seed
from openpalm.convert.files import Hyperparameters, Tensors
from openpalm.convert.palm_rlhf.reward import TARGETS, read_reward, write_reward
from openpalm.convert.palm_rlhf.write import convert_to_era
from openpalm.errors import DataError, SettingsError
from openpalm.model import lora
from openpalm.model.config import LoraConfig, RewardConfig
from openpalm.model.reward import RewardModel as Model
from openpalm.model.reward import initialise_heads


class RewardModel(OriginalModule):
    """A copy of a PaLM with a head that returns the reward of a sequence: a number or a bin.

    num_binned_output: number of bins, numbered from 0; 0 or 1 is a scalar reward.
    sample_from_bins: None returns the expected bin, True a bin sampled with sample_temperature,
    False the logits of the bins.
    """

    def __init__(
        self,
        palm: PaLM,
        dropout: float = 0.1,
        num_binned_output: int = 0,
        use_lora: bool = True,
        lora_r: int = 8,
        reward_lora_scope: str = "reward",
        sample_from_bins: bool | None = None,
        sample_temperature: float = 1.0,
    ):
        super().__init__(palm.era.last)
        self.reward_lora_scope = reward_lora_scope if use_lora else None
        self.binned_output = num_binned_output > 1
        self.sample_from_bins, self.sample_temperature = sample_from_bins, sample_temperature
        bins = tuple(float(k) for k in range(int(num_binned_output))) if self.binned_output else ()
        kind = "binned" if self.binned_output else "scalar"
        config = dataclasses.replace(palm.model.config, dropout=dropout, norm_before_head=True)
        self.model = Model(config, RewardConfig(kind, bins, read="mean", marks=True))
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            for name, parameter in palm.model.named_parameters():
                own[name].copy_(parameter)
        initialise_heads(self.model, draw_seed())
        self.model.to(palm.model.embedding)
        if use_lora:
            adapter = LoraConfig(lora_r, float(lora_r), tuple(TARGETS))
            lora.attach(self.model, adapter, seed=draw_seed())
            self.model.requires_grad_(True)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        disable_lora: bool = False,
    ) -> Tensor:
        """The reward [batch] of ids [batch, time], or the mean loss if labels [batch] are given.

        mask: True for tokens in the mean state that the head reads. prompt_mask [batch, time] or
        prompt_lengths [batch] mark the prompt at the start of a row; without them no token is
        marked. The loss is the squared error, or the cross entropy of bins. Raises DataError for
        a prompt that is not at the start, or a row without a token in the mask.
        """
        lengths = _prompt_lengths(prompt_mask, prompt_lengths)
        with lora.detached(self.model) if disable_lora else nullcontext():
            scores = self.model.score(x, mask, lengths)
        if labels is not None:
            loss = F.cross_entropy if self.binned_output else F.mse_loss
            return loss(scores, labels if self.binned_output else labels.to(scores))
        if not self.binned_output or self.sample_from_bins is False:
            return scores
        if self.sample_from_bins:
            chances = (scores / max(self.sample_temperature, 1e-10)).softmax(dim=-1)
            return chances.multinomial(1).squeeze(-1)
        return self.model.expected(scores)

    @torch.no_grad()
    def rewards(self, ids: Tensor, mask: Tensor, prompt_lengths: Tensor) -> list[float]:
        """The reward of each row, for bins the expected one; dropout is off."""
        was = self.training
        self.eval()
        values = self.model.value(*(t.to(self.device) for t in (ids, mask, prompt_lengths)))
        self.train(was)
        return values.tolist()

    def finetune_parameters(self) -> list[nn.Parameter]:
        """The head, the marks and the LoRA factors; without LoRA all parameters."""
        if self.reward_lora_scope is None:
            return list(self.model.parameters())
        heads = [self.model.reward_head, self.model.reward_bias, self.model.marks]
        factors = lora.adapter_parameters(self.model).values()
        return [*(head for head in heads if head is not None), *factors]

    def original_state(self) -> dict[str, Tensor]:
        _, state, _ = write_reward(self.model)
        named = {_scope(name, "reward", self.reward_lora_scope): t for name, t in state.items()}
        return convert_to_era(named, self.era, self.model.config.head_dim)

    def converted_state(self, tensors: Tensors) -> tuple[Mapping[str, Tensor], list[str]]:
        stated = stated_arguments(self.model.config)
        values = stated.values | {"reward_lora_scope": self.reward_lora_scope}
        read = read_reward(tensors, Hyperparameters(stated.where, values), self.era.last)
        return {f"model.{name}": tensor for name, tensor in read.state.items()}, read.notes


def _scope(name: str, ours: str, theirs: str | None) -> str:
    return name.replace(f"palm.finetune_modules.{ours}.", f"palm.finetune_modules.{theirs}.")


def _prompt_lengths(mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    if mask is None:
        return lengths
    if lengths is not None:
        raise SettingsError("prompt_mask and prompt_lengths: give one of them")
    lengths = mask.sum(dim=-1)
    beginning = torch.arange(mask.shape[-1], device=mask.device) < lengths[:, None]
    if not torch.equal(beginning, mask.bool()):
        raise DataError("prompt_mask: a row marks a prompt token after a token of the response")
    return lengths
