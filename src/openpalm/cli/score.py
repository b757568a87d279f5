"""`openpalm score`: rewards or log-probabilities of completions in a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpalm.base.settings import parse
from openpalm.errors import CheckpointError, DataError, count_of

if TYPE_CHECKING:
    from openpalm.align.pairs.examples import PreferenceExample
    from openpalm.data.rows.readers.prompts import PromptRow
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.model.transformer import Transformer

ROWS_PER_BATCH = 32


@dataclass(frozen=True)
class ScoreSettings:
    """Reward model, completions and the file of the rewards."""

    path: str
    """run or checkpoint"""
    data: Path
    """.jsonl of a prompt (a text or messages) and a `completion` in each row"""
    out: Path
    """.jsonl of the same rows. A reward model adds `reward` and `reward_spread`, the standard
    deviation over its heads; a language model adds `log_prob`, the log-probability of the whole
    completion. A completion that is too long for the model has no score"""
    device: str = "auto"
    """auto, cpu or cuda; auto is a GPU if there is one"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ScoreSettings,
        argv,
        verb="score",
        about="Scores completions: with a reward model by their reward, with a language model by "
        "their log-probability.",
        examples=["openpalm score runs/reward --data completions.jsonl --out scored.jsonl"],
        positional=["path"],
    )
    from openpalm.base.device import pick_device
    from openpalm.base.files import write_atomically
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.readers.prompts import read_prompts
    from openpalm.data.text.tokenizer import Tokenizer

    found = read_prompts(settings.data)
    rows = report_unused("score", settings.data, found, "completion").items
    directory = checkpoint.resolve(settings.path)
    if checkpoint.tokenizer_json(directory) is None:
        raise CheckpointError(f"{directory}: has no tokenizer.json; choose another checkpoint")
    model = checkpoint.load(directory, str(pick_device(settings.device)))
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    scored = [row for group in _groups(rows) for row in score(model, tokenizer, group)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in scored]
    write_atomically(settings.out, "".join(lines))
    print(f"{settings.out}: {count_of(len(scored), 'row')}")


def _groups(rows: "Sequence[PromptRow]") -> "Iterator[Sequence[PromptRow]]":
    for start in range(0, len(rows), ROWS_PER_BATCH):
        yield rows[start : start + ROWS_PER_BATCH]


def score(
    model: "Transformer", tokenizer: "Tokenizer", rows: "Sequence[PromptRow]"
) -> list[dict[str, Any]]:
    """The rows with their scores, computed in one batch."""
    from openpalm.model.reward import RewardModel

    is_reward = isinstance(model, RewardModel)
    names = ("reward", "reward_spread") if is_reward else ("log_prob",)
    examples = [_example(tokenizer, row, model.config.context) for row in rows]
    kept = [example for example in examples if example is not None]
    values = iter(_values(model, kept) if kept else ())
    nothing = (None,) * len(names)
    columns = [nothing if example is None else next(values) for example in examples]
    return [
        row.row | dict(zip(names, found, strict=True))
        for row, found in zip(rows, columns, strict=True)
    ]


def _values(
    model: "Transformer", examples: "Sequence[PreferenceExample]"
) -> list[tuple[float, ...]]:
    """Reward and spread, or log-probability, of each example."""
    import torch

    from openpalm.align.pairs import examples as pairs
    from openpalm.align.pairs import reward_model
    from openpalm.model.reward import RewardModel

    device = model.embedding.device
    with torch.no_grad():
        if isinstance(model, RewardModel):
            batch = reward_model.collate(examples).to(device)
            scores = model.member_scores(batch.ids, batch.mask, batch.prompt_lengths)
            members = model.expected(scores)
            columns = members.mean(dim=0), members.std(dim=0, correction=0)
        else:
            columns = (pairs.collate(examples).to(device).log_probs(model).sum(dim=-1),)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _example(tokenizer: "Tokenizer", row: "PromptRow", context: int) -> "PreferenceExample | None":
    """None if the completion is too long. Raises DataError for a row without a completion."""
    from openpalm.align.pairs.examples import PreferenceExample, render_completion
    from openpalm.data.text.conversation import Message

    text = row.row.get("completion")
    if not isinstance(text, str):
        raise DataError('--data: a row has no text in the field "completion"')
    example = render_completion(tokenizer, row.prompt, [Message("assistant", text)])
    return PreferenceExample((example,)) if len(example.ids) <= context else None
