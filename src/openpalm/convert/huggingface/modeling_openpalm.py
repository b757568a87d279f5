"""The OpenPaLM transformer for Hugging Face `transformers`, in one file.

An exported model folder holds a copy of this file, so it imports only torch and transformers:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)  # rewards

A block is parallel, x + attention(norm(x)) + feedforward(norm(x)), as in PaLM (Chowdhery et al.
2022) and GPT-J. It computes the same function as OpenPaLM's own model.
"""
# pyright: reportMissingImports=false

import math
from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

_MAX_LOG_SCALE = 80.0  # exp(80) and exp(-80) are still normal float32 numbers
_TABLE_LENGTH = 256

# transformers renamed `past_key_values` to `cache` in version 5. Both names are accepted; outputs
# use the one that the installed version has.
_CACHE = (
    "cache"
    if any(field.name == "cache" for field in fields(CausalLMOutputWithPast))
    else "past_key_values"
)


class OpenPalmConfig(PretrainedConfig):
    """Sizes and options of the model; OpenPaLM's names, with the usual names as aliases."""

    model_type = "openpalm"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "ff_dim",
        "max_position_embeddings": "context",
        "layer_norm_eps": "norm_eps",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 320,
        "dim": 128,
        "depth": 4,
        "heads": 4,
        "head_dim": 32,
        "ff_dim": 512,
        "kv_heads": 1,
        "context": 256,
        "causal": True,
        "feedforward": "swiglu",  # or gelu
        "bias": False,
        "embedding_bias": False,
        "tie_word_embeddings": True,
        "qk_norm": False,
        "rotary": "halves",  # or interleaved, or nanopalm
        "rotary_dims": 0,  # all
        "rotary_base": 10000.0,
        "xpos_base": 0.0,  # no xPos
        "norm_before_head": True,
        "logit_scale": 1.0,
        "norm_eps": 1e-5,
        "dropout": 0.0,
        "reward": None,  # the heads of a reward model
        "initializer_range": 0.02,
        "use_cache": True,
    }

    def __init__(self, **kwargs: Any):
        own = {name: kwargs.pop(name, value) for name, value in self.defaults.items()}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=own["tie_word_embeddings"], **kwargs)


class Rotary:
    """cos and sin of rotary positions, with xPos scales (Sun et al. 2022) and nanoPALM's variant.

    Tables are computed in float64 and applied in float32, whatever the model's dtype.
    """

    def __init__(self, config: OpenPalmConfig):
        self.config = config
        self.dims = config.rotary_dims or config.head_dim
        self.tables: Tensor | None = None

    def __call__(self, positions: Tensor) -> Tensor:
        """cos and sin of queries, then of keys: [4, batch, 1, time, dims] of positions
        [batch, time]."""
        longest = int(positions.max()) + 1 if positions.numel() else 1
        tables = self.tables
        if tables is None or tables.shape[1] < longest or tables.device != positions.device:
            tables = self.tables = self._compute(self._rounded(longest)).to(positions.device)
        return tables[:, positions].unsqueeze(2)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the first coordinates of every head of x [batch, heads, time, head_dim]."""
        first, rest = x[..., : self.dims], x[..., self.dims :]
        if self.config.rotary == "halves":
            a, b = first.chunk(2, dim=-1)
            crossed = torch.cat([-b, a], dim=-1)
        else:
            a, b = first.unflatten(-1, (-1, 2)).unbind(-1)
            crossed = torch.stack([-b, a], dim=-1).flatten(-2)
        return torch.cat([(first * cos + crossed * sin).to(x.dtype), rest], dim=-1)

    def _rounded(self, longest: int) -> int:
        length = max(_TABLE_LENGTH, 1 << (longest - 1).bit_length())
        if not self.config.xpos_base:
            return length
        per_base = _MAX_LOG_SCALE / -math.log(0.4 / 1.4)  # the first pair has the largest scale
        reach = int(per_base * self.config.xpos_base) + self.config.context // 2
        return max(longest, min(length, reach))

    def _compute(self, length: int) -> Tensor:
        position = torch.arange(length, dtype=torch.float64)
        angle = position[:, None] * self._frequencies()
        cos, sin, scale = angle.cos(), angle.sin(), self._xpos_scale(position)
        # The scores keep the scale of the distance only.
        return torch.stack([cos * scale, sin * scale, cos / scale, sin / scale]).float()

    def _frequencies(self) -> Tensor:
        """Radians a position for each rotated coordinate: base^(-2j / dims) for pair j."""
        pair = torch.arange(self.dims // 2, dtype=torch.float64)
        # nanoPALM uses exponents 4j + 1 and frequencies in halves, but rotates neighbouring pairs.
        nanopalm = self.config.rotary == "nanopalm"
        frequency = self.config.rotary_base ** -(
            (4 * pair + 1) / self.dims if nanopalm else 2 * pair / self.dims
        )
        if self.config.rotary == "interleaved":
            return frequency.repeat_interleave(2)
        return frequency.repeat(2)

    def _xpos_scale(self, position: Tensor) -> Tensor:
        """s_i^((p - centre) / base), [positions, dims]; ones without xPos."""
        if not self.config.xpos_base:
            return torch.ones(1, 1, dtype=torch.float64)
        pair = torch.arange(0, self.dims, 2, dtype=torch.float64)
        log_scale = ((pair + 0.4 * self.dims) / (1.4 * self.dims)).log()
        power = (position - self.config.context // 2) / self.config.xpos_base
        if power.abs().max() * -log_scale[0] > _MAX_LOG_SCALE:
            raise ValueError(
                f"{len(position)} tokens are too many for xPos with base "
                f"{self.config.xpos_base:g}: its powers leave float32"
            )
        return (power[:, None] * log_scale).exp().repeat(1, 2)


class HeadNorm(nn.Module):
    """RMS norm of every query or key head, with a learned scale."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float()
        return F.rms_norm(x.float(), scale.shape, scale, eps=1e-12).to(x.dtype)


class Attention(nn.Module):
    """Multi-query, grouped-query or multi-head attention."""

    def __init__(self, config: OpenPalmConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        inner, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, inner, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, keys, bias=False)
        self.o_proj = nn.Linear(inner, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = HeadNorm(config.head_dim), HeadNorm(config.head_dim)

    def forward(
        self, n: Tensor, rotary: Rotary, tables: Tensor, mask: "Mask", cache: Cache | None
    ) -> Tensor:
        """n: norm(x) [batch, time, dim] -> [batch, time, dim]."""
        q, k, v = (
            project(n).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        query_cos, query_sin, key_cos, key_sin = tables
        q, k = rotary.rotate(q, query_cos, query_sin), rotary.rotate(k, key_cos, key_sin)
        if cache is not None:
            # Versions with the old name need the places in a static cache.
            places = () if _CACHE == "cache" else ({"cache_position": mask.places},)
            k, v = cache.update(k, v, self.layer, *places)
            # A static cache returns room for later tokens too.
            k, v = k[:, :, : mask.keys], v[:, :, : mask.keys]
        groups = self.config.heads // self.config.kv_heads
        k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.allowed, is_causal=mask.is_causal
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (PaLM) or tanh-approximated GELU (GPT-J)."""

    def __init__(self, config: OpenPalmConfig):
        super().__init__()
        gated = config.feedforward == "swiglu"
        self.gate_proj = nn.Linear(config.dim, config.ff_dim, bias=False) if gated else None
        self.up_proj = nn.Linear(config.dim, config.ff_dim, bias=config.bias)
        self.down_proj = nn.Linear(config.ff_dim, config.dim, bias=config.bias)

    def forward(self, n: Tensor) -> Tensor:
        up = self.up_proj(n)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(up, approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(n)) * up)


class Block(nn.Module):
    def __init__(self, config: OpenPalmConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)
        self.attention = Attention(config, layer)
        self.feedforward = FeedForward(config)

    def forward(
        self, x: Tensor, rotary: Rotary, tables: Tensor, mask: "Mask", cache: Cache | None
    ) -> Tensor:
        n = self.norm(x)
        update = self.attention(n, rotary, tables, mask, cache) + self.feedforward(n)
        return x + F.dropout(update, self.dropout, self.training)


class Mask:
    """Which keys each query may attend to."""

    def __init__(self, given: Tensor | None, past: int, time: int, causal: bool, like: Tensor):
        """given: attention mask [batch, keys], 1 at real tokens, or [batch, 1, time, keys] as
        `generate` makes it for a static cache; past: keys that precede the `time` new ones."""
        self.keys = past + time
        self.places = torch.arange(past, past + time, device=like.device)
        self.is_causal = False
        self.allowed: Tensor | None = None
        if given is not None and given.dim() == 4:
            self.keys = given.shape[-1]
            self.allowed = given
            return
        padded = given is not None and not bool(given.all())
        if not padded and (not causal or time == 1):
            return
        if not padded and not past:
            self.is_causal = True
            return
        key = torch.arange(self.keys, device=like.device)
        query = key[past:, None]
        allowed = (key <= query) if causal else torch.ones_like(key <= query)
        if padded:
            assert given is not None
            # A padding token attends to itself, because softmax over nothing is not a number.
            allowed = allowed & given[:, None, None, -self.keys :].bool() | (key == query)
        self.allowed = allowed.expand(len(like), 1, time, self.keys)


class OpenPalmPreTrainedModel(PreTrainedModel):
    config_class = OpenPalmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New weights, for training from the config: normal matrices, norms of one."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, deviation)
        elif isinstance(module, nn.LayerNorm | HeadNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, OpenPalmForSequenceClassification):
            nn.init.normal_(module.reward_head, 0.0, deviation)
        for name in ("bias", "embed_bias", "reward_bias", "marks"):
            extra = getattr(module, name, None)
            if isinstance(extra, nn.Parameter):
                nn.init.zeros_(extra)


class OpenPalmModel(OpenPalmPreTrainedModel):
    """Embedding, blocks and final norm: ids [batch, time] -> states [batch, time, dim]."""

    def __init__(self, config: OpenPalmConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        has_bias = config.embedding_bias
        self.embed_bias = nn.Parameter(torch.zeros(config.dim)) if has_bias else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """last_hidden_state is the final norm's output (with norm_before_head False, its input)."""
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: this model does not return attention weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        checkpointing = self.gradient_checkpointing and self.training
        if not self.config.causal or checkpointing:
            use_cache, cache = False, None  # a recomputed block would be cached twice
        if use_cache and cache is None:
            cache = DynamicCache()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x if self.embed_bias is None else x + self.embed_bias
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = Mask(attention_mask, past, x.shape[1], self.config.causal, x)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, x)
        tables = self.rotary(position_ids)
        seen = [x]
        for block in self.blocks:
            given = (x, self.rotary, tables, mask, cache)
            if checkpointing:
                x = self._gradient_checkpointing_func(block.__call__, *given)
            else:
                x = block(*given)
            if output_hidden_states:
                seen.append(x)
        x = self.norm(x) if self.config.norm_before_head else x
        if output_hidden_states:
            seen[-1] = x
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(seen) if output_hidden_states else None,
            **{_CACHE: cache if use_cache else None},
        )
        return output if return_dict else output.to_tuple()


def _positions(attention_mask: Tensor | None, past: int, x: Tensor) -> Tensor:
    """Positions [batch or 1, time] that count real tokens only."""
    time = x.shape[1]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + time, device=x.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -time:]


class OpenPalmForCausalLM(OpenPalmPreTrainedModel, GenerationMixin):
    """Language model: logits of the next token at every position, [batch, time, vocab_size]."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OpenPalmConfig):
        super().__init__(config)
        self.model = OpenPalmModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=config.bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        if not self.config.causal:
            raise ValueError("a bidirectional model cannot generate text")
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """labels [batch, time]: the ids themselves, -100 where no loss is wanted; shifted here."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        states = output.last_hidden_state
        if not isinstance(logits_to_keep, int):
            states = states[:, logits_to_keep]
        elif logits_to_keep:
            states = states[:, -logits_to_keep:]
        logits = self.lm_head(states * self.config.logit_scale).float()
        loss = None
        if labels is not None:
            vocab = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{_CACHE: getattr(output, _CACHE)},
        )
        return result if return_dict else result.to_tuple()


class OpenPalmForSequenceClassification(OpenPalmPreTrainedModel):
    """Reward model: the one logit of a text is its reward, float32 [batch, 1].

    It is the mean over the heads' outputs; a head is scalar, or a distribution over values.
    prompt_lengths [batch]: for models with learned prompt and completion marks, the number of
    tokens of each prompt. Without it no marks are added.
    """

    def __init__(self, config: OpenPalmConfig):
        super().__init__(config)
        reward: dict[str, Any] = config.reward or {"kind": "scalar"}
        self.num_labels = 1
        self.model = OpenPalmModel(config)
        self.kind = reward["kind"]
        self.values = reward.get("values") or []
        self.read = reward.get("read", "last")
        self.members = reward.get("members", 1)
        rows = len(self.values) if self.kind == "binned" else 1
        outputs = max(1, len(self.values) - (self.kind == "ordinal"))
        self.reward_head = nn.Parameter(torch.zeros(self.members * rows, config.dim))
        biased = reward.get("bias", False) or self.kind != "scalar"
        self.reward_bias = nn.Parameter(torch.zeros(self.members * outputs)) if biased else None
        marked = reward.get("marks", False)
        self.marks = nn.Parameter(torch.zeros(2, config.dim)) if marked else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """labels [batch]: rewards; the loss is their mean squared error."""
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        real = attention_mask
        if real is None:
            real = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        if self.marks is not None and prompt_lengths is not None:
            in_completion = real.long().cumsum(-1) > prompt_lengths[:, None]
            x = x + self.marks[in_completion.long()]
        output = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=x,
            **(kwargs | {"use_cache": False}),
        )
        states = output.last_hidden_state
        states = states if self.config.norm_before_head else self.model.norm(states)
        logits = self._reward(self._pooled(states, real.bool()))[:, None]
        loss = None
        if labels is not None:
            loss = F.mse_loss(logits[:, 0], labels.to(logits).view(-1))
        result = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states
        )
        return result if return_dict else result.to_tuple()

    def _pooled(self, states: Tensor, real: Tensor) -> Tensor:
        """The state of the last real token, or the mean of all real ones, float32 [batch, dim]."""
        if self.read == "mean":
            total = (states.float() * real[..., None]).sum(dim=1)
            return total / real.sum(dim=-1, keepdim=True)
        last = (torch.arange(real.shape[1], device=real.device) * real).amax(dim=-1)
        return states[torch.arange(len(states), device=real.device), last].float()

    def _reward(self, pooled: Tensor) -> Tensor:
        """Rewards [batch] of pooled states [batch, dim]."""
        head = self.reward_head.float().view(self.members, -1, self.config.dim)
        with torch.autocast(pooled.device.type, enabled=False):
            scores = torch.einsum("bd,mod->mbo", pooled, head)
            if self.reward_bias is not None:
                scores = scores + self.reward_bias.float().view(self.members, 1, -1)
        if self.kind == "scalar":
            return scores[..., 0].mean(dim=0)
        values = scores.new_tensor(self.values)
        if self.kind == "binned":
            return (scores.softmax(dim=-1) @ values).mean(dim=0)
        return (values[0] + scores.sigmoid() @ values.diff()).mean(dim=0)
