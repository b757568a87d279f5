"""Every kind of loss and score of a tensor-parallel model: its value, and all gradients, are those
of one process. Relative to the largest number of a tensor: 1e-5, in float32."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from small_models import SHAPES, ids_for
from torch import Tensor

from openpalm.align.logprobs import evaluate, token_log_probs
from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.model import lora
from openpalm.model.cache import KVCache
from openpalm.model.config import LoraConfig, ModelConfig, RewardConfig
from openpalm.model.critic import ActorCritic, Bins
from openpalm.model.layout import shared_prompt_layout
from openpalm.model.reward import RewardModel
from openpalm.model.sharding import assign, whole
from openpalm.model.transformer import Transformer
from openpalm.parallel import fsdp, tensor
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.world import join
from openpalm.train.objective import NextToken
from ranks import on_ranks

Loss = Callable[[Any, Tensor], Tensor]
TIME = 21  # an odd number of positions


def targets_for(ids: Tensor) -> Tensor:
    """The next ids; those of the first third, a prompt, are not learned."""
    targets = ids.roll(-1, dims=1)
    targets[:, : TIME // 3] = IGNORE
    targets[0, -4:] = IGNORE
    return targets


def weighed(x: Tensor) -> Tensor:
    """A number that depends on every entry of x in another way."""
    return (x * torch.arange(1.0, x.numel() + 1).view_as(x).sin()).sum()


def masked(model: Transformer, ids: Tensor) -> Tensor:
    return NextToken(z_loss=1e-2, chunk=5).loss(model, Batch(ids, targets_for(ids)))[0]


def packed(model: Transformer, ids: Tensor) -> Tensor:
    segments = (torch.arange(TIME) // 8).expand_as(ids)
    return NextToken().loss(model, Batch(ids, targets_for(ids), segments))[0]


def log_probs(model: Transformer, ids: Tensor) -> Tensor:
    return weighed(token_log_probs(model, ids, targets_for(ids)))


def shared_prompts(model: Transformer, ids: Tensor) -> Tensor:
    segments = torch.tensor([0] * 7 + [1] * 5 + [2] * 6 + [-1] * 3).expand_as(ids)
    reads = torch.tensor([[6, 7, 8], [6, 12, 13], [27, 28, 29]])
    found = token_log_probs(
        model, ids, ids.flatten()[:9].view(3, 3), shared_prompt_layout(segments), reads
    )
    return weighed(found)


def actor_critic(model: ActorCritic, ids: Tensor) -> Tensor:
    found = evaluate(model, ids, targets_for(ids), temperature=0.7, train_entropy=True)
    assert found.values is not None
    return weighed(found.log_probs) + weighed(found.entropy) + weighed(found.values)


def scores(model: RewardModel, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 15:] = False
    return weighed(model.member_scores(ids, mask, torch.tensor([5, 9])))


def encoded(model: Transformer, ids: Tensor) -> Tensor:
    return weighed(model.hidden(ids.where(torch.arange(TIME) < 17, -1))[:, :17])


def decoded(model: Transformer, ids: Tensor) -> Tensor:
    """Logits from a cache, a few tokens at a time."""
    cache = KVCache(model.config, slots=len(ids), length=TIME, kv_heads=model.kv_heads)
    parts = []
    with torch.no_grad():
        for start, stop in ((0, 9), (9, 10), (10, 13)):
            parts.append(model.logits(ids[:, start:stop], cache))
    return weighed(torch.cat(parts, dim=1))


def reward_model(config: ModelConfig) -> Transformer:
    values = (-1.0, 0.0, 2.0)
    reward = RewardConfig("binned", values, read="mean", marks=True, members=2)
    return RewardModel(config, reward)


def separate_critic(config: ModelConfig) -> Transformer:
    return ActorCritic(config, "separate", Bins(5, -1.0, 1.0))


PALM, GROUPED, GPTJ = (SHAPES[name] for name in ("qk-norm", "grouped", "gpt-j"))
CASES: dict[str, tuple[Loss, ModelConfig, Callable[[ModelConfig], Transformer]]] = {
    "masked": (masked, PALM, Transformer),
    "masked-gpt-j": (masked, GPTJ, Transformer),
    "packed": (packed, GROUPED, Transformer),
    "log-probs": (log_probs, GPTJ, Transformer),
    "shared-prompts": (shared_prompts, PALM, Transformer),
    "critic": (actor_critic, GPTJ, ActorCritic),
    "separate-critic": (actor_critic, PALM, separate_critic),
    "reward": (scores, GROUPED, reward_model),
    "encoder": (encoded, SHAPES["encoder-grouped"], Transformer),
    "decoded": (decoded, GROUPED, Transformer),
}


def filled(name: str, adapter: bool, parallel: dict[str, Any] | None) -> Transformer:
    """The case's model, with weights that depend on their names only."""
    _, config, make = CASES[name]
    world = join(ParallelSettings(**(parallel or {})), torch.device("cpu"))
    with torch.device("meta"):
        model = make(config)
    if adapter:
        lora.attach(model, LoraConfig(3, 6.0, tuple(config.matrices)))
    tensor.shard_tensor(model, world, sequence=(parallel or {}).get("sequence", True))
    fsdp.shard(model, world, torch.float32, reshard=True)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        value = 0.2 * torch.randn(parameter.shape, generator=generator)
        assign(parameter, value + 1 if parameter_name.endswith("norm.weight") else value)
    return model


def results(names: list[str], adapter: bool, parallel: dict[str, Any] | None = None):
    """Loss and whole gradients of each case."""
    found = []
    for name in names:
        model, loss = filled(name, adapter, parallel), CASES[name][0]
        value = model(loss, ids_for(model.config, time=TIME))
        if value.requires_grad:
            value.backward()
        tensor.sum_gradients(model)
        gradients = {
            name: whole(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        found.append((value.item(), gradients))
    return found


@cache
def alone(name: str, adapter: bool):
    return results([name], adapter)[0]


LAYOUTS = {
    "2": (2, {"tensor": 2, "sequence": False}),
    "2-sequence": (2, {"tensor": 2}),
    "2x2": (4, {"tensor": 2, "shard": 2}),
}


@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "adapter"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(layout: str, adapter: bool):
    processes, parallel = LAYOUTS[layout]
    names = list(CASES)
    for found in on_ranks(processes, results, names, adapter, parallel):
        for name, (value, gradients) in zip(names, found, strict=True):
            expected, wanted = alone(name, adapter)
            assert value == pytest.approx(expected, rel=1e-5), name
            assert set(gradients) == set(wanted), name
            for parameter, gradient in gradients.items():
                close = wanted[parameter].abs().max().item() * 1e-5 + 1e-7
                assert (gradient - wanted[parameter]).abs().max() < close, (name, parameter)
