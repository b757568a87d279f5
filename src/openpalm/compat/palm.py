"""palm-rlhf-pytorch's PaLM, computed by our Transformer and answered by our Engine."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.compat.state_dicts import LATEST, OriginalModule, draw_seed
from openpalm.convert.files import Hyperparameters, Tensors
from openpalm.convert.palm_rlhf.read import read_palm_rlhf
from openpalm.convert.palm_rlhf.reward import TARGETS, read_lora_factors, write_lora_factors
from openpalm.convert.palm_rlhf.write import convert_to_era, write_palm_rlhf
from openpalm.errors import SettingsError
from openpalm.generate.engine import Engine, Request
from openpalm.generate.sampling import Sampling
from openpalm.model import lora
from openpalm.model.block import Block
from openpalm.model.config import LoraConfig, ModelConfig
from openpalm.model.transformer import Transformer, initialise

SLOTS = 64
"""Sequences that are generated at a time."""


def top_k(thres: float, num_tokens: int) -> dict[str, Any]:
    """Keep the likeliest share 1 - thres of the vocabulary."""
    return {"top_k": max(1, math.ceil((1 - thres) * num_tokens))}


def top_p(thres: float, _num_tokens: int) -> dict[str, Any]:
    """Keep the likeliest tokens that together have the probability 1 - thres."""
    return {"top_p": max(1 - thres, 1e-9)}


class PaLM(OriginalModule):
    """A language model with the original's arguments, methods and state dict.

    attn_dropout and ff_dropout: ours drops whole outputs of blocks, with the larger of the two.
    flash_attn is accepted: PyTorch's fused attention is always used. era: the version whose
    function is computed and whose state dicts are read and written, for weights from before
    0.2.4. The initial weights are drawn from torch's generator. Raises SettingsError for sizes
    that contradict each other, CheckpointError for an unknown era.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_tokens: int,
        depth: int,
        causal: bool = True,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        qk_rmsnorm: bool = False,
        lora_r: int = 8,
        rotary_xpos_scale_base: float = 512,
        flash_attn: bool = False,
        finetune_scopes: Sequence[str] = (),
        cross_entropy_ignore_index: int = 0,
        era: str = LATEST,
    ):
        super().__init__(era)
        config = ModelConfig(
            vocab_size=num_tokens,
            dim=dim,
            depth=depth,
            heads=heads,
            head_dim=dim_head,
            ff_dim=dim * ff_mult,
            causal=causal,
            qk_norm=qk_rmsnorm,
            xpos_base=rotary_xpos_scale_base if causal and self.era.xpos else 0.0,
            norm_before_head=self.era.final_norm,
            dropout=max(attn_dropout, ff_dropout),
        )
        self.dim, self.dim_head, self.heads = dim, dim_head, heads
        self.causal, self.num_tokens, self.lora_r = causal, num_tokens, lora_r
        self.cross_entropy_ignore_index = cross_entropy_ignore_index
        self.model = Transformer(config)
        initialise(self.model, draw_seed())
        self.finetune_modules = nn.ModuleDict()
        for scope in finetune_scopes:
            self.add_finetune_params(scope)

    def forward(
        self,
        x: Tensor,
        return_loss: bool = False,
        disable_lora: bool = False,
        finetune_scope: str | None = None,
        extra_embed: Tensor | None = None,
        return_only_embedding: bool = False,
        return_logits_with_embedding: bool = False,
    ) -> Any:
        """Logits [batch, time, num_tokens] of ids [batch, time], or what the flags ask for.

        return_loss: the mean cross entropy of each next token, in nats, where that is not
        cross_entropy_ignore_index; the others: final-norm states [batch, time, dim], alone or
        after the logits. extra_embed goes on top of the embeddings. A bidirectional model takes
        negative ids for padding.
        """
        x, labels = (x[:, :-1], x[:, 1:]) if return_loss else (x, None)
        model = self.model_for_scope(None if disable_lora else finetune_scope)
        residual = model.residual(x, added=extra_embed)
        if return_only_embedding:
            return model.norm(residual)
        logits = model.head(residual)
        if labels is not None:
            ignored = self.cross_entropy_ignore_index
            return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=ignored)
        return (logits, model.norm(residual)) if return_logits_with_embedding else logits

    def generate(
        self,
        seq_len: int,
        prompt: Tensor | Sequence[int] | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[[float, int], dict[str, Any]] | None = top_k,
        filter_thres: float = 0.9,
        pad_value: float = 0.0,
        eos_token: int | None = None,
        return_seq_without_prompt: bool = True,
        use_tqdm: bool = False,
        finetune_scope: str | None = None,
        disable_lora: bool = False,
    ) -> Tensor:
        """Tokens sampled after `prompt` [..., time], up to seq_len with it: [..., new tokens].

        Without a prompt the first token is drawn too, and is part of the result [1, seq_len].
        The result is as wide as its longest row; what follows a generated eos_token is pad_value.
        filter_logits_fn: top_k or top_p of this module, or None. At least one token is made.
        """
        if seq_len < 1:
            raise SettingsError(f"generate({seq_len}): give a length of 1 or more")
        given = prompt is not None
        prompt = torch.as_tensor(prompt if given else torch.randint(self.num_tokens, (1, 1)))
        rows = prompt.reshape(-1, prompt.shape[-1])
        answers = self.completions(
            rows.tolist(),
            max(seq_len - prompt.shape[-1], int(given)),
            temperature=temperature,
            filter_logits_fn=filter_logits_fn,
            filter_thres=filter_thres,
            eos_token=eos_token,
            finetune_scope=None if disable_lora else finetune_scope,
        )
        longest = max(map(len, answers))
        padded = [[*answer, *[int(pad_value)] * (longest - len(answer))] for answer in answers]
        made = torch.tensor(padded, dtype=torch.long).view(*prompt.shape[:-1], longest)
        if not given or not return_seq_without_prompt:
            made = torch.cat([prompt.cpu(), made], dim=-1)
        return made.to(self.device)

    def completions(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        filter_logits_fn: Callable[[float, int], dict[str, Any]] | None = top_k,
        filter_thres: float = 0.9,
        eos_token: int | None = None,
        finetune_scope: str | None = None,
    ) -> list[list[int]]:
        """The new tokens of every prompt, an end marker included; dropout off."""
        if filter_logits_fn not in (top_k, top_p, None):
            raise TypeError("filter_logits_fn: give top_k or top_p of openpalm.compat, or None")
        kept = filter_logits_fn(filter_thres, self.num_tokens) if filter_logits_fn else {}
        stop = frozenset() if eos_token is None else frozenset({int(eos_token)})
        requests = [
            Request(ids, max_new_tokens, Sampling(temperature, seed=draw_seed(), **kept), stop)
            for ids in prompts
        ]
        engine = Engine(
            self.model_for_scope(finetune_scope), slots=min(SLOTS, len(prompts)), owned=True
        )
        self.train(self.training)  # packing shares modules, which it puts in eval mode
        return engine.completions(requests)

    def set_dropout(self, dropout: float) -> "PaLM":
        for module in self.modules():
            if isinstance(module, Block):
                module.dropout = dropout
            elif isinstance(module, Transformer):
                module.config = dataclasses.replace(module.config, dropout=dropout)
        return self

    def model_for_scope(self, scope: str | None) -> Transformer:
        """The model with the adapter of that scope, or without one."""
        if scope is None:
            return self.model
        if scope not in self.finetune_modules:
            raise SettingsError(f"finetune scope {scope}: not there; add_finetune_params first")
        return cast(Transformer, self.finetune_modules[scope])

    def add_finetune_params(self, scope: str, lora_r: int | None = None) -> None:
        """Adds low-rank factors for queries, keys, values and attention's output matrix."""
        if scope in self.finetune_modules:
            raise SettingsError(f"finetune scope {scope}: is there already; merge or remove it")
        self.finetune_modules[scope] = with_adapter(self.model, lora_r or self.lora_r)

    def remove_finetune_params(self, scope: str) -> Transformer:
        self.model_for_scope(scope)
        return cast(Transformer, self.finetune_modules.pop(scope))

    def merge_finetune_params(self, scope: str) -> None:
        """Adds what the scope learnt to the weights, and removes it."""
        lora.merge(self.remove_finetune_params(scope))

    def finetune_parameters(self, scope: str = "default") -> Iterator[nn.Parameter]:
        return iter(lora.adapter_parameters(self.model_for_scope(scope)).values())

    def palm_parameters(self) -> set[nn.Parameter]:
        """All but the factors."""
        return set(self.model.parameters())

    def original_state(self) -> dict[str, Tensor]:
        state = original_trunk_state(self.model)
        for scope, model in self.finetune_modules.items():
            ours = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
            adapter = lora.config_of(cast(Transformer, model))
            assert adapter is not None
            prefix = f"finetune_modules.{scope}."
            state |= write_lora_factors(ours, self.model.config, adapter, prefix)
        return convert_to_era(state, self.era, self.dim_head)

    def converted_state(self, tensors: Tensors) -> tuple[Mapping[str, Tensor], list[str]]:
        given = stated_arguments(self.model.config)
        factors = {scope: tensors.under(f"finetune_modules.{scope}.") for scope in self.scopes}
        trunk = read_palm_rlhf(tensors, given, self.era.last)
        ours = {f"model.{name}": tensor for name, tensor in trunk.state.items()}
        for scope in self.scopes:
            _, state = read_lora_factors(factors[scope], self.model.config, given)
            state = {**trunk.state, **state}
            ours |= {f"finetune_modules.{scope}.{name}": tensor for name, tensor in state.items()}
        return ours, trunk.notes

    @property
    def scopes(self) -> tuple[str, ...]:
        return tuple(self.finetune_modules)


def with_adapter(model: Transformer, rank: int) -> Transformer:
    """A twin that shares the model's weights and has an adapter where the original has one."""
    twin = lora.shallow_copy_as(model, Transformer)
    twin.blocks = nn.ModuleList(lora.shallow_copy_as(block, type(block)) for block in model.blocks)
    lora.attach(twin, LoraConfig(rank, float(rank), tuple(TARGETS)), seed=draw_seed())
    return twin.requires_grad_(True)


def stated_arguments(config: ModelConfig) -> Hyperparameters:
    """What a state dict does not say."""
    said = {"causal": config.causal} | (
        {"rotary_xpos_scale_base": config.xpos_base} if config.xpos_base else {}
    )
    return Hyperparameters("the arguments of PaLM", said)


def original_trunk_state(model: Transformer) -> dict[str, Tensor]:
    """The newest form's state dict, which does not say what logits are computed from."""
    config = dataclasses.replace(model.config, norm_before_head=True)
    return write_palm_rlhf(config, model.state_dict())[1]
