"""Evaluates the policy on held-out prompts, and stops a run early when its reward is gamed.

A policy can learn to please its reward without doing what was intended. Then the reward keeps
rising while a gold reward, which is never trained on, falls, or while completions become long, far
from the reference, or all alike (Gao et al. 2023, "Scaling Laws for Reward Model
Overoptimization"). Early stopping ends the run on any of these signs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from openpalm.align.config import EarlyStoppingSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.kl import k1
from openpalm.align.rollouts.rollout import LogProbs, checked_rewards
from openpalm.align.rollouts.rollout_batch import Completion, Reward, collate_completions
from openpalm.align.rollouts.sampler import Sampler
from openpalm.base.settings import spell
from openpalm.data.batches.loader import IGNORE

Row = dict[str, Any]


@torch.no_grad()
def evaluate_policy(
    sampler: Sampler,
    prompts: Sequence[int],
    reference: LogProbs,
    reward: Reward,
    gold: Reward | None,
    rows: int = 32,
) -> tuple[Row, list[Completion]]:
    """Metrics over one completion of each prompt, and these completions.

    Every evaluation uses the same seeds, so that figures differ by the policy alone. `rows`
    completions are evaluated at a time.
    """
    sampler.refresh()
    # Training draws are numbered from zero up, so negative numbers give seeds of their own.
    completions = sampler.sample(prompts, 1, first_draw=-len(prompts))
    inputs, targets = collate_completions(completions)
    device = sampler.model.embedding.device
    how = partial(evaluate, temperature=sampler.settings.temperature)
    kl = entropy = 0.0
    for i in range(0, len(completions), rows):
        chunk = inputs[i : i + rows].to(device), targets[i : i + rows].to(device)
        now = sampler.model(how, *chunk)
        kl += k1(now.log_probs - reference(*chunk)).sum().item()
        entropy += now.entropy.sum().item()
    count = len(completions)
    row = {
        "val_reward": sum(checked_rewards(reward, completions)) / count,
        "val_kl": kl / count,
        "val_entropy": entropy / int((targets != IGNORE).sum()),
        "val_length": sum(len(completion.ids) for completion in completions) / count,
        "val_ended": sum(completion.ended for completion in completions) / count,
        "val_distinct": len({tuple(completion.ids) for completion in completions}) / count,
    }
    if gold is not None:
        row["val_gold"] = sum(checked_rewards(gold, completions)) / count
    return row, completions


def stop_reason(settings: EarlyStoppingSettings, rows: Sequence[Row]) -> str | None:
    """Why a run with these rows of evaluations must stop early; None if it may continue."""
    rows = [row for row in rows if row.get("val_reward") is not None]
    if not rows:
        return None
    now = rows[-1]
    if settings.gold_drop is not None and now.get("val_gold") is not None:
        best = max(rows, key=lambda row: row["val_gold"])
        fallen = best["val_gold"] - now["val_gold"] > settings.gold_drop
        # A gold reward that falls together with the reward is a bad run, but not a gamed one.
        if fallen and now["val_reward"] > best["val_reward"]:
            return (
                f"the reward rose from {best['val_reward']:.3g} to {now['val_reward']:.3g} while "
                f"the gold reward fell from {best['val_gold']:.3g} to {now['val_gold']:.3g}: the "
                "reward is being gamed"
            )
    limits = (
        ("max_kl", "val_kl", "nats from the reference", 1),
        ("max_length", "val_length", "tokens per completion", 1),
        ("min_entropy", "val_entropy", "nats of entropy per token", -1),
    )
    for name, column, unit, sign in limits:
        limit, value = getattr(settings, name), now[column]
        if limit is not None and sign * value > sign * limit:
            return f"{value:.3g} {unit}, beyond {spell(f'early_stopping.{name}')} {limit:g}"
    return None
