"""What ppo and grpo compose alike: prompts, rewards, a reference, and answers looked at."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from openpalm.align.config import RolloutSettings
from openpalm.errors import DataError, SettingsError

if TYPE_CHECKING:
    import torch

    from openpalm.align.rollout import LogProbs, Reward, Sampler
    from openpalm.data.prompt_files import PromptRow
    from openpalm.data.tokenizer import Tokenizer
    from openpalm.model.config import ModelConfig
    from openpalm.model.transformer import Transformer
    from openpalm.train.config import BatchShape
    from openpalm.train.objective import Objective
    from openpalm.train.run import Outcome, Probe

S = TypeVar("S", bound=RolloutSettings)
MAX_LOOKED_AT = 64
SHOWN = 4


def learn_from_answers(
    settings: S,
    objective: "Objective[Any]",
    estimate: Callable[..., Any],
    label: str,
    make_model: "Callable[[ModelConfig], Transformer] | None" = None,
    prepare: "Callable[[Transformer], None]" = lambda model: None,
) -> "Outcome":
    """Composes the run; `prepare` gets the model after its weights were filled in."""
    import dataclasses

    import torch

    from openpalm import checkpoint
    from openpalm.align.rewards import Asked, Reader, question_of, rewards_of
    from openpalm.align.rollout import RolloutLoader, Sampler
    from openpalm.cli.common import fine_tuning_start, held_out
    from openpalm.data.conversation import stop_ids
    from openpalm.data.prompt_files import read_prompts
    from openpalm.model.transformer import Transformer
    from openpalm.train.config import BatchShape
    from openpalm.train.run import Job
    from openpalm.train.run import run as run_job

    if not settings.reward:
        raise SettingsError("--reward: says what an answer is worth; give FILE.py:FUNCTION or a run")
    directory, tokenizer, start = fine_tuning_start(settings)
    given = read_prompts(settings.data)
    for reason, count in given.unused.items():
        print(f"{label}: {count} records are not used: {reason}", file=sys.stderr)
    asked, ids = fitting(given.items, tokenizer, start.config.context, settings, label)
    reader = Reader(
        tokenizer, [Asked(question_of(row.prompt), row.row) for row in asked], stop_ids(tokenizer)
    )
    words = [settings.reward] if isinstance(settings.reward, str) else settings.reward
    reward = rewards_of(words, reader)
    gold = rewards_of([settings.gold], reader, "gold") if settings.gold else None
    numbers = range(len(ids))
    trained, measured = held_out(numbers)
    looked_at = list(measured or numbers)[:MAX_LOOKED_AT]
    reference = _reference(directory, settings)
    shape = _shape(settings, max(map(len, ids)) + settings.max_new_tokens)

    def fill(model: Transformer) -> None:
        start.fill(model)
        prepare(model)

    def make_loader(shape: BatchShape, model: Transformer, dtype: torch.dtype) -> RolloutLoader:
        sampler = Sampler(model, ids[: len(trained)], reader.stop_ids, settings)
        return RolloutLoader(
            sampler, reward, estimate, reference, rows=shape.rows, dtype=dtype
        )

    job = Job(
        config=dataclasses.replace(start.config, dropout=0.0),
        fill=fill,
        make_loader=make_loader,
        sequences_per_epoch=len(trained) * settings.answers * settings.passes,
        learning_rate=start.learning_rate / 10,
        objective=objective,
        unit="answers",
        make_model=make_model or Transformer,
        shape=shape,
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent_hash=start.parent_hash,
        parent_fixed=True,
        probes=_probes(settings, reader, ids, looked_at, reference, reward, gold),
        best="val_gold" if gold else "val_reward",
        label=label,
    )
    return run_job(settings, job)
