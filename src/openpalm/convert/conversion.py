"""The result of a conversion: a config, a state dict with OpenPaLM's names, and notes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openpalm.model import lora
from openpalm.model.config import LoraConfig, ModelConfig, RewardConfig
from openpalm.model.reward import make_model
from openpalm.model.transformer import Transformer


@dataclass(frozen=True)
class Converted:
    """A converted model; the state dict is complete and float32."""

    config: ModelConfig
    state: dict[str, Tensor]
    era: str
    """versions of the other project that compute this function"""
    why: str
    """reason for this era"""
    notes: list[str]
    """one line each about what was read, folded, dropped or is doubtful"""
    reward: RewardConfig | None = None
    lora: LoraConfig | None = None

    def model(self) -> Transformer:
        """The model in eval mode; it shares memory with `state`."""
        with torch.device("meta"):
            model = make_model(self.config, self.reward)
            if self.lora is not None:
                lora.attach(model, self.lora)
        model.load_state_dict(self.state, assign=True)
        return model.eval().requires_grad_(False)


def pad_vocabulary(table: Tensor, config: ModelConfig) -> Tensor:
    """[vocab_size, dim] -> [padded_vocab, dim], padded with zero rows."""
    return torch.nn.functional.pad(table, (0, 0, 0, config.padded_vocab - config.vocab_size))
