"""Samples completions of prompts from the engine, each with its own seed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from openpalm.align.config import RolloutSettings
from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.transformer import Transformer
from openpalm.parallel.gather import gather_into


class SamplingOptions(Protocol):
    """How completions are sampled; settings of RL have these fields."""

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def seed(self) -> int: ...


def sample_completions(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    draws: Iterable[tuple[int, int]],
    stop_ids: frozenset[int],
    options: SamplingOptions,
    context: int | None = None,
) -> list[Completion]:
    """One completion for each (number of a prompt, number of the draw).

    The seed depends on the draw's number alone, so a completion is the same whichever others are
    sampled with it. context: tokens that a prompt and its completion may have together.
    """
    completions: list[Completion] = []
    requests: list[Request] = []
    for prompt, draw in draws:
        ids, room = prompts[prompt], options.max_new_tokens
        if context is not None:
            room = min(room, context - len(ids))  # positions that the model has left
        sampling = Sampling(options.temperature, seed=derive_seed(options.seed, draw))
        requests.append(Request(ids, room, sampling, stop_ids))
        completions.append(Completion(prompt, ids, [], [], ended=False))
    for token in engine.generate(requests):  # tokens of all requests, interleaved
        completion = completions[token.request]
        completion.ids.append(token.id)
        completion.log_probs.append(token.log_prob)
        if token.finish == "stop":
            completions[token.request] = replace(completion, ended=True)
    return completions


class Sampler:
    """Samples completions from the current weights of a model.

    context: tokens that a prompt and its completion may have together, if that is limited.
    plain: for a sharded model, one that is not, into which its weights are gathered to generate.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        settings: RolloutSettings,
        slots: int = 64,
        context: int | None = None,
        plain: Transformer | None = None,
    ):
        self._plain = plain
        self.model, self.prompts, self.stop_ids = model, prompts, stop_ids
        self.settings = settings
        self._engine: Engine | None = None
        self._slots, self._context = slots, context
        self.drawn = 0
        """completions sampled so far; numbers the draws, so that no two have the same seed"""

    def refresh(self) -> None:
        """Copies the model's current weights into the engine.

        All processes of a sharded model must call it.
        """
        if self._plain is not None:
            gather_into(self._plain, self.model)
        source = self._plain or self.model
        # One engine for all rollouts: its key/value cache is allocated once.
        if self._engine is None:
            weights, slots = self.settings.rollout_dtype, self._slots
            self._engine = Engine(source, slots=slots, weights=weights, prefill_tokens=2048)
        else:
            self._engine.refresh(source)

    def sample(
        self,
        chosen: Sequence[int],
        each: int,
        *,
        first_draw: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> list[Completion]:
        """`each` completions of every prompt in `chosen`, ordered by prompt.

        With `first_draw` draws are numbered from there, and the run's own numbers do not change.
        share: (rank, size), to sample only every size-th prompt from number rank on; draws are
        numbered as if all were sampled.
        """
        assert self._engine is not None, "refresh first"
        prompts = [prompt for prompt in chosen for _ in range(each)]
        first = self.drawn if first_draw is None else first_draw
        if first_draw is None:
            self.drawn += len(prompts)
        draws = list(zip(prompts, range(first, first + len(prompts)), strict=True))
        rank, size = share
        draws = [draw for n, draw in enumerate(draws) if n // each % size == rank]
        return sample_completions(
            self._engine, self.prompts, draws, self.stop_ids, self.settings, self._context
        )


def derive_seed(seed: int, draw: int) -> int:
    """A different seed for every draw of a run."""
    return (seed * 0x9E3779B97F4A7C15 + draw * 0xD1B54A32D192ED03) % (1 << 63)
