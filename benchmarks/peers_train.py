"""The contenders of train.py: OpenPaLM through its own Trainer, and other models under equal rules.

A contender takes a batch, makes a step and returns the loss. The peers get OpenPaLM's optimizer
(the same fused AdamW, groups, clip and schedule), its autocast, and as many parameters as a whole
number of their layers allows. A module is imported when its contender is built, so that a peer
that is not installed costs the others nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.base.settings import build
from openpalm.data.batches.loader import Batch
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import initialise
from openpalm.train.batch_shape import BatchShape
from openpalm.train.config import OptimSettings, TrainSettings
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimization.schedule import learning_rate_factor
from openpalm.train.spec import TrainSpec, make_trainer

ENDLESS = 10**6


@dataclass(frozen=True)
class Rules:
    """What is the same for everyone; `config.context` is the longest sequence."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    steps: int = ENDLESS
    """of the schedule"""
    lr: float = 1e-3
    """peak learning rate"""


class Contender(Protocol):
    name: str
    parameters: int
    looked_up: int
    """of them those that multiply nothing: learned positions"""
    attention: int
    """layers x heads x head_dim"""

    def step(self, batch: Batch) -> float: ...

    def logits(self, ids: Tensor) -> Tensor: ...

    def forget_moments(self) -> None: ...


Makers = dict[str, Callable[[Rules], Contender]]


def built(makers: Makers, rules: Rules) -> dict[str, Contender]:
    """Everyone who can take part."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make(rules)
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
    return found


def flops_per_token(who: Contender, length: int) -> int:
    """6N + 12 L h head_dim T, as ModelConfig.flops_per_token."""
    return 6 * (who.parameters - who.looked_up) + 12 * who.attention * length


def without_moments(optimizer: Optimizer) -> None:
    """From now on it is SGD, which has no state."""
    sgd = torch.optim.SGD(list(optimizer.names), lr=0.0)
    sgd.param_groups[0] |= {"decays": False, "peak_lr": 0.0}
    optimizer.parts = [sgd]


class OpenPalm:
    """The run's own Trainer; it is also the Trainer's loader, of the batch that `step` was given.

    `settings` are of TrainSettings: optim={"name": "muon"}.
    """

    name = "OpenPaLM"

    def __init__(self, rules: Rules, **settings: Any):
        config = rules.config
        whole = {"data": "-", "out": "-", "model": "-", "steps": rules.steps}
        spec = TrainSpec(
            config=config,
            fill=partial(initialise, seed=0),
            make_loader=lambda *_: self,
            sequences_per_epoch=1,
            learning_rate=rules.lr,
        )
        shape = BatchShape(config.context, rows=1, accumulation=1)
        made = build(TrainSettings, whole | settings)
        self._trainer = make_trainer(
            made, spec, shape, rules.device, steps=rules.steps, dtype=rules.dtype
        )
        self.parameters, self.looked_up = config.parameters, 0
        self.attention = config.depth * config.heads * config.head_dim

    def step(self, batch: Batch) -> float:
        self._batch = batch
        return self._trainer.train_step().loss

    def logits(self, ids: Tensor) -> Tensor:
        return self._trainer.model.eval().logits(ids)

    def forget_moments(self) -> None:
        without_moments(self._trainer.optimizer)

    def __next__(self) -> Batch:
        return self._batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Peer:
    """A module, and what a plain PyTorch loop does with it."""

    name: str

    def __init__(self, rules: Rules):
        torch.manual_seed(0)
        self.rules = rules
        self.module = self.build(rules.config).to(rules.device)
        self.optimizer = Optimizer(self.module, OptimSettings(), rules.lr)
        self.parameters, self.looked_up = sum(p.numel() for p in self.module.parameters()), 0
        self.attention = rules.config.depth * rules.config.heads * rules.config.head_dim
        self.made = 0

    def build(self, config: ModelConfig) -> nn.Module:
        raise NotImplementedError

    def step(self, batch: Batch) -> float:
        self.module.train()
        self.made += 1
        device, dtype = self.rules.device.type, self.rules.dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = self.loss(batch.to(self.rules.device))
        loss.backward()
        value = loss.item()
        self.optimizer.clip()
        factor = learning_rate_factor(self.made, self.rules.steps, self.optimizer.settings)
        self.optimizer.step(factor)
        return value

    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch.inputs).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def forget_moments(self) -> None:
        without_moments(self.optimizer)

    def logits(self, ids: Tensor) -> Tensor:
        self.module.eval()
        return self.forward(ids).float()

    def forward(self, ids: Tensor) -> Tensor:
        return self.module(ids)


class PalmRlhf(Peer):
    """palm-rlhf-pytorch's PaLM and its own loss."""

    name = "palm-rlhf-pytorch"
    flash = False

    def build(self, config: ModelConfig) -> nn.Module:
        from palm_rlhf_pytorch import PaLM

        return PaLM(
            num_tokens=config.vocab_size,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            dim_head=config.head_dim,
            ff_mult=config.ff_dim // config.dim,
            flash_attn=self.flash,
            cross_entropy_ignore_index=-100,  # by default it does not learn id 0
        )

    def loss(self, batch: Batch) -> Tensor:
        return self.module(torch.cat([batch.inputs, batch.targets[:, -1:]], 1), return_loss=True)


class PalmRlhfFlash(PalmRlhf):
    name = "palm-rlhf-pytorch, flash"
    flash = True


class Llama(Peer):
    """transformers' Llama of the same width and depth, with one key/value head."""

    name = "transformers Llama"

    def build(self, config: ModelConfig) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ff_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(sizes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.module(input_ids=ids, use_cache=False).logits


class NanoGpt(Peer):
    """A GPT-2 as nanoGPT trains it: heads of 64, as many layers as come nearest in parameters."""

    name = "nanoGPT-like"

    def build(self, config: ModelConfig) -> nn.Module:
        layer = 12 * config.dim**2
        tables = (config.vocab_size + config.context) * config.dim
        layers = max(1, round((config.parameters - tables) / layer))
        return Gpt(config.vocab_size, config.context, config.dim, layers, config.dim // 64)

    def __init__(self, rules: Rules):
        super().__init__(rules)
        self.looked_up = self.module.positions.weight.numel()
        self.attention = len(self.module.layers) * rules.config.dim


class Gpt(nn.Module):
    """Learned positions; serial blocks of multi-head attention and GELU; tied; no biases."""

    def __init__(self, vocab: int, context: int, dim: int, layers: int, heads: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(context, dim)
        self.layers = nn.ModuleList(GptLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tokens.weight)


class GptLayer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim, bias=False) for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


PEERS: Makers = {peer.name: peer for peer in (PalmRlhf, PalmRlhfFlash, NanoGpt, Llama)}
