"""Prompts, engine and reward become batches of experience: a loader like any other.

A rollout asks the engine, which takes the live weights first, for answers to the next prompts, has
them rewarded, and looks at them once with the policy as it is (old log-probabilities, values) and
with the reference. Then its answers are gone through in minibatches. Works on token ids; text is
the reward's business.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from openpalm.align.config import GrpoSettings, RolloutSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.advantages import explained_variance, zero_variance
from openpalm.align.rollouts.replay import kept
from openpalm.align.rollouts.rollout_batch import (
    Answer,
    Estimated,
    Experience,
    Reward,
    Rollout,
    batch_of,
)
from openpalm.data.batches.loader import IGNORE, Loader
from openpalm.data.batches.order import shuffle
from openpalm.errors import RewardError, WorkError, count_of
from openpalm.generate.engine import Engine, Request
from openpalm.generate.sampling import Sampling
from openpalm.model import lora
from openpalm.model.critic import ActorCritic
from openpalm.model.transformer import Transformer

LogProbs = Callable[[Tensor, Tensor], Tensor]
"""A reference: log-probabilities [rows, time] of inputs and targets, without a gradient."""


def reference_log_probs(
    model: Transformer, temperature: float, *, below_adapter: bool = False
) -> LogProbs:
    """What `model` thinks at that temperature, or the model below its adapter."""

    @torch.no_grad()
    def log_probs(inputs: Tensor, targets: Tensor) -> Tensor:
        with lora.detached(model) if below_adapter else nullcontext():
            return evaluate(model, inputs, targets, temperature=temperature).log_probs

    return log_probs


class Sampler:
    """Answers of the live weights, each drawn with a seed of its own.

    context: tokens that a prompt and its answer may have together, where that is bounded.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        settings: RolloutSettings,
        slots: int = 64,
        context: int | None = None,
    ):
        self.model, self.prompts, self.stop_ids = model, prompts, stop_ids
        self.settings = settings
        self._engine: Engine | None = None
        self._slots, self._context = slots, context
        self.drawn = 0

    def refresh(self) -> None:
        """Takes the weights as they are now."""
        if self._engine is None:
            weights, slots = self.settings.rollout_weights, self._slots
            self._engine = Engine(self.model, slots=slots, weights=weights, prefill_tokens=2048)
        else:
            self._engine.refresh(self.model)

    def answers(self, chosen: Sequence[int], each: int) -> list[Answer]:
        """`each` answers to every prompt of `chosen`, prompt by prompt."""
        assert self._engine is not None, "refresh first"
        asked, requests = [prompt for prompt in chosen for _ in range(each)], []
        for prompt in asked:
            how = Sampling(self.settings.temperature, seed=seed_of(self.settings.seed, self.drawn))
            self.drawn += 1
            ids, room = self.prompts[prompt], self.settings.max_new_tokens
            if self._context is not None:
                room = min(room, self._context - len(ids))
            requests.append(Request(ids, room, how, self.stop_ids))
        return answers_of(self._engine, requests, asked)


def answers_of(engine: Engine, requests: Sequence[Request], asked: Sequence[int]) -> list[Answer]:
    """What the engine says to each request, which is about prompt `asked` of the same place."""
    made = [
        Answer(prompt, request.ids, [], [], ended=False)
        for prompt, request in zip(asked, requests, strict=True)
    ]
    for token in engine.generate(requests):
        answer = made[token.request]
        answer.ids.append(token.id)
        answer.log_probs.append(token.log_prob)
        if token.finish == "stop":
            made[token.request] = replace(answer, ended=True)
    return made


class RolloutLoader:
    """Microbatches of `rows` answers; `facts` are about the rollout they are of.

    estimate: advantages and returns of a rollout, at the present beta. reference: None where
    leaving it costs nothing, so that nobody looks.
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward,
        estimate: Callable[[Any, Rollout, float], Estimated],
        reference: LogProbs | None,
        *,
        rows: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.sampler, self.reward, self.estimate = sampler, reward, estimate
        self.reference, self.dtype, self.rows = reference, dtype, rows
        self.settings = settings = sampler.settings
        self.beta = settings.beta
        self.facts: dict[str, float] = {}
        identity = {"kind": "rollouts", "seed": settings.seed, "prompts": len(sampler.prompts)}
        order = shuffle(len(sampler.prompts), settings.seed)
        self._order = Loader(order, list, identity, rows=settings.prompts)
        self._rollouts = 0
        self._queue: list[Tensor] = []
        self._memory: Experience | None = None

    def __next__(self) -> Experience:
        if not self._queue:
            self._roll_out()
        assert self._memory is not None
        batch = self._memory.take(self._queue.pop(0))
        return batch.sharing(self.settings.answers) if self._in_groups else batch

    @property
    def _in_groups(self) -> bool:
        """Whether microbatches hold all answers to a prompt, so that these can share its row."""
        whole = self.settings.answers > 1 and self.rows % self.settings.answers == 0
        return whole and not isinstance(self.sampler.model, ActorCritic)

    @property
    def _sampler_is_policy(self) -> bool:
        """Whether the engine's log-probabilities are the policy's, up to float32's rounding."""
        valued = isinstance(self.sampler.model, ActorCritic)
        return not (self._fewer_bits or valued) and self.settings.temperature == 1

    @property
    def _fewer_bits(self) -> bool:
        """Whether sampler or trainer rounds more than the other."""
        return self.settings.rollout_weights != "float32" or self.dtype != torch.float32

    @torch.no_grad()
    def _roll_out(self) -> None:
        self.sampler.refresh()
        order, drawn = self._order.state_dict(), self.sampler.drawn
        try:
            answers, rewards = self._rewarded()
        except WorkError:  # as if it had not begun, so that the run can be saved
            self._order.load_state_dict(order)
            self.sampler.drawn = drawn
            raise
        rollout = self._looked_at(answers, rewards)
        advantages, returns = self.estimate(self.settings, rollout, self.beta)
        columns = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name != "rewards"}
        self._remember(columns | {"advantages": advantages, "returns": returns})
        self.facts = self._told(answers, rollout, returns)
        self._steer(self.facts.get("kl", 0.0), len(answers))
        self._rollouts += 1
        self._queue = self._minibatches()

    def _rewarded(self) -> tuple[list[Answer], list[float]]:
        """Answers to the next prompts; groups of equal rewards drawn anew while that is allowed."""
        each, settings = self.settings.answers, self.settings
        answers = self.sampler.answers(next(self._order), each)
        rewards = checked(self.reward, answers)
        redraws = settings.most_redraws if isinstance(settings, GrpoSettings) else 0
        for _ in range(redraws):
            equal = zero_variance(torch.tensor(rewards), each).nonzero().flatten().tolist()
            if not equal:
                break
            anew = self.sampler.answers(next(self._order)[: len(equal)], each)
            for group, at in enumerate(equal):
                spot, found = at * each, anew[group * each : (group + 1) * each]
                answers[spot : spot + each] = found
                rewards[spot : spot + each] = checked(self.reward, found)
        return answers, rewards

    def _looked_at(self, answers: Sequence[Answer], rewards: Sequence[float]) -> Rollout:
        inputs, targets = batch_of(answers)
        mask = targets != IGNORE
        sampled = torch.zeros(mask.shape)
        sampled[mask] = torch.tensor([p for answer in answers for p in answer.log_probs])
        device = self.sampler.model.embedding.device
        parts = [
            (inputs[i : i + self.rows].to(device), targets[i : i + self.rows].to(device))
            for i in range(0, len(inputs), self.rows)
        ]
        old, values, correction = sampled, torch.zeros_like(sampled), torch.ones_like(sampled)
        with torch.autocast(device.type, self.dtype, self.dtype != torch.float32):
            if not self._sampler_is_policy:
                looks = zip(*(self._look(*part) for part in parts), strict=True)
                old, values = (torch.cat(look).cpu() for look in looks)
            reference = old
            if self.reference is not None:
                reference = torch.cat([self.reference(*part) for part in parts]).cpu()
        if self._fewer_bits and self.settings.temperature == 1:  # elsewhere it tells another pi
            ratio = (old[mask] - sampled[mask]).exp()
            correction[mask] = ratio.clamp_max(self.settings.max_correction)
        return Rollout(inputs, targets, old, reference, correction, values, torch.tensor(rewards))

    def _look(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's log-probabilities and the critic's values, [rows, time]."""
        model = self.sampler.model
        now = evaluate(model, inputs, targets, temperature=self.settings.temperature)
        values = torch.zeros_like(now.log_probs)
        if now.values is not None:
            assert isinstance(model, ActorCritic)
            values[targets != IGNORE] = model.as_value(now.values)
        return now.log_probs, values

    def _minibatches(self) -> list[Tensor]:
        """Row numbers of each microbatch to come, every row once a pass."""
        whole = self.settings.answers if self._in_groups else 1
        rows = torch.arange(self.settings.prompts * self.settings.answers).view(-1, whole)
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, -self._rollouts))
        passes = [
            rows[torch.randperm(len(rows), generator=generator)].flatten()
            for _ in range(self.settings.passes)
        ]
        return [part for order in passes for part in order.split(self.rows)]

    def _told(
        self, answers: Sequence[Answer], rollout: Rollout, returns: Tensor
    ) -> dict[str, float]:
        lengths = torch.tensor([float(len(answer.ids)) for answer in answers])
        equal = zero_variance(rollout.rewards, self.settings.answers)
        facts = {
            "reward": rollout.rewards.mean().item(),
            "reward_std": rollout.rewards.std(correction=0).item(),
            "length": lengths.mean().item(),
            "ended": sum(answer.ended for answer in answers) / len(answers),
        }
        if self.reference:
            facts["kl"] = (rollout.old - rollout.reference).sum(dim=-1).mean().item()
            facts["beta"] = self.beta
        if self.settings.answers > 1:
            facts["equal_groups"] = equal.float().mean().item()
        if isinstance(self.sampler.model, ActorCritic):
            facts["explained"] = explained_variance(rollout.values, returns, rollout.mask)
        return facts

    def _steer(self, kl: float, answers: int) -> None:
        """Moves beta towards the KL that is wanted (Ziegler et al. 2019, section 2.2)."""
        if self.settings.target_kl is not None:
            error = min(0.2, max(-0.2, kl / self.settings.target_kl - 1))
            self.beta *= 1 + error * answers / self.settings.kl_horizon

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, ready for JSON; the rollout that is gone through is in the tensors."""
        return {
            "order": self._order.state_dict(),
            "rollouts": self._rollouts,
            "left": len(self._queue),
            "drawn": self.sampler.drawn,
            "beta": self.beta,
            "facts": self.facts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor; `load_state_tensors` besides.

        Raises KeyError or ValueError for what no `state_dict` gave.
        """
        for name, kinds in _STATE.items():
            if type(state[name]) not in kinds:
                raise ValueError(f"{name} is {state[name]!r:.40}")
        if min(state["rollouts"], state["left"]) < 0:
            raise ValueError(f"{state['left']} minibatches left of {state['rollouts']} rollouts")
        self._order.load_state_dict(state["order"])
        self._rollouts, self.beta = state["rollouts"], state["beta"]
        self.sampler.drawn, self.facts = state["drawn"], state["facts"]
        left = state["left"]
        self._queue = self._minibatches()[-left:] if left else []

    def state_tensors(self) -> dict[str, Tensor]:
        """The answers that are still to be gone through."""
        if not self._queue or self._memory is None:
            return {}
        return self._memory.columns

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._memory = None
        if tensors:
            self._remember(tensors)

    def _remember(self, columns: dict[str, Tensor]) -> None:
        self._memory = None  # the last rollout's file goes before another is written
        settings = self.settings
        self._memory = Experience(**kept(columns, settings.replay_bytes, settings.out))


_STATE = {
    "rollouts": (int,),
    "left": (int,),
    "drawn": (int,),
    "beta": (int, float),
    "facts": (dict,),
}
"""What a loader's state holds beside its order."""


def checked(reward: Reward, answers: Sequence[Answer]) -> list[float]:
    """The rewards. Raises RewardError for one that is not finite, or not one for each answer."""
    rewards = [float(value) for value in reward(answers)]
    if len(rewards) != len(answers):
        raise WorkError(
            f"the reward gave {count_of(len(rewards), 'number')} for "
            f"{count_of(len(answers), 'answer')}"
        )
    for answer, value in zip(answers, rewards, strict=True):
        if not math.isfinite(value):
            raise RewardError(
                f"the reward of an answer to prompt {answer.prompt} is {value}; it must be a "
                "finite number: correct the reward and give the same command, which goes on"
            )
    return rewards


def seed_of(seed: int, draw: int) -> int:
    """A seed of its own for every answer ever drawn in a run."""
    return (seed * 0x9E3779B97F4A7C15 + draw * 0xD1B54A32D192ED03) % (1 << 63)
