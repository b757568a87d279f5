"""`openpalm doctor`: a checkpoint, data and rewards in; what would go wrong in silence out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from openpalm.base.settings import parse
from openpalm.errors import WorkError
from openpalm.train.config import LoraSettings

if TYPE_CHECKING:
    from openpalm.align.config import GrpoSettings
    from openpalm.align.doctor.checks import Check
    from openpalm.align.doctor.run_checks import PlannedRun
    from openpalm.data.rows.messages import Messages
    from openpalm.data.rows.preferences import Pair
    from openpalm.data.rows.read_result import ReadResult
    from openpalm.data.rows.readers.prompts import PromptRow

MAX_EXAMPLES = 256
"""Rows of the data that are checked."""


@dataclass(frozen=True)
class DoctorSettings:
    """The run to check: the options that `openpalm grpo`, `dpo` or `sft` would get."""

    init: str
    """checkpoint, run or hub name that the run would start from"""
    data: Path
    """.jsonl of prompts, pairs or conversations, as for grpo, dpo or sft"""
    reward: list[str] | str | None = None
    """reward, one or several [WEIGHT*]SOURCE, as for grpo"""
    prompts_per_rollout: int = 8
    """prompts to sample completions for"""
    num_completions: int = 4
    """completions per prompt"""
    max_new_tokens: int = 64
    """maximum tokens per completion"""
    temperature: float = 1.0
    """sampling temperature"""
    seed: int = 0
    """random seed"""
    device: str = "auto"
    """auto, cpu or cuda; auto is a GPU if there is one"""
    json: bool = False
    """print the checks as JSON"""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """LoRA adapter of the run"""

    def __post_init__(self) -> None:
        self.as_run()

    def as_run(self) -> "GrpoSettings":
        """The settings that `openpalm grpo` would get. Raises SettingsError."""
        from openpalm.align.config import GrpoSettings

        return GrpoSettings(
            data=self.data,
            out=Path("doctor"),
            init=self.init,
            steps=1,
            reward=self.reward,
            prompts_per_rollout=self.prompts_per_rollout,
            num_completions=self.num_completions,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            device=self.device,
            lora=self.lora,
        )


def run(argv: Sequence[str]) -> None:
    settings = parse(
        DoctorSettings,
        argv,
        verb="doctor",
        about="Checks model, data and reward before an alignment run, for mistakes that raise no "
        "error: loss masks, end markers, log-probabilities, reference model, rewards, swapped "
        "pairs. Stops at the first failed check, prints the remedy and exits with status 1.",
        examples=[
            "openpalm doctor --init runs/chat --data prompts.jsonl --reward runs/rm",
            "openpalm doctor --init runs/chat --data pairs.jsonl --lora.rank 8 --json",
        ],
    )
    from openpalm.align.doctor.run_checks import run_checks
    from openpalm.base.progress_bar import ProgressBar

    planned = planned_run(settings)
    checks: list[Check] = []
    with ProgressBar("doctor", _check_count(planned)) as bar:
        for check in run_checks(planned):
            checks.append(check)
            bar.advance(1)
            if not check.ok:
                break
    if settings.json:
        print(json.dumps([check._asdict() for check in checks]))
    else:
        _show(checks)
    if not checks[-1].ok:
        raise WorkError("{0.name}: failed: {0.found}; {0.remedy}".format(checks[-1]))


def planned_run(settings: DoctorSettings) -> "PlannedRun":
    """Composes the model, data and reward that the run would start with."""
    from openpalm.align.config import reward_sources, rollout_rate
    from openpalm.align.doctor.run_checks import PlannedRun
    from openpalm.align.judging.reward_sources import RewardContext, load_reward
    from openpalm.align.pairs.examples import PreferenceExample, to_example
    from openpalm.base.device import pick_device
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import fine_tuning_start
    from openpalm.cli.rl_common import usable_prompts
    from openpalm.data.rows.preferences import Pair
    from openpalm.data.rows.readers.prompts import PromptRow
    from openpalm.model import lora
    from openpalm.model.transformer import Transformer
    from openpalm.train.initial_weights import check_trained, choose_trained
    from openpalm.train.optimization.parameter_groups import Optimizer
    from openpalm.train.spec import LORA_RATE

    run = settings.as_run()
    directory, tokenizer, start = fine_tuning_start(run)
    check_trained(run, start.config)
    given = _read(settings.data)
    max_tokens = start.config.context + 1  # the last token is only a target

    def with_example(pair: Pair) -> tuple[Pair, PreferenceExample] | str:
        example = to_example(tokenizer, pair, max_tokens)
        return example if isinstance(example, str) else (pair, example)

    pairs = given.pairs.map(with_example)
    if given.pairs.items:
        pairs.refuse_empty(settings.data, "pair")
    rows, ids = usable_prompts(given.prompts, tokenizer, settings, start.config.context, "doctor")
    of_pairs = [PromptRow(pair.prompt, {}) for pair, _ in pairs.items]
    context = RewardContext.from_rows(tokenizer, [*rows, *of_pairs])
    sources = reward_sources(settings.reward)
    device = pick_device(settings.device)
    model = Transformer(start.config).to(device)
    choose_trained(model, run)
    start.fill(model)
    if settings.lora.rank:
        lora.initialise_adapter(model, run.seed)
    rate = rollout_rate(start.learning_rate) * (LORA_RATE if settings.lora.rank else 1)
    return PlannedRun(
        settings=run,
        model=model,
        optimizer=Optimizer(model, run.optim, rate),
        reference=checkpoint.load(directory, str(device)).requires_grad_(False),
        tokenizer=tokenizer,
        prompts=ids,
        conversations=given.conversations,
        pairs=[example for _, example in pairs.items],
        stop_ids=context.stop_ids,
        reward=load_reward(sources, context) if sources else None,
    )


class _Given(NamedTuple):
    """The data's prompts, conversations and pairs, at most MAX_EXAMPLES of each."""

    prompts: "ReadResult[PromptRow]"
    conversations: "Sequence[tuple[Messages, Messages]]"
    pairs: "ReadResult[Pair]"


def _read(path: Path) -> _Given:
    """Reads a file in any of the forms. Raises DataError."""
    from openpalm.cli.common import report_unused
    from openpalm.data.corpus.json_lines import read_rows
    from openpalm.data.corpus.sources import is_rows
    from openpalm.data.rows.messages import assistant_turn
    from openpalm.data.rows.read_result import ReadResult
    from openpalm.data.rows.readers.demonstrations import read_demonstrations
    from openpalm.data.rows.readers.pairs import read_pairs
    from openpalm.data.rows.readers.prompts import PromptRow, read_prompts
    from openpalm.data.rows.row_formats import (
        ALPACA,
        COMPLETION,
        MESSAGES,
        PAIRS,
        SHAREGPT,
        row_format,
    )

    first = next(read_rows(path), None) if is_rows(path) else None
    form = None if first is None else row_format(first[1])
    if form in PAIRS:
        pairs = report_unused("doctor", path, read_pairs(path), "pair").first(MAX_EXAMPLES)
        pairs = ReadResult(pairs.items, {}, pairs.places)
        both = [
            (pair.prompt, side) for pair in pairs.items for side in (pair.chosen, pair.rejected)
        ]
        return _Given(pairs.map(lambda pair: PromptRow(pair.prompt, {})), both, pairs)
    none, prompts = ReadResult([], {}), read_prompts(path).first(MAX_EXAMPLES)
    if form not in (MESSAGES, SHAREGPT, ALPACA, COMPLETION):
        return _Given(
            prompts, [(row.prompt, assistant_turn("An answer.")) for row in prompts.items], none
        )
    found = read_demonstrations(path)
    shown = report_unused("doctor", path, found, "conversation").items[:MAX_EXAMPLES]
    ends = [max(i for i, m in enumerate(turns) if m.role == "assistant") for turns in shown]
    cut = [(turns[:end], turns[end : end + 1]) for turns, end in zip(shown, ends, strict=True)]
    return _Given(prompts, cut, none)


def _check_count(planned: "PlannedRun") -> int:
    with_reward = planned.reward is not None
    return 10 + 4 * with_reward + bool(planned.pairs) * (2 + 2 * with_reward)


def _show(checks: "Sequence[Check]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("check", "", "found"):
        table.add_column(title, no_wrap=title != "found")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]failed[/]"
        table.add_row(check.name, mark, check.found)
    Console().print(table)
