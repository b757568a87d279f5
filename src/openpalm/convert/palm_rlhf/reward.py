"""Converts palm-rlhf-pytorch's RewardModel from and to ours: PaLM, LoRA factors, marks and head.

LoRA stays an adapter. Its update is A B there and (alpha / rank) B A here, A and B transposed.
"""

import dataclasses

import torch
from torch import Tensor

from openpalm.convert.conversion import Converted
from openpalm.convert.files import Hyperparameters, Tensors
from openpalm.convert.palm_rlhf.read import read_palm_rlhf
from openpalm.convert.palm_rlhf.write import write_palm_rlhf
from openpalm.errors import CheckpointError
from openpalm.model import lora
from openpalm.model.config import MAX_BINS, LoraConfig, ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel

TARGETS = {"q": "project_in", "k": "project_in", "v": "project_in", "out": "project_out"}
"""Matrices with LoRA, in the order of the original: target -> our projection."""
_SCOPES = "finetune_modules."
_DEFAULT_SCOPE = "reward"
_HEADS = ("to_pred.0.weight", "to_pred.weight")


def is_reward(tensors: Tensors) -> bool:
    """Whether this is the state dict of a RewardModel."""
    return "palm.layers.0.fn.attn_out.weight" in tensors and any(h in tensors for h in _HEADS)


def read_reward(tensors: Tensors, given: Hyperparameters, era: str | None) -> Converted:
    """Converts a RewardModel's state dict; arguments and errors are those of `read_palm_rlhf`.

    The original's bins 0, 1, ... K - 1 become the ratings 1, 2, ... K.
    """
    palm = tensors.under("palm.")
    scope, left_out = _scope(palm, given)
    factors = palm.under(f"{_SCOPES}{scope}.")
    palm.drop(r"finetune_modules\.")
    trunk = read_palm_rlhf(palm, given, era)
    adapter, state = read_lora_factors(factors, trunk.config, given)
    reward, head = _read_head(tensors, trunk.config, given)
    tensors.finish()
    notes = [*trunk.notes, f"reads the mean state; {reward.kind} head, {reward.outputs} outputs"]
    if adapter is not None:
        notes.append(f"LoRA factors of scope {scope}, rank {adapter.rank}, kept as an adapter")
    if left_out:
        notes.append(f"dropped: the LoRA factors of scope {', '.join(left_out):.100}")
    state = {**trunk.state, **state, **head}
    return Converted(trunk.config, state, trunk.era, trunk.why, notes, reward, adapter)


def write_reward(
    model: RewardModel,
) -> tuple[dict[str, object], dict[str, Tensor], list[str]]:
    """Constructor arguments of PaLM and RewardModel, the state dict (float32), and notes.

    Raises CheckpointError for a model that palm-rlhf-pytorch cannot express.
    """
    _check_writable(model)
    adapter = lora.config_of(model)
    ours = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    unscaled = dataclasses.replace(
        model.config, logit_scale=1.0
    )  # it scales logits, which a reward model does not have
    arguments, palm, notes = write_palm_rlhf(unscaled, ours)
    dim = model.config.dim
    marks = ours.get("marks", torch.zeros(2, dim)).view(2, 1, 1, dim).clone()
    state = {"prompt_embed": marks[0].clone(), "response_embed": marks[1].clone()}
    state |= {f"palm.{name}": tensor for name, tensor in palm.items()}
    if adapter is not None:
        scope = f"palm.{_SCOPES}{_DEFAULT_SCOPE}."
        state |= write_lora_factors(ours, model.config, adapter, scope)
    if model.reward.kind == "scalar":
        state["to_pred.0.weight"] = ours["reward_head"]
    else:
        state |= {"to_pred.weight": ours["reward_head"], "to_pred.bias": ours["reward_bias"]}
    arguments |= {
        "num_binned_output": len(model.reward.values),
        "use_lora": adapter is not None,
        "reward_lora_scope": _DEFAULT_SCOPE,
    }
    if model.reward.values[:1] not in ((), (1.0,)):
        notes.append(f"warning: bin 0 there is {model.reward.values[0]:g} here")
    arguments |= {"lora_r": adapter.rank} if adapter is not None else {}
    return arguments, state, notes


def _scope(palm: Tensors, given: Hyperparameters) -> tuple[str, list[str]]:
    """The LoRA scope that computes the reward, and the other scopes."""
    scopes = sorted({name.split(".")[1] for name in palm.names if name.startswith(_SCOPES)})
    named = given.values.get("reward_lora_scope")
    if not given.flag("use_lora", True):
        return "", scopes
    wanted = named if isinstance(named, str) else _DEFAULT_SCOPE
    if wanted not in scopes and len(scopes) == 1 and named is None:
        wanted = scopes[0]
    if scopes and wanted not in scopes:
        raise CheckpointError(
            f"{palm.where}: has LoRA scopes {', '.join(scopes):.100} and none named "
            f"{wanted:.40}; give reward_lora_scope in --config"
        )
    return wanted, [scope for scope in scopes if scope != wanted]


def read_lora_factors(
    factors: Tensors, config: ModelConfig, given: Hyperparameters
) -> tuple[LoraConfig | None, dict[str, Tensor]]:
    """The adapter's config from the factors of one scope, and its tensors with our names."""
    if not factors.names:
        return None, {}
    rank = factors.shape("0.0.A", 2)[1]
    given.agree(lora_r=rank)
    adapter = LoraConfig(rank, float(rank), tuple(TARGETS))
    state = {}
    for i in range(config.depth):
        for j, (target, home) in enumerate(TARGETS.items()):
            rows, columns = config.matrices[target]
            name = f"blocks.{i}.{home}.lora.{target}"
            state[f"{name}.a"] = factors.take(f"{i}.{j}.A", columns, rank).T.contiguous()
            state[f"{name}.b"] = factors.take(f"{i}.{j}.B", rank, rows).T.contiguous()
    factors.finish()
    return adapter, state


def write_lora_factors(
    ours: dict[str, Tensor], config: ModelConfig, adapter: LoraConfig, prefix: str
) -> dict[str, Tensor]:
    """Factors of the four matrices, zeros for those without LoRA; B includes the scale."""
    state = {}
    for i in range(config.depth):
        for j, (target, home) in enumerate(TARGETS.items()):
            rows, columns = config.matrices[target]
            name = f"blocks.{i}.{home}.lora.{target}"
            a = ours.get(f"{name}.a", torch.zeros(adapter.rank, columns))
            b = ours.get(f"{name}.b", torch.zeros(rows, adapter.rank)) * adapter.scale
            out = f"{prefix}{i}.{j}."
            state |= {f"{out}A": a.T.contiguous(), f"{out}B": b.T.contiguous()}
    return state


def _read_head(
    tensors: Tensors, config: ModelConfig, given: Hyperparameters
) -> tuple[RewardConfig, dict[str, Tensor]]:
    dim = config.dim
    marks = [tensors.take(f"{side}_embed", 1, 1, dim) for side in ("prompt", "response")]
    state = {"marks": torch.cat(marks).view(2, dim)}
    bins = 0
    if "to_pred.weight" in tensors:
        bins = tensors.shape("to_pred.weight", 2)[0]
        if not 2 <= bins <= MAX_BINS:
            raise CheckpointError(f"{tensors.where}: has {bins} bins, not 2 to {MAX_BINS}")
        state["reward_head"] = tensors.take("to_pred.weight", bins, dim)
        state["reward_bias"] = tensors.take("to_pred.bias", bins)
    else:
        state["reward_head"] = tensors.take("to_pred.0.weight", 1, dim)
    stated = given.values.get("num_binned_output") or 0
    if (stated > 1 if isinstance(stated, int | float) else True) and stated != bins:
        raise CheckpointError(
            f"{given.where}: num_binned_output is {stated!r:.40}, but the tensors say {bins}"
        )
    values = tuple(float(k + 1) for k in range(bins))
    kind = "binned" if bins else "scalar"
    return RewardConfig(kind, values, read="mean", marks=True), state


def _check_writable(model: RewardModel) -> None:
    """palm-rlhf-pytorch reads the mean state with one head and has LoRA on q, k, v and out."""
    reward, adapter = model.reward, lora.config_of(model)
    targets = set(adapter.targets if adapter is not None else ())
    numbered = all(b - a == 1 for a, b in zip(reward.values, reward.values[1:], strict=False))
    refused = {
        f"read={reward.read}, only mean": reward.read != "mean",
        f"members {reward.members}, only 1": reward.members != 1,
        f"kind {reward.kind}, only scalar and binned": reward.kind == "ordinal",
        "the bias of a scalar head": reward.kind == "scalar" and reward.bias,
        "bins that are not 1 apart": not numbered,
        f"LoRA on {', '.join(sorted(targets - TARGETS.keys()))}": not targets <= TARGETS.keys(),
    }
    for what in (what for what, is_refused in refused.items() if is_refused):
        raise CheckpointError(
            f"palm-rlhf-pytorch cannot express {what}; keep this model in OpenPaLM's format"
        )
