"""palm-rlhf-pytorch's RLHFTrainer class, computed by our PPO.

Rollouts, loss and loop are those of `openpalm ppo`; prompts are token ids, and the reward is a
RewardModel of this package.
"""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from openpalm.align.config import PpoSettings
from openpalm.align.rollouts.ppo import PpoObjective, estimate
from openpalm.align.rollouts.rollout import RolloutLoader, reference_log_probs
from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.align.rollouts.sampler import Sampler
from openpalm.compat.actor_critic_file import OriginalActorCritic
from openpalm.compat.palm import PaLM
from openpalm.compat.reward import RewardModel
from openpalm.compat.state_dicts import draw_seed
from openpalm.errors import DataError, SettingsError
from openpalm.model import lora
from openpalm.model.critic import ActorCritic, Bins, Critic
from openpalm.model.transformer import Transformer
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer

_SCOPE, _CRITIC_SCOPE = "actor", "critic"
_UNUSED = {
    "critic_pooled_values": (True, "values are per token here, with GAE"),
    "actor_dropout": (0.0, "with dropout the trained policy would differ from the sampled one"),
    "critic_dropout": (0.0, "values are computed without dropout"),
    "accelerate_kwargs": ({}, "accelerate is not used"),
}
"""Arguments without effect here: default and reason."""


class RLHFTrainer:
    """Trains a PaLM with PPO on completions of prompts that a reward model scores.

    Give one of: prompt_token_ids, a tensor [prompts, time] with pad_value at either end of a row,
    or a list of tensors or lists of ids; prompts, a list of texts; prompts_path, a file with one
    prompt per line. Texts need `tokenizer`, which maps a list of texts to prompt_token_ids.
    actor_lora: only a new finetune scope "actor" learns, else the whole palm. The critic has a
    trunk of its own, initialised from `critic` or the palm. kl_div_loss_weight: KL penalty
    coefficient, per nat from the palm at the start. Raises DataError for unusable prompts,
    SettingsError for values out of range; warns about arguments without effect.
    """

    def __init__(
        self,
        *,
        palm: PaLM,
        reward_model: RewardModel,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: Tensor | Sequence[Any] | None = None,
        tokenizer: Callable[[list[str]], Any] | None = None,
        critic: PaLM | None = None,
        actor_lr: float = 1e-4,
        critic_lr: float | None = None,
        actor_wd: float = 0.0,
        critic_wd: float | None = None,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int = 8,
        critic_lora_r: int = 8,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
        eps_clip: float = 0.2,
        value_clip: float = 0.4,
        beta_s: float = 0.01,
        pad_value: float = 0.0,
        minibatch_size: int = 16,
        epochs: int = 1,
        kl_div_loss_weight: float = 0.1,
        critic_num_pred_bins: int = 6,
        hl_gauss_loss_kwargs: dict[str, Any] | None = None,
        **unused: Any,
    ):
        _warn(unused, {"critic_lr": (critic_lr, actor_lr), "critic_wd": (critic_wd, actor_wd)})
        self.palm, self.reward_model = palm, reward_model.eval()
        texts = _texts(prompts, prompts_path, tokenizer, prompt_token_ids)
        self.prompt_token_ids = _prompts(texts, int(pad_value))
        self.minibatch_size = minibatch_size
        self._settings = PpoSettings(
            data=Path(),
            out=Path(),
            init="palm",
            steps=1,
            seed=draw_seed(),
            optim=OptimSettings(
                lr=actor_lr,
                weight_decay=actor_wd,
                beta1=betas[0],
                beta2=betas[1],
                warmup=0.0,
                final_lr=1.0,
                clip=math.inf if max_norm is None else max_norm,
            ),
            epochs_per_rollout=epochs,
            kl_coef=kl_div_loss_weight,
            clip_low=eps_clip,
            clip_high=eps_clip,
            value_clip=value_clip,
            entropy_coef=beta_s,
            critic="separate",
            value_bins=critic_num_pred_bins,
        )
        self._scope = _SCOPE if actor_lora else None
        critic = copy.deepcopy(palm) if critic is None else critic
        if actor_lora:
            palm.add_finetune_params(_SCOPE, actor_lora_r)
        trunk = critic.model
        self._reference = palm.model if actor_lora else copy.deepcopy(palm.model)
        self._frozen = [*palm.model.parameters()] if actor_lora else []
        self._frozen += [*trunk.parameters()] if critic_lora else []
        self.actor_critic = lora.shallow_copy_as(palm.model_for_scope(self._scope), ActorCritic)
        if critic_lora:
            critic.add_finetune_params(_CRITIC_SCOPE, critic_lora_r)
        self.actor_critic.critic = _critic(
            critic.model_for_scope(_CRITIC_SCOPE if critic_lora else None),
            _bins(critic_num_pred_bins, **(hl_gauss_loss_kwargs or {})),
        ).to(palm.model.embedding)
        self._file = OriginalActorCritic(palm, critic, self.actor_critic.critic.read)
        with _frozen(self._frozen):
            self._optimizer = Optimizer(self.actor_critic, self._settings.optim, actor_lr)

    def train(
        self,
        num_episodes: int = 50000,
        max_timesteps: int = 500,
        update_timesteps: int = 5000,
        max_batch_size: int = 16,
        max_seq_len: int = 2048,
        eos_token: int | None = None,
        temperature: float = 1.0,
    ) -> list[dict[str, float]]:
        """Trains on num_episodes * max_timesteps completions, update_timesteps in a rollout.

        A completion ends with eos_token, or when it and its prompt have max_seq_len tokens;
        max_batch_size are generated at a time. Completions that do not fill a last rollout are
        spread over all rollouts. Returns the metrics of each rollout: reward, kl, length, ended ...
        Raises DataError if a prompt leaves no room for a completion.
        """
        for number, ids in enumerate(self.prompt_token_ids):
            _room(ids, max_seq_len, f"prompt {number}")
        total = num_episodes * max_timesteps
        if min(total, update_timesteps) < 1:
            raise SettingsError("num_episodes, max_timesteps and update_timesteps: give 1 or more")
        rollouts = -(-total // update_timesteps)
        settings = replace(
            self._settings,
            prompts_per_rollout=-(-total // rollouts),
            max_new_tokens=max_seq_len,
            temperature=temperature,
            seed=draw_seed(),
        )
        stop = frozenset() if eos_token is None else frozenset({int(eos_token)})
        sampler = Sampler(
            self.actor_critic,
            self.prompt_token_ids,
            stop,
            settings,
            slots=max_batch_size,
            context=max_seq_len,
        )
        rows = min(self.minibatch_size, settings.prompts_per_rollout)
        reference = reference_log_probs(self._reference, temperature)
        loader = RolloutLoader(sampler, self._rewards, estimate, reference, rows=rows)
        each = settings.epochs_per_rollout * -(-settings.prompts_per_rollout // rows)
        steps = rollouts * each
        loop = Trainer(
            self.actor_critic, PpoObjective(settings), self._optimizer, loader, steps=steps
        )
        training, metrics = self.palm.training, []
        try:
            with _frozen(self._frozen):
                for rollout in range(rollouts):
                    for _ in range(each):
                        loop.train_step()
                    metrics.append(dict(loader.facts))
                    print(
                        f"rollout {rollout + 1}/{rollouts}: {_line(metrics[-1])}", file=sys.stderr
                    )
        finally:
            self.palm.train(training)
        return metrics

    def save(self, filepath: str | Path = "./checkpoint.pt") -> None:
        """Writes the palm, the critic and its value head as the original does.

        The file is complete or absent. Raises StorageError when the disk refuses.
        """
        self._file.save(Path(filepath))

    def load(self, filepath: str | Path = "./checkpoint.pt") -> None:
        """Loads what `save`, here or of the original, wrote of a trainer with the same arguments.

        Nothing in the file is executed. Raises CheckpointError for any other file; then nothing
        changes.
        """
        self._file.load(Path(filepath))

    def generate(
        self,
        max_seq_len: int,
        *,
        prompt: Tensor | Sequence[int],
        num_samples: int = 4,
        **how: Any,
    ) -> Tensor:
        """The prompt and the best of num_samples completions by reward, [<= max_seq_len].

        `how`: eos_token, temperature, filter_logits_fn, filter_thres as for PaLM.generate.
        """
        ids = _ids(prompt)
        room = _room(ids, max_seq_len, "prompt")
        completions = self.palm.completions(
            [ids] * num_samples, room, finetune_scope=self._scope, **how
        )
        rewards = self._score([ids] * num_samples, completions)
        best = max(range(num_samples), key=rewards.__getitem__)
        return torch.tensor([*ids, *completions[best]], device=self.palm.device)

    def _rewards(self, answers: Sequence[Completion]) -> list[float]:
        return self._score([a.prompt_ids for a in answers], [a.ids for a in answers])

    def _score(self, prompts: Sequence[Sequence[int]], answers: Sequence[list[int]]) -> list[float]:
        rewards: list[float] = []
        pad = 0 if self.reward_model.model.config.causal else -1  # a negative id is not attended to
        for i in range(0, len(answers), self.minibatch_size):
            part = list(zip(prompts, answers, strict=True))[i : i + self.minibatch_size]
            rows = [torch.tensor([*prompt, *answer]) for prompt, answer in part]
            ids = pad_sequence(rows, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(row) for row in rows])
            prompt_lengths = torch.tensor([len(prompt) for prompt, _ in part])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            rewards += self.reward_model.rewards(ids, mask, prompt_lengths)
        return rewards


def _warn(unused: dict[str, Any], merged: dict[str, tuple[float | None, float]]) -> None:
    """Warns about arguments without effect; raises TypeError for unknown ones."""
    for name, value in unused.items():
        if name not in _UNUSED:
            raise TypeError(f"RLHFTrainer() got an unexpected keyword argument {name!r}")
        default, why = _UNUSED[name]
        if value != default:
            warnings.warn(f"{name} {value!r} changes nothing: {why}", stacklevel=3)
    for name, (critics, actors) in merged.items():
        if critics not in (None, actors):
            warnings.warn(
                f"{name} {critics} changes nothing: one optimizer, with the actor's {actors:g}",
                stacklevel=3,
            )


def _texts(
    prompts: Sequence[str] | None,
    path: str | Path | None,
    tokenizer: Callable[[list[str]], Any] | None,
    ids: Tensor | Sequence[Any] | None,
) -> Tensor | Sequence[Any]:
    """The token ids that were given, or those of the texts."""
    if sum(given is not None for given in (prompts, path, ids)) != 1:
        raise SettingsError("give one of prompts, prompts_path and prompt_token_ids")
    if ids is not None:
        return ids
    if tokenizer is None:
        raise SettingsError("tokenizer: required for prompts that are text")
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path is not None else prompts
    return tokenizer([line for line in lines or () if line.strip()])


def _prompts(given: Tensor | Sequence[Any], pad: int) -> list[list[int]]:
    padded = isinstance(given, Tensor)
    prompts = [_ids(row) for row in (given.cpu() if padded else given)]
    for number, ids in enumerate(prompts):
        while padded and ids and ids[-1] == pad:
            ids.pop()
        while padded and ids and ids[0] == pad:
            ids.pop(0)
        if not ids:
            raise DataError(f"prompt {number} has no token, or only padding; remove it")
    if not prompts:
        raise DataError("there are no prompts")
    return prompts


def _ids(prompt: Tensor | Sequence[int]) -> list[int]:
    ids = torch.as_tensor(prompt)
    if ids.dim() != 1 or (ids.is_floating_point() and ids.numel()):
        raise DataError(f"a prompt must be a row of whole numbers, not {list(ids.shape)}")
    return ids.tolist()


def _room(ids: Sequence[int], longest: int, what: str) -> int:
    if len(ids) >= longest:
        raise DataError(
            f"{what} has {len(ids)} tokens, which leave no room for a completion in {longest}; "
            "raise max_seq_len or remove the prompt"
        )
    return longest - len(ids)


def _bins(count: int, min_value: float = 0.0, max_value: float = 5.0, **unused: Any) -> Bins | None:
    """Raises SettingsError for an empty range."""
    for name, value in unused.items():
        warnings.warn(f"hl_gauss_loss_kwargs: {name} {value} changes nothing", stacklevel=4)
    if not min_value < max_value:
        raise SettingsError(f"max_value {max_value}: must be above min_value ({min_value})")
    return Bins(count, min_value, max_value) if count else None


def _critic(trunk: Transformer, bins: Bins | None) -> Critic:
    """A critic with the value zero, or the middle bin, at the start."""
    critic = Critic(trunk.config, "detached", bins)
    critic.kind, critic.trunk = "separate", trunk
    nn.init.zeros_(critic.read.weight)
    nn.init.zeros_(critic.read.bias)
    return critic


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within this context the parameters are frozen."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, learns in zip(parameters, before, strict=True):
            parameter.requires_grad_(learns)


def _line(facts: dict[str, float]) -> str:
    said = f"reward {facts['reward']:.3f}, {facts['kl']:.2f} nats from the start"
    return f"{said}, {facts['length']:.0f} tokens"
