"""Rollouts as training data: prompts, engine and reward become batches, in a loader like any other.

For each rollout the engine takes the current weights and samples completions of the next prompts.
The reward scores them, and policy and reference evaluate them once (old log-probabilities, values).
Several optimizer steps then learn from the rollout. Works on token ids; text is up to the reward.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openpalm.align.config import GrpoSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.advantages import explained_variance, zero_variance
from openpalm.align.rollouts.disk_rollout import spill
from openpalm.align.rollouts.kl import adapted_coefficient, completion_kl
from openpalm.align.rollouts.rollout_batch import (
    AdvantageEstimate,
    Completion,
    Reward,
    Rollout,
    RolloutBatch,
    collate_completions,
)
from openpalm.align.rollouts.sampler import Sampler, derive_seed
from openpalm.data.batches.loader import IGNORE, Loader
from openpalm.data.batches.order import shuffle
from openpalm.errors import RewardError, WorkError, count_of
from openpalm.model import lora
from openpalm.model.critic import ActorCritic
from openpalm.model.sharding import chunk_span
from openpalm.model.transformer import Transformer
from openpalm.parallel.world import World

LogProbs = Callable[[Tensor, Tensor], Tensor]
"""A reference policy: (inputs, targets) to log-probabilities [rows, time], without a gradient."""


def reference_log_probs(
    model: Transformer, temperature: float, *, below_adapter: bool = False
) -> LogProbs:
    """`model` as a reference at that temperature; `below_adapter` switches its adapter off."""

    @torch.no_grad()
    def log_probs(inputs: Tensor, targets: Tensor) -> Tensor:
        with lora.detached(model) if below_adapter else nullcontext():
            how = partial(evaluate, temperature=temperature)
            return model(how, inputs, targets).log_probs

    return log_probs


class RolloutLoader:
    """Microbatches of `rows` completions; `facts` are the metrics of their rollout.

    estimate: (settings, rollout, KL coefficient) to advantages and returns.
    reference: None if the KL penalty is off; then no reference is evaluated.
    dtype: of the training steps' arithmetic.
    world: the run's processes. Each samples, scores and evaluates a share of the completions; then
    all of them have the whole rollout, so that advantages and metrics are those of one process.
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward,
        estimate: Callable[[Any, Rollout, float], AdvantageEstimate],
        reference: LogProbs | None,
        *,
        rows: int,
        dtype: torch.dtype = torch.float32,
        world: World | None = None,
    ):
        self.world = world or World()
        self.sampler, self.reward, self.estimate = sampler, reward, estimate
        self.reference, self.dtype, self.rows = reference, dtype, rows
        self.settings = settings = sampler.settings
        self.kl_coef = settings.kl_coef
        self.facts: dict[str, float] = {}
        identity = {"kind": "rollouts", "seed": settings.seed, "prompts": len(sampler.prompts)}
        order = shuffle(len(sampler.prompts), settings.seed)
        # Items are prompt numbers, so a step's batch is a plain list of them.
        self._prompts = Loader(order, list, identity, rows=settings.prompts_per_rollout)
        self._rollouts = 0
        self._microbatches: list[Tensor] = []
        """row numbers of each of this process's microbatches that is still to come"""
        self._rollout: RolloutBatch | None = None

    def __next__(self) -> RolloutBatch:
        if not self._microbatches:
            self._collect()
        assert self._rollout is not None
        # Rows are copied only now, because the stored rollout may be a file.
        batch = self._rollout.take(self._microbatches.pop(0))
        completions = self.settings.num_completions
        return batch.with_shared_prompts(completions) if self._whole_groups else batch

    @property
    def _group(self) -> int:
        """Completions that stay neighbours: a prompt's, unless a critic reads each of them alone.

        Not a matter of the microbatch: a run resumed on other processes has to repeat the order.
        """
        alone = isinstance(self.sampler.model, ActorCritic)
        return 1 if alone else self.settings.num_completions

    @property
    def _whole_groups(self) -> bool:
        """Whether a microbatch has all completions of its prompts, which can then share a row."""
        return self._group > 1 and self.rows % self._group == 0

    @property
    def _precisions_differ(self) -> bool:
        """Whether the engine and the training steps round differently."""
        return self.settings.rollout_dtype != "float32" or self.dtype != torch.float32

    @property
    def _sampler_is_exact(self) -> bool:
        """Whether the engine's log-probabilities are the policy's, so that no evaluation is needed.

        The engine reports them before temperature, and has no critic.
        """
        critic = isinstance(self.sampler.model, ActorCritic)
        return not (self._precisions_differ or critic) and self.settings.temperature == 1

    @torch.no_grad()
    def _collect(self) -> None:
        """Samples and evaluates the next rollout, and shuffles its rows into microbatches."""
        # On-policy: the engine samples with the weights as the last step left them.
        self.sampler.refresh()
        before = self._prompts.state_dict(), self.sampler.drawn
        try:
            completions, rewards = self._sample_and_reward()
        except WorkError:
            # Back to before the rollout: a checkpoint saved now resumes with the same prompts and
            # seeds, so a corrected reward scores the same completions.
            self._prompts.load_state_dict(before[0])
            self.sampler.drawn = before[1]
            raise
        rollout = self._evaluate(completions, rewards)
        # Once per rollout, before the first step: every epoch then uses the same advantages.
        estimate = self.estimate(self.settings, rollout, self.kl_coef)
        self._store(rollout.with_estimate(estimate).columns)
        self.facts = self._metrics(completions, rollout, estimate.returns)
        # After the metrics, which report the coefficient that this rollout was penalised with.
        self.kl_coef = adapted_coefficient(
            self.kl_coef, self.facts.get("kl", 0.0), len(completions), self.settings
        )
        self._rollouts += 1
        self._microbatches = self._shuffled_rows()

    def _sample_and_reward(self) -> tuple[list[Completion], list[float]]:
        """Completions of the next prompts; prompts with equal rewards are replaced (DAPO).

        Completions with equal rewards have advantage zero, so they would make the batch smaller.
        """
        each, settings = self.settings.num_completions, self.settings
        completions, rewards = self._sampled_and_scored(next(self._prompts), each)
        limit = settings.resample_limit if isinstance(settings, GrpoSettings) else 0
        for _ in range(limit):
            equal = zero_variance(torch.tensor(rewards), each).nonzero().flatten().tolist()
            if not equal:
                break
            # A whole step's prompts are taken each time, so that the cursor stays at a step.
            chosen = next(self._prompts)[: len(equal)]
            # Only the new completions are scored: a reward may cost more than sampling.
            new, scores = self._sampled_and_scored(chosen, each)
            for group, place in enumerate(equal):
                old, now = (slice(n * each, (n + 1) * each) for n in (place, group))
                completions[old], rewards[old] = new[now], scores[now]
        return completions, rewards

    def _sampled_and_scored(
        self, chosen: Sequence[int], each: int
    ) -> tuple[list[Completion], list[float]]:
        """`each` completions of the prompts and their rewards; each process makes its share."""
        rank, size = self.world.rank, self.world.size

        def own() -> list[tuple[list[Completion], list[float]]]:
            found = self.sampler.sample(chosen, each, share=(rank, size))
            rewards = checked_rewards(self.reward, found)
            starts = range(0, len(found), each)
            return [(found[n : n + each], rewards[n : n + each]) for n in starts]

        # Together: a reward that fails on one process must not leave the others waiting.
        shares = self.world.gather(self.world.together(own))
        groups = [shares[n % size][n // size] for n in range(len(chosen))]
        return [c for group, _ in groups for c in group], [r for _, rs in groups for r in rs]

    def _evaluate(self, completions: Sequence[Completion], rewards: Sequence[float]) -> Rollout:
        """The rollout's tensors: log-probabilities of policy and reference, weights, values."""
        inputs, targets = collate_completions(completions)
        mask = targets != IGNORE
        sampled = torch.zeros(mask.shape)
        # A mask is filled row by row, in the order of the completions and their tokens.
        sampled[mask] = torch.tensor([p for c in completions for p in c.log_probs])
        device = self.sampler.model.embedding.device
        # A microbatch at a time, so that evaluation fits wherever a training step fits.
        chunks = [
            (inputs[rows].to(device), targets[rows].to(device)) for rows in self._own_chunks(inputs)
        ]
        old, values, weights = sampled, torch.zeros_like(sampled), torch.ones_like(sampled)
        # In the training steps' precision: rounding must not look like a change of the policy.
        with torch.autocast(device.type, self.dtype, self.dtype != torch.float32):
            if not self._sampler_is_exact:
                found = zip(*(self._policy(*chunk) for chunk in chunks), strict=True)
                old, values = (self._of_all(list(tensors), len(inputs)) for tensors in found)
            reference = old  # a difference of zero, so no penalty
            if self.reference is not None:
                evaluated = [self.reference(*chunk) for chunk in chunks]
                reference = self._of_all(evaluated, len(inputs))
        # At another temperature the engine's log-probabilities are not those it sampled by.
        if self._precisions_differ and self.settings.temperature == 1:
            ratio = (old[mask] - sampled[mask]).exp()
            # Truncated: without a limit one improbable token could dominate a batch.
            weights[mask] = ratio.clamp_max(self.settings.max_importance_weight)
        return Rollout(inputs, targets, old, reference, weights, values, torch.tensor(rewards))

    def _own_chunks(self, inputs: Tensor) -> list[slice]:
        """The rows that this process evaluates, a microbatch each.

        All processes have equally many chunks, because a sharded model computes on all of them.
        """
        first, own = self._own_rows(len(inputs))
        most = -(-len(inputs) // self.world.data_size)
        starts = range(first, first + most, self.rows)
        ends = (min(start + self.rows, first + own) for start in starts)
        # Where no rows are left, the first one is evaluated and its result is not used.
        return [slice(*((s, e) if e > s else (0, 1))) for s, e in zip(starts, ends, strict=True)]

    def _of_all(self, evaluated: list[Tensor], rows: int) -> Tensor:
        """[rows, time] from what each process evaluated of its chunks."""
        evaluations = torch.cat(evaluated).cpu()
        if self.world.data_size == 1:
            return evaluations
        _, own = self._own_rows(rows)
        # Tensor- and context-parallel processes have equal shares: the dict keeps one of each.
        shares = self.world.gather((self.world.data_rank, evaluations[:own]))
        return torch.cat(list(dict(shares).values()))

    def _own_rows(self, rows: int) -> tuple[int, int]:
        """The first of the rows that this process evaluates, and their number."""
        return chunk_span(rows, self.world.data_size, self.world.data_rank)

    def _policy(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the policy and values of its critic, [rows, time]."""
        model = self.sampler.model
        now = model(partial(evaluate, temperature=self.settings.temperature), inputs, targets)
        values = torch.zeros_like(now.log_probs)
        if now.values is not None:
            assert isinstance(model, ActorCritic)
            # A critic with bins returns logits; its value is the expected bin.
            values[targets != IGNORE] = model.as_value(now.values)
        return now.log_probs, values

    def _shuffled_rows(self) -> list[Tensor]:
        """Row numbers of this process's microbatches: of all processes together every row once an
        epoch, groups kept together.

        The seed is a function of the rollout's number, so that resuming repeats the same order.
        """
        settings = self.settings
        rows = torch.arange(settings.prompts_per_rollout * settings.num_completions)
        groups = rows.view(-1, self._group)  # completions of one prompt are neighbours
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, -self._rollouts))
        epochs = [
            groups[torch.randperm(len(groups), generator=generator)].flatten()
            for _ in range(settings.epochs_per_rollout)
        ]
        own = slice(self.world.data_rank * self.rows, (self.world.data_rank + 1) * self.rows)
        return [rows[own] for epoch in epochs for rows in epoch.split(self._rows_of_all)]

    @property
    def _rows_of_all(self) -> int:
        """Rows of a microbatch, of all processes."""
        return self.rows * self.world.data_size

    def _metrics(
        self, completions: Sequence[Completion], rollout: Rollout, returns: Tensor
    ) -> dict[str, float]:
        lengths = torch.tensor([float(len(completion.ids)) for completion in completions])
        metrics = {
            "reward": rollout.rewards.mean().item(),
            "reward_std": rollout.rewards.std(correction=0).item(),
            "length": lengths.mean().item(),
            "ended": sum(completion.ended for completion in completions) / len(completions),
        }
        if self.reference:
            # The mean of k1 over the old policy's samples is an unbiased estimate of its KL.
            kl = completion_kl(rollout.old_log_probs, rollout.reference_log_probs)
            metrics["kl"] = kl.mean().item()
            metrics["kl_coef"] = self.kl_coef
        if self.settings.num_completions > 1:
            equal = zero_variance(rollout.rewards, self.settings.num_completions)
            metrics["zero_variance_groups"] = equal.float().mean().item()
        if isinstance(self.sampler.model, ActorCritic):
            metrics["explained_variance"] = explained_variance(
                rollout.values, returns, rollout.mask
            )
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The position in prompts and rollout, ready for JSON; `state_tensors` has the rollout."""
        return {
            "order": self._prompts.state_dict(),
            "rollouts": self._rollouts,
            "rows_left": len(self._microbatches) * self._rows_of_all,
            "drawn": self.sampler.drawn,
            "beta": self.kl_coef,
            "facts": self.facts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from `state_dict`; call `load_state_tensors` too.

        Raises KeyError or ValueError for a state that no `state_dict` returned.
        """
        if "left" in state:  # of an earlier version, which counted microbatches
            state = state | {"rows_left": state["left"] * self.rows}
        for name, kinds in _STATE.items():
            if type(state[name]) not in kinds:
                raise ValueError(f"{name} is {state[name]!r:.40}")
        if min(state["rollouts"], state["rows_left"]) < 0:
            raise ValueError(f"{state['rows_left']} rows left of {state['rollouts']} rollouts")
        self._prompts.load_state_dict(state["order"])
        self._rollouts, self.kl_coef = state["rollouts"], state["beta"]
        self.sampler.drawn, self.facts = state["drawn"], state["facts"]
        # The rows' order is computed from the rollout's number; only its length is stored.
        left = state["rows_left"] // self._rows_of_all
        self._microbatches = self._shuffled_rows()[-left:] if left else []

    def state_tensors(self) -> dict[str, Tensor]:
        """The current rollout; empty if nothing is left to learn from it."""
        if not self._microbatches or self._rollout is None:
            return {}
        return {_STORED_AS.get(name, name): t for name, t in self._rollout.columns.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._rollout = None
        if tensors:
            self._store({_READ_AS.get(name, name): t for name, t in tensors.items()})

    def _store(self, columns: dict[str, Tensor]) -> None:
        self._rollout = None  # frees the last rollout, memory or file, before another is written
        settings = self.settings
        self._rollout = RolloutBatch(**spill(columns, settings.rollout_memory_bytes, settings.out))


_STORED_AS = {
    "old_log_probs": "old",
    "reference_log_probs": "reference",
    "importance_weights": "correction",
}
"""Names of tensors in checkpoint files, where they differ; earlier versions wrote these."""
_READ_AS = {stored: name for name, stored in _STORED_AS.items()}

_STATE = {
    "rollouts": (int,),
    "rows_left": (int,),
    "drawn": (int,),
    "beta": (int, float),
    "facts": (dict,),
}
"""Types of the values in a loader's state, apart from its order."""


def checked_rewards(reward: Reward, completions: Sequence[Completion]) -> list[float]:
    """The rewards. Raises WorkError for a wrong number of them, RewardError for one not finite."""
    rewards = [float(value) for value in reward(completions)]
    if len(rewards) != len(completions):
        raise WorkError(
            f"the reward returned {count_of(len(rewards), 'number')} for "
            f"{count_of(len(completions), 'completion')}"
        )
    for completion, value in zip(completions, rewards, strict=True):
        if not math.isfinite(value):
            raise RewardError(
                f"the reward of a completion of prompt {completion.prompt} is {value}; it must be "
                "a finite number: correct the reward and run the command again, which continues"
            )
    return rewards
