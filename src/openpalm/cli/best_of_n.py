"""`openpalm best-of-n`: prompts and a reward in, each prompt's best answer out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpalm.align.config import reward_sources
from openpalm.base.settings import parse
from openpalm.errors import DataError, SettingsError, count_of

if TYPE_CHECKING:
    from openpalm.align.judging.rewards import Reader
    from openpalm.align.rollouts.rollout_batch import Answer

ANSWERS_AT_A_TIME = 64


@dataclass(frozen=True)
class BestOfNSettings:
    """Which model answers what, and who says which answer is best."""

    path: str
    """run, checkpoint or hub name"""
    data: Path
    """a .jsonl of prompts, as grpo takes it"""
    reward: list[str] | str
    """[WEIGHT*]SOURCE, several in brackets: as grpo takes it"""
    out: Path
    """a .jsonl of prompt and completion, which sft takes; the same command goes on with it"""
    pairs: Path | None = None
    """write a .jsonl of best against worst besides, which dpo and reward take"""
    n: int = 8
    """answers to each prompt"""
    max_new_tokens: int = 64
    """tokens of an answer at most"""
    temperature: float = 1.0
    """of the draws"""
    seed: int = 0
    """of the draws"""
    json: bool = False
    """print the figures as JSON"""
    tokenizer: Path | None = None
    """tokenizer.json for a checkpoint that has none"""
    adapter: Path | None = None
    """low-rank adapter for the model: PEFT's layout, or a run or checkpoint that has one"""
    force: bool = False
    """use a tokenizer or an adapter that does not belong to this checkpoint"""
    verify: bool = False
    """compare every file of the checkpoint with its manifest, the optimizer's state too"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """of weights and arithmetic; in float32 an answer does not depend on the others"""
    quantize: Literal["int8", "int4"] | None = None
    """keep the matrices in fewer bits: faster, a little worse"""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 4096:
            raise SettingsError(f"--n {self.n}: must be 1 to 4096")
        if self.max_new_tokens < 1:
            raise SettingsError(f"--max-new-tokens {self.max_new_tokens}: must be 1 or more")
        if not 0 < self.temperature <= 100:
            raise SettingsError(f"--temperature {self.temperature}: must be in (0, 100]")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingsError(f"--seed {self.seed}: must be a 64-bit whole number")
        if self.pairs is not None and self.pairs in (self.out, self.data):
            raise SettingsError(f"--pairs {self.pairs}: must be another file than --out and --data")
        if self.out == self.data:
            raise SettingsError(f"--out {self.out}: must be another file than --data")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        BestOfNSettings,
        argv,
        verb="best-of-n",
        about="Draws n answers to every prompt and keeps the one that the reward likes most: "
        "demonstrations for `openpalm sft` (rejection sampling) and, with --pairs, best against "
        "worst for `openpalm dpo`. Says what the mean and the best answer earn.",
        examples=[
            "openpalm best-of-n runs/chat --data p.jsonl --reward runs/rm --out best.jsonl",
            "openpalm best-of-n runs/chat --data p.jsonl --reward exact --n 16 --out b.jsonl "
            "--json",
        ],
        positional=["path"],
    )
    from openpalm.align.judging.best_of_n import pairs, summary
    from openpalm.base.jsonl import write_rows

    rows = best_answers(settings)
    told: dict[str, Any] = summary(rows, settings.n) | {"out": str(settings.out)}
    if settings.pairs is not None:
        told["pairs"] = write_rows(settings.pairs, pairs(rows))
    if settings.json:
        print(json.dumps(told))
        return
    best = ", ".join(f"{value:.4g} of {n}" for n, value in told["reward_by_n"].items())
    print(f"{count_of(told['prompts'], 'prompt')}; mean reward of the best answer: {best}")
    print(f"at most {told['kl_bound']:.3f} nats from the policy that drew them")
    if settings.pairs is not None:
        print(f"{settings.pairs}: {count_of(told['pairs'], 'pair')}")
    print(settings.out)


def best_answers(settings: BestOfNSettings) -> list[dict[str, Any]]:
    """A row of every prompt, those that were in --out before not drawn again."""
    from openpalm.align.judging.best_of_n import Draw
    from openpalm.align.judging.rewards import Asked, Reader, question_of, rewards_of
    from openpalm.align.rollouts.rollout import checked
    from openpalm.base.jsonl import open_jsonl
    from openpalm.cli.common import progress, serving_engine
    from openpalm.cli.rl_common import fitting
    from openpalm.data.rows.prompt_files import read_prompts
    from openpalm.data.text.conversation import stop_ids

    given = read_prompts(settings.data)
    engine, tokenizer = serving_engine(settings.path, settings, slots=ANSWERS_AT_A_TIME)
    context = engine.model.config.context
    asked, ids = fitting(given, tokenizer, settings, context, "best-of-n")
    reader = Reader(
        tokenizer, [Asked(question_of(row.prompt), row.row) for row in asked], stop_ids(tokenizer)
    )
    reward = rewards_of(reward_sources(settings.reward), reader)
    draw = Draw(settings.n, settings.max_new_tokens, settings.temperature, settings.seed)
    drawn = _drawn(settings)
    with open_jsonl(settings.out) as file, progress("best-of-n", len(ids)) as advance:
        rows = _known(file.found, drawn, settings.out)
        advance(len(rows))
        step = max(1, ANSWERS_AT_A_TIME // settings.n)
        for first in range(len(rows), len(ids), step):
            chosen = range(first, min(first + step, len(ids)))
            answers = draw.answers(engine, ids, chosen, reader.stop_ids)
            rewards = checked(reward, answers)
            for i, prompt in enumerate(chosen):
                group = slice(i * settings.n, (i + 1) * settings.n)
                row = {
                    "prompt": [message.to_json() for message in asked[prompt].prompt],
                    **_best_and_worst(answers[group], rewards[group], reader),
                    "drawn": drawn,
                }
                file.append(row)
                rows.append(row)
            advance(len(chosen))
    return rows


def _best_and_worst(
    answers: "Sequence[Answer]", rewards: Sequence[float], reader: "Reader"
) -> dict[str, Any]:
    from openpalm.align.judging.best_of_n import best_of

    best, worst = best_of(rewards)
    return {
        "completion": reader.text(answers[best]),
        "worst": reader.text(answers[worst]),
        "rewards": list(rewards),
    }


def _drawn(settings: BestOfNSettings) -> str:
    """What tells these rows from those of another model, data, reward or draw."""
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.checkpoint.manifest import read_manifest
    from openpalm.cli.common import weights_path

    told = {name: str(value) for name, value in asdict(settings).items()}
    for name in ("path", "out", "pairs", "json", "device", "force"):
        del told[name]
    told["data"] = hashlib.sha256(settings.data.read_bytes()).hexdigest()
    directory = checkpoint.resolve(weights_path(settings.path))
    told["model"] = read_manifest(directory)["sha256"]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _known(found: list[dict[str, Any]], drawn: str, out: Path) -> list[dict[str, Any]]:
    """The rows that are there already. Raises DataError where they are not this command's."""
    if any(row.get("drawn") != drawn for row in found):
        raise DataError(
            f"--out {out}: has rows of another model, data, reward or settings; choose a new file"
        )
    return list(found)
