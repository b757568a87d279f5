"""`openpalm best-of-n`: samples completions and keeps the one with the highest reward."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpalm.base.settings import check_field, parse
from openpalm.cli.model_options import ModelOptions, check_sampling
from openpalm.errors import DataError, SettingsError, count_of

if TYPE_CHECKING:
    from openpalm.align.judging.reward_sources import RewardContext
    from openpalm.align.rollouts.rollout_batch import Completion

ROWS_PER_BATCH = 64
"""Completions sampled together."""


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings(ModelOptions):
    """Model, prompts and reward of best-of-n sampling."""

    path: str
    """run, checkpoint or hub name"""
    data: Path
    """.jsonl of prompts, in the forms that grpo reads"""
    reward: list[str] | str
    """reward, one or several [WEIGHT*]SOURCE, as for grpo"""
    out: Path
    """.jsonl of prompts and best completions, for sft; rerun the command to continue it"""
    pairs: Path | None = None
    """also write a .jsonl of pairs, best and worst completion, for dpo and reward"""
    n: int = 8
    """completions per prompt"""
    max_new_tokens: int = 64
    """maximum tokens per completion"""
    temperature: float = 1.0
    """sampling temperature"""
    seed: int = 0
    """random seed"""
    json: bool = False
    """print the results as JSON"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """data type of weights and arithmetic; in float32 a completion does not depend on its batch"""

    def __post_init__(self) -> None:
        check_field(self, "n", lambda v: 1 <= v <= 4096, "1 to 4096")
        check_field(self, "max_new_tokens", lambda v: v >= 1, "1 or more")
        check_sampling(self)
        if self.pairs is not None and self.pairs in (self.out, self.data):
            raise SettingsError(f"--pairs {self.pairs}: must be another file than --out and --data")
        if self.out == self.data:
            raise SettingsError(f"--out {self.out}: must be another file than --data")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        BestOfNSettings,
        argv,
        verb="best-of-n",
        about="Samples n completions of every prompt and keeps the one with the highest reward, as "
        "demonstrations for `openpalm sft` (rejection sampling) and, with --pairs, as pairs for "
        "`openpalm dpo`. Prints the expected reward of the best of 1, 2, 4, ... completions.",
        examples=[
            "openpalm best-of-n runs/chat --data p.jsonl --reward runs/rm --out best.jsonl",
            "openpalm best-of-n runs/chat --data p.jsonl --reward exact --n 16 --out b.jsonl "
            "--json",
        ],
        positional=["path"],
    )
    from openpalm.align.judging.best_of_n import best_worst_pairs, summary
    from openpalm.base.jsonl import write_rows

    rows = best_completions(settings)
    found: dict[str, Any] = summary(rows, settings.n) | {"out": str(settings.out)}
    if settings.pairs is not None:
        found["pairs"] = write_rows(settings.pairs, best_worst_pairs(rows))
    if settings.json:
        print(json.dumps(found))
        return
    best = ", ".join(f"{value:.4g} of {n}" for n, value in found["reward_by_n"].items())
    print(f"{count_of(found['prompts'], 'prompt')}; mean reward of the best completion: {best}")
    print(f"KL from the sampling policy: at most {found['kl_bound']:.3f} nats")
    if settings.pairs is not None:
        print(f"{settings.pairs}: {count_of(found['pairs'], 'pair')}")
    print(settings.out)


def best_completions(settings: BestOfNSettings) -> list[dict[str, Any]]:
    """One row for each prompt; rows that are in --out already are kept, not sampled again."""
    from openpalm.align.config import reward_sources
    from openpalm.align.judging.best_of_n import SamplingPlan
    from openpalm.align.judging.reward_sources import RewardContext, load_reward
    from openpalm.align.rollouts.rollout import checked_rewards
    from openpalm.base.jsonl import open_jsonl
    from openpalm.base.progress_bar import ProgressBar
    from openpalm.cli.common import serving_engine
    from openpalm.cli.rl_common import usable_prompts
    from openpalm.data.rows.readers.prompts import read_prompts

    given = read_prompts(settings.data)
    engine, tokenizer = serving_engine(settings.path, settings, slots=ROWS_PER_BATCH)
    length = engine.model.config.context
    prompts, ids = usable_prompts(given, tokenizer, settings, length, "best-of-n")
    context = RewardContext.from_rows(tokenizer, prompts)
    reward = load_reward(reward_sources(settings.reward), context)
    plan = SamplingPlan(settings.n, settings.max_new_tokens, settings.temperature, settings.seed)
    fingerprint = _fingerprint(settings)
    with open_jsonl(settings.out) as file, ProgressBar("best-of-n", len(ids)) as bar:
        rows = _finished_rows(file.found, fingerprint, settings.out)
        bar.advance(len(rows))
        step = max(1, ROWS_PER_BATCH // settings.n)
        for first in range(len(rows), len(ids), step):
            chosen = range(first, min(first + step, len(ids)))
            completions = plan.sample(engine, ids, chosen, context.stop_ids)
            rewards = checked_rewards(reward, completions)
            for i, prompt in enumerate(chosen):
                group = slice(i * settings.n, (i + 1) * settings.n)
                row = {
                    "prompt": [message.to_json() for message in prompts[prompt].prompt],
                    **_best_and_worst(completions[group], rewards[group], context),
                    "drawn": fingerprint,
                }
                file.append(row)
                rows.append(row)
            bar.advance(len(chosen))
    return rows


def _best_and_worst(
    completions: "Sequence[Completion]", rewards: Sequence[float], context: "RewardContext"
) -> dict[str, Any]:
    from openpalm.align.judging.best_of_n import best_and_worst

    best, worst = best_and_worst(rewards)
    return {
        "completion": context.text(completions[best]),
        "worst": context.text(completions[worst]),
        "rewards": list(rewards),
    }


def _fingerprint(settings: BestOfNSettings) -> str:
    """Hash of model, data, reward and sampling, to recognise the rows of the same command."""
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.checkpoint.manifest import read_manifest
    from openpalm.cli.common import weights_path

    hashed = {name: str(value) for name, value in asdict(settings).items()}
    for name in ("path", "out", "pairs", "json", "device", "force"):
        del hashed[name]
    hashed["data"] = hashlib.sha256(settings.data.read_bytes()).hexdigest()
    directory = checkpoint.resolve(weights_path(settings.path))
    hashed["model"] = read_manifest(directory)["sha256"]
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def _finished_rows(
    found: list[dict[str, Any]], fingerprint: str, out: Path
) -> list[dict[str, Any]]:
    """The rows in --out. Raises DataError where another command wrote them."""
    if any(row.get("drawn") != fingerprint for row in found):
        raise DataError(
            f"--out {out}: has rows of another model, data, reward or settings; choose a new file"
        )
    return list(found)
