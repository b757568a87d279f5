"""What an RL run is judged by on the way: held-out answers, and the alarm they can raise.

A policy that has found how to please its reward without doing what was meant shows it here: the
reward climbs on while a gold reward, which is never trained on, falls, or while answers grow long,
or far from the reference, or all alike (Gao et al. 2023, "Scaling laws for reward model
overoptimization").
"""

from collections.abc import Sequence
from typing import Any

import torch

from openpalm.align.config import EarlyStoppingSettings
from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.rollout import LogProbs, Sampler, checked_rewards
from openpalm.align.rollouts.rollout_batch import Completion, Reward, collate_completions
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
    """One answer to each prompt, always with the same seeds: means over them, and the answers."""
    drawn, sampler.drawn = sampler.drawn, -len(prompts)  # seeds that no training answer has
    sampler.refresh()
    answers = sampler.sample(prompts, 1)
    sampler.drawn = drawn
    inputs, targets = collate_completions(answers)
    device = sampler.model.embedding.device
    kl = entropy = 0.0
    for i in range(0, len(answers), rows):
        part = inputs[i : i + rows].to(device), targets[i : i + rows].to(device)
        now = evaluate(sampler.model, *part, temperature=sampler.settings.temperature)
        kl += (now.log_probs - reference(*part)).sum().item()
        entropy += now.entropy.sum().item()
    count = len(answers)
    row = {
        "val_reward": sum(checked_rewards(reward, answers)) / count,
        "val_kl": kl / count,
        "val_entropy": entropy / int((targets != IGNORE).sum()),
        "val_length": sum(len(answer.ids) for answer in answers) / count,
        "val_ended": sum(answer.ended for answer in answers) / count,
        "val_distinct": len({tuple(answer.ids) for answer in answers}) / count,
    }
    if gold is not None:
        row["val_gold"] = sum(checked_rewards(gold, answers)) / count
    return row, answers


def stop_reason(settings: EarlyStoppingSettings, rows: Sequence[Row]) -> str | None:
    """Why a run with these rows of evaluations must stop, or None."""
    rows = [row for row in rows if row.get("val_reward") is not None]
    if not rows:
        return None
    now = rows[-1]
    if settings.gold_drop is not None and now.get("val_gold") is not None:
        best = max(rows, key=lambda row: row["val_gold"])
        fallen = best["val_gold"] - now["val_gold"] > settings.gold_drop
        if fallen and now["val_reward"] > best["val_reward"]:
            return (
                f"the reward rose from {best['val_reward']:.3g} to {now['val_reward']:.3g} while "
                f"the gold reward fell from {best['val_gold']:.3g} to {now['val_gold']:.3g}: the "
                "reward is being gamed"
            )
    bands = (
        ("max_kl", "val_kl", "nats from the reference", 1),
        ("max_length", "val_length", "tokens an answer", 1),
        ("min_entropy", "val_entropy", "nats of entropy a token", -1),
    )
    for name, column, what, sign in bands:
        limit, value = getattr(settings, name), now[column]
        if limit is not None and sign * value > sign * limit:
            return f"{value:.3g} {what}, beyond --early-stopping.{name.replace('_', '-')} {limit:g}"
    return None
