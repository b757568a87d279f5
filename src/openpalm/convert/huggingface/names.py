"""Names of the parameters in modeling_openpalm.py, and config.json of an exported model."""

import re
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from openpalm.errors import SettingsError
from openpalm.model.config import (
    ModelConfig,
    RewardConfig,
    config_from_json,
    reward_from_json,
)

MODEL_TYPE = "openpalm"
MODELING_FILE = "modeling_openpalm.py"
TIED = "tie_word_embeddings"
"""transformers' name of ModelConfig.tied"""
LANGUAGE_MODEL = "OpenPalmForCausalLM"
REWARD_MODEL = "OpenPalmForSequenceClassification"
_UNREAD_BY_REWARDS = ("unembedding", "head_bias")
"""Parameters of a language model that a reward model has but does not use."""

_OUTSIDE = {
    "embedding": "model.embed_tokens.weight",
    "embedding_bias": "model.embed_bias",
    "unembedding": "lm_head.weight",
    "head_bias": "lm_head.bias",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "reward_head": "reward_head",
    "reward_bias": "reward_bias",
    "marks": "marks",
}
_INSIDE = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "project_in.q": "attention.q_proj.weight",
    "project_in.gate": "feedforward.gate_proj.weight",
    "project_in.up": "feedforward.up_proj.weight",
    "project_in.up_bias": "feedforward.up_proj.bias",
    "attention.q_scale": "attention.q_norm.weight",
    "attention.k_scale": "attention.k_norm.weight",
    "project_out.out": "attention.o_proj.weight",
    "project_out.down": "feedforward.down_proj.weight",
    "project_out.down_bias": "feedforward.down_proj.bias",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Part(NamedTuple):
    """Rows of one of our parameters, stored as a tensor of its own."""

    name: str
    rows: slice

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part of a parameter with shape `whole`."""
        return (len(range(*self.rows.indices(whole[0]))), *whole[1:])


def parts_of(name: str, config: ModelConfig, *, reward: bool) -> list[Part]:
    """The stored tensors of our parameter `name`; empty if they are not stored.

    The padding rows of the vocabulary are left out; keys and values are separate.
    """
    if reward and name in _UNREAD_BY_REWARDS:
        return []
    block = _BLOCK.fullmatch(name)
    if block is None:
        in_vocabulary = name in ("embedding", *_UNREAD_BY_REWARDS)
        return [Part(_OUTSIDE[name], slice(0, config.vocab_size if in_vocabulary else None))]
    place = f"model.blocks.{block[1]}."
    if block[2] == "project_in.kv":
        rows = config.kv_heads * config.head_dim
        return [
            Part(f"{place}attention.k_proj.weight", slice(0, rows)),
            Part(f"{place}attention.v_proj.weight", slice(rows, 2 * rows)),
        ]
    return [Part(place + _INSIDE[block[2]], slice(None))]


def config_json(config: ModelConfig, reward: RewardConfig | None, dtype: str) -> dict[str, Any]:
    """config.json of an exported model."""
    values = asdict(config)
    # A reward model has no output head.
    tied = values.pop("tied") or reward is not None
    module = MODELING_FILE.removesuffix(".py")
    content: dict[str, Any] = {
        "architectures": [LANGUAGE_MODEL if reward is None else REWARD_MODEL],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{module}.OpenPalmConfig",
            "AutoModel": f"{module}.OpenPalmModel",
            "AutoModelForCausalLM": f"{module}.{LANGUAGE_MODEL}",
            "AutoModelForSequenceClassification": f"{module}.{REWARD_MODEL}",
        },
        "dtype": dtype,
        **values,
        TIED: tied,
        "use_cache": config.causal,
    }
    if reward is not None:
        content["auto_map"].pop("AutoModelForCausalLM")
        content |= {"reward": asdict(reward), "problem_type": "regression"}
        content |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return content


def configs_from_json(
    content: dict[str, Any], where: str
) -> tuple[ModelConfig, RewardConfig | None]:
    """The configs that a config.json describes. Raises SettingsError for a wrong value."""
    names = {field.name for field in fields(ModelConfig)} - {"tied"}
    values = {name: content[name] for name in names if name in content}
    values["tied"] = content.get(TIED, True)
    config = config_from_json(values, where)
    heads = content.get("reward")
    reward = None if heads is None else reward_from_json(heads, where)
    if reward is not None and not config.tied:
        raise SettingsError(f"{where}: a reward model has no output head; set {TIED} to true")
    return config, reward
