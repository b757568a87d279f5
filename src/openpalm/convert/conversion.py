"""What every conversion gives: a config, a state dict of ours, and what was assumed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openpalm.model import lora
from openpalm.model.config import LoraConfig, ModelConfig, RewardConfig
from openpalm.model.reward import make_model
from openpalm.model.transformer import Transformer


@dataclass(frozen=True)
class Converted:
    """A foreign model in our terms; the state dict is float32 and complete."""

    config: ModelConfig
    state: dict[str, Tensor]
    era: str
    """the versions whose function was assumed"""
    why: str
    """what that assumption rests on"""
    notes: list[str]
    """one line each: what was read, folded, left out or doubtful"""
    reward: RewardConfig | None = None
    lora: LoraConfig | None = None

    def model(self) -> Transformer:
        """The model itself, in eval mode; shares memory with `state`."""
        with torch.device("meta"):
            model = make_model(self.config, self.reward)
            if self.lora is not None:
                lora.attach(model, self.lora)
        model.load_state_dict(self.state, assign=True)
        return model.eval().requires_grad_(False)


def pad_vocabulary(table: Tensor, config: ModelConfig) -> Tensor:
    """[vocab_size, dim] -> [padded_vocab, dim], zeros below."""
    return torch.nn.functional.pad(table, (0, 0, 0, config.padded_vocab - config.vocab_size))
