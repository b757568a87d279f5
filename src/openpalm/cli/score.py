"""`openpalm score`: the rewards that a reward model gives to completions in a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpalm.base.settings import parse
from openpalm.errors import CheckpointError, DataError, count_of

if TYPE_CHECKING:
    from openpalm.align.pairs.examples import PreferenceExample
    from openpalm.data.rows.prompt_files import PromptRow
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.model.reward import RewardModel

ROWS_PER_BATCH = 32


@dataclass(frozen=True)
class ScoreSettings:
    """Reward model, completions and the file of the rewards."""

    path: str
    """run or checkpoint of `openpalm reward`"""
    data: Path
    """.jsonl of a prompt (a text or messages) and a `completion` in each row"""
    out: Path
    """.jsonl of the same rows with `reward` and `reward_spread`, the standard deviation over the
    model's heads; both are null for a completion that is too long for the model"""
    device: str = "auto"
    """auto, cpu or cuda; auto is a GPU if there is one"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ScoreSettings,
        argv,
        verb="score",
        about="Scores completions with a reward model.",
        examples=["openpalm score runs/reward --data completions.jsonl --out scored.jsonl"],
        positional=["path"],
    )
    from openpalm.base.device import pick_device
    from openpalm.base.files import write_atomically
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.prompt_files import read_prompts
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.model.reward import RewardModel

    found = read_prompts(settings.data)
    rows = report_unused("score", settings.data, found, "completion").items
    directory = checkpoint.resolve(settings.path)
    model = checkpoint.load(directory, str(pick_device(settings.device)))
    if not isinstance(model, RewardModel) or checkpoint.tokenizer_json(directory) is None:
        raise CheckpointError(
            f"{directory}: is no reward model with a tokenizer; train one with `openpalm reward`"
        )
    scored = list(score(model, Tokenizer.load(directory / "tokenizer.json"), rows))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in scored]
    write_atomically(settings.out, "".join(lines))
    unused = sum(row["reward"] is None for row in scored)
    if unused:
        print(f"{count_of(unused, 'completion')} too long for the model; their reward is null")
    print(f"{settings.out}: {count_of(len(scored), 'row')}")


def score(
    model: "RewardModel", tokenizer: "Tokenizer", rows: "Sequence[PromptRow]"
) -> Iterator[dict[str, Any]]:
    """Each row with its reward and the spread of the heads."""
    import torch

    from openpalm.align.pairs.reward_model import collate

    for start in range(0, len(rows), ROWS_PER_BATCH):
        group = rows[start : start + ROWS_PER_BATCH]
        examples = [_example(tokenizer, row, model.config.context) for row in group]
        kept = [example for example in examples if example is not None]
        rewards, spreads = iter(()), iter(())
        if kept:
            batch = collate(kept).to(model.embedding.device)
            with torch.no_grad():
                members = model.expected(
                    model.member_scores(batch.ids, batch.mask, batch.prompt_lengths)
                )
            rewards = iter(members.mean(dim=0).tolist())
            spreads = iter(members.std(dim=0, correction=0).tolist())
        for row, example in zip(group, examples, strict=True):
            fits = example is not None
            yield row.row | {
                "reward": next(rewards) if fits else None,
                "reward_spread": next(spreads) if fits else None,
            }


def _example(tokenizer: "Tokenizer", row: "PromptRow", context: int) -> "PreferenceExample | None":
    """None if the completion is too long. Raises DataError for a row without a completion."""
    from openpalm.align.pairs.examples import PreferenceExample, render_completion
    from openpalm.data.text.conversation import Message

    text = row.row.get("completion")
    if not isinstance(text, str):
        raise DataError('--data: a row has no text in the field "completion"')
    example = render_completion(tokenizer, row.prompt, [Message("assistant", text)])
    return PreferenceExample((example,)) if len(example.ids) <= context else None
