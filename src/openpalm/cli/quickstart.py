"""`openpalm quickstart`: the whole pipeline in minutes, on text that every Python has.

Each stage calls the verb of its name, so every result can be repeated by hand. A stage that is
done is not repeated.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpalm.base.settings import parse
from openpalm.errors import SettingsError, count_of

if TYPE_CHECKING:
    from rich.console import Console

    from openpalm.data.corpus.builtin import QuestionAnswer
    from openpalm.data.dataset.manifest import Manifest
    from openpalm.report.quickstart_page import Asked, Preferred

VOCABULARY = 4096
PRETRAIN_SHARE, FINETUNE_SHARE = 0.62, 0.20
QUESTIONS_PER_MINUTE, MAX_QUESTIONS = 40, 200
JUDGED_PER_MINUTE, COMPLETIONS_EACH, LEAST_GAP, LEAST_PREFERENCES = 60, 4, 0.1, 16
"""Questions to judge per minute, completions of each, the token F1 by which the best and the worst
must differ, and the least number of preferences to train on."""
EXAMPLE = "shutil.copytree"
GOOD_F1 = 0.8
"""Token F1 above which the answers are worth showing."""


@dataclass(frozen=True)
class QuickstartSettings:
    """Time budget and directory."""

    minutes: float = 5.0
    """time budget: 62 % for pretraining, 20 % for fine-tuning; the other 18 % is not enforced: data
    and tokenizer, timing of the model sizes, answers to questions, preferences, the report"""
    out: Path = Path("runs/quickstart")
    """directory for data, runs and report"""
    seed: int = 0
    """random seed of all stages"""

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise SettingsError(f"--minutes {self.minutes}: must be above 0 and at most a day")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        QuickstartSettings,
        argv,
        verb="quickstart",
        about="Trains a tokenizer and a small PaLM on Python's own documentation, fine-tunes it "
        "to answer questions, and writes a report. No download.",
        examples=["openpalm quickstart", "openpalm quickstart --minutes 1 --out runs/short"],
    )
    from rich.console import Console

    from openpalm.data.dataset.shards import open_dataset
    from openpalm.evaluate.compression import baselines
    from openpalm.report.quickstart_page import write_page_of_quickstart

    _refuse_another_length(settings)
    console = Console(highlight=False)
    started = time.monotonic()
    manifest = prepare_data(settings, console)
    compared = baselines(open_dataset(settings.out / "data"))
    pretrain(settings, console, compared)
    items = taught_items(settings)
    finetune(settings, console, items)
    asked = ask(settings, console, items)
    preferred = prefer(settings, console, items)
    summary = summarise(settings, compared, asked, time.monotonic() - started)
    console.rule("6  report", align="left")
    page = write_page_of_quickstart(settings.out, manifest, asked, preferred, summary)
    console.print(f"report: {page}")
    for line in shortcomings(summary, settings):
        console.print(line, style="yellow", markup=False)
    _print_next_commands(settings.out / ("dpo" if preferred else "sft"), settings, console)


def _refuse_another_length(settings: QuickstartSettings) -> None:
    """Raises SettingsError if `out` has a quickstart of other --minutes, finished or not."""
    from openpalm.base.yaml_file import read_yaml
    from openpalm.train.run_directory import SETTINGS_FILE

    file = settings.out / "pretrain" / SETTINGS_FILE
    stored = read_yaml(file).get("minutes") if file.exists() else None
    if not isinstance(stored, int | float):
        return
    was = stored / PRETRAIN_SHARE
    if abs(was - settings.minutes) > 1e-6:
        raise SettingsError(
            f"--minutes {settings.minutes:g}: {settings.out} has a quickstart of {was:g} minutes; "
            f"give --minutes {was:g} to continue it, another --out to keep it, or delete the "
            "folder to start again"
        )


def prepare_data(settings: QuickstartSettings, console: "Console") -> "Manifest":
    """Stage 1: Python's documentation as a dataset, with a tokenizer trained on it."""
    from openpalm.data.prepare.preparation import PrepareRequest, prepare

    console.rule("1  text to tokens", align="left")
    request = PrepareRequest(
        inputs=["builtin:python-docs"],
        out=settings.out / "data",
        tokenizer=f"bpe:{VOCABULARY}",
    )
    with console.status("reading Python's documentation, training a tokenizer"):
        manifest = prepare(request)
    train, val = manifest.splits["train"], manifest.splits["val"]
    console.print(
        f"{manifest.documents.read:,} documents, {manifest.documents.duplicates:,} of them exact "
        f"copies and left out; {train.tokens:,} tokens to train on, {val.tokens:,} to validate, "
        f"{train.bytes / train.tokens:.2f} bytes per token"
    )
    return manifest


def pretrain(settings: QuickstartSettings, console: "Console", compared: dict[str, float]) -> None:
    """Stage 2: a model of a size that this machine can train in the time."""
    from openpalm.cli.train import pretrain as train_verb
    from openpalm.train.config import PretrainSettings
    from openpalm.train.optimizer_settings import OptimSettings
    from openpalm.train.sizing.budget import size_for

    seconds = settings.minutes * 60 * PRETRAIN_SHARE
    size = size_for(seconds, settings.out / "size.json")
    console.rule(f"2  pretraining {size.model} from scratch", align="left")
    outcome = train_verb(
        PretrainSettings(
            data=settings.out / "data",
            out=settings.out / "pretrain",
            model=size.model,
            minutes=settings.minutes * PRETRAIN_SHARE,
            seed=settings.seed,
            sequence_length=size.sequence_length,
            batch_tokens=size.batch_tokens,
            optim=OptimSettings(name="muon"),
        ),
        label="pretrain",
    )
    console.print(f"{count_of(outcome.step, 'step')}; checkpoint {outcome.checkpoint}")
    bits = _rows(settings, "pretrain", "val_bits_per_byte")[-1]
    console.print(
        f"validation: {bits:.3f} bits per byte; a model that counts five bytes back "
        f"has {compared['order5']:.3f}, gzip {compared['gzip']:.3f}"
    )
    for sample in _rows(settings, "pretrain", "samples", "samples.jsonl")[-1]:
        console.print(f"[dim]{'-' * 20}[/dim]")
        console.print(sample["prompt"], style="blue", end="", markup=False)
        console.print(sample["text"], markup=False)


def taught_items(settings: QuickstartSettings) -> "list[QuestionAnswer]":
    """As many top-level functions and classes as fine-tuning can teach in the time."""
    import random
    from statistics import median

    from openpalm.data.corpus.builtin import question_answers
    from openpalm.train.sizing.budget import facts

    items = [item for item in question_answers() if item.name.count(".") == 1]
    random.Random(settings.seed).shuffle(items)
    items.sort(key=lambda item: item.name != EXAMPLE)
    tokens_per_s = median(_rows(settings, "pretrain", "tokens_per_s"))
    return items[: facts(settings.minutes * 60 * FINETUNE_SHARE, tokens_per_s)]


def finetune(
    settings: QuickstartSettings, console: "Console", items: "list[QuestionAnswer]"
) -> None:
    """Stage 3: fine-tuning on questions about those items."""
    from openpalm.align.config import SftSettings
    from openpalm.cli.sft import finetune as sft_verb
    from openpalm.data.corpus.builtin import question_rows
    from openpalm.train.optimizer_settings import OptimSettings

    console.rule("3  fine-tuning on questions and answers", align="left")
    data, rows = settings.out / "questions.jsonl", question_rows(items, settings.seed)
    _write_rows(data, rows)
    console.print(
        f"{len(rows):,} questions about {len(items):,} functions and classes, "
        f"{len(items[0].train_questions)} phrasings each"
    )
    outcome = sft_verb(
        SftSettings(
            data=data,
            out=settings.out / "sft",
            init=str(settings.out / "pretrain"),
            minutes=settings.minutes * FINETUNE_SHARE,
            seed=settings.seed,
            sequence_length=128,
            batch_tokens=64 * 128,
            optim=OptimSettings(lr=2e-3, weight_decay=0.0),
        ),
    )
    console.print(f"{count_of(outcome.step, 'step')}; checkpoint {outcome.checkpoint}")


def ask(
    settings: QuickstartSettings, console: "Console", items: "list[QuestionAnswer]"
) -> "list[Asked]":
    """Stage 4: questions in phrasings that were not trained on, before and after fine-tuning."""
    from openpalm.evaluate.question_answering import answer_questions
    from openpalm.report.quickstart_page import Asked

    console.rule("4  questions in words it was not trained on", align="left")
    count = max(4, int(min(MAX_QUESTIONS, QUESTIONS_PER_MINUTE * settings.minutes)))
    questions = [item.held_out_questions[0] for item in items[:count]]
    with console.status("answering"):
        before = answer_questions(settings.out / "pretrain", questions)
        after = answer_questions(settings.out / "sft", questions)
    asked = [
        Asked(question, item.answer, *answers)
        for question, item, *answers in zip(questions, items[:count], before, after, strict=True)
    ]
    for item in asked[:4]:
        console.print(f"[blue]{item.question}[/blue]")
        console.print(item.after, markup=False)
    f1s = _f1_before_and_after(asked)
    console.print(
        f"token F1 against the docstrings over {len(asked)} questions: "
        f"{f1s[0]:.3f} before fine-tuning, {f1s[1]:.3f} after"
    )
    return asked


def prefer(
    settings: QuickstartSettings, console: "Console", items: "list[QuestionAnswer]"
) -> "Preferred | None":
    """Stage 5: prefers the model's own completions by their docstrings, and trains on that.

    None if the completions are too much alike.
    """
    from openpalm.align.config import DpoSettings
    from openpalm.cli.dpo import prefer as dpo_verb
    from openpalm.evaluate.question_answering import answer_questions, preferences_by_f1
    from openpalm.evaluate.token_f1 import mean_token_f1
    from openpalm.report.quickstart_page import Preferred
    from openpalm.train.optimizer_settings import OptimSettings

    console.rule("5  preferring the better of its own answers", align="left")
    judged = items[: max(16, int(JUDGED_PER_MINUTE * settings.minutes))]
    references = [item.answer for item in judged]
    data = settings.out / "preferences.jsonl"
    if not data.exists():
        questions = [item.train_questions[0] for item in judged]
        repeated = [question for question in questions for _ in range(COMPLETIONS_EACH)]
        with console.status(f"answering {len(judged)} questions {COMPLETIONS_EACH} times"):
            texts = answer_questions(settings.out / "sft", repeated, temperature=1.0)
        groups = [texts[i : i + COMPLETIONS_EACH] for i in range(0, len(texts), COMPLETIONS_EACH)]
        found = preferences_by_f1(questions, references, groups, least_gap=LEAST_GAP)
        _write_rows(data, [preference.to_json() for preference in found])
    preferences = len(data.read_text(encoding="utf-8").splitlines())
    if preferences < LEAST_PREFERENCES:
        found = count_of(preferences, "preference")
        console.print(f"{found}: its answers are too much alike to prefer any")
        return None
    outcome = dpo_verb(
        DpoSettings(
            data=data,
            out=settings.out / "dpo",
            init=str(settings.out / "sft"),
            epochs=2,  # after more, the model forgets what the few preferences do not ask about
            seed=settings.seed,
            sequence_length=128,
            batch_tokens=32 * 128,
            optim=OptimSettings(lr=1e-4, weight_decay=0.0),
        ),
    )
    console.print(f"{count_of(outcome.step, 'step')}; checkpoint {outcome.checkpoint}")
    held_out = [item.held_out_questions[0] for item in judged]
    with console.status("answering"):
        runs = [settings.out / name for name in ("sft", "dpo")]
        answers = [answer_questions(run, held_out, temperature=1.0) for run in runs]
    result = Preferred(preferences, *(mean_token_f1(texts, references) for texts in answers))
    console.print(
        f"{result.preferences} preferences; token F1 of answers drawn at temperature 1 to held-out "
        f"phrasings: {result.before:.3f} before, {result.after:.3f} after"
    )
    return result


def summarise(
    settings: QuickstartSettings, compared: dict[str, float], asked: "list[Asked]", seconds: float
) -> dict[str, Any]:
    """Writes summary.json and returns it; an existing one keeps its seconds."""
    from openpalm.base.device import multiplies_bfloat16, processor
    from openpalm.checkpoint import directory as checkpoint

    before, after = _f1_before_and_after(asked)
    path = settings.out / "summary.json"
    if path.exists():
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    train_seconds = sum(_rows(settings, run, "elapsed_s")[-1] for run in ("pretrain", "sft"))
    newest = checkpoint.resolve(settings.out / "pretrain")
    summary = {
        "bits_per_byte": _rows(settings, "pretrain", "val_bits_per_byte")[-1],
        **compared,
        "f1_before": before,
        "f1_after": after,
        "seconds": round(seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "steps": _rows(settings, "pretrain", "step")[-1],
        "parameters": checkpoint.load_config(newest).parameters,
        "processor": processor(),
        "native_bfloat16": multiplies_bfloat16(),
    }
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def shortcomings(summary: dict[str, Any], settings: QuickstartSettings) -> list[str]:
    """Which results are poor, why, and what to do."""
    found = []
    if summary["bits_per_byte"] > summary["order5"]:
        found.append(
            f"The language model is poor: {summary['bits_per_byte']:.3f} bits per byte, where "
            f"counting five bytes back gives {summary['order5']:.3f}."
        )
    if summary["f1_after"] < GOOD_F1:
        found.append(
            f"The answers are poor: token F1 {summary['f1_after']:.2f}, where {GOOD_F1} is good."
        )
    if found:
        longer = max(15, round(3 * settings.minutes))
        found.append(
            f"--minutes {settings.minutes:g} is too short on this processor (pretraining steps: "
            f"{summary['steps']:,}); try openpalm quickstart --minutes {longer} --out runs/longer."
        )
    return found


def _f1_before_and_after(asked: "list[Asked]") -> list[float]:
    """Mean token F1 before and after fine-tuning."""
    from openpalm.evaluate.token_f1 import mean_token_f1

    references = [item.reference for item in asked]
    sides = [item.before for item in asked], [item.after for item in asked]
    return [mean_token_f1(side, references) for side in sides]


def _rows(
    settings: QuickstartSettings, run: str, column: str, file: str = "metrics.jsonl"
) -> list[Any]:
    """The values of a column in the rows that a stage's run wrote."""
    from openpalm.train.logging.metrics import read_rows

    return [row[column] for row in read_rows(settings.out / run / file) if column in row]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a .jsonl, unless it has these rows already: a run notices a changed file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _print_next_commands(best: Path, settings: QuickstartSettings, console: "Console") -> None:
    commands = [
        f'openpalm sample {best} --chat "What does {EXAMPLE} do?" --stream',
        f'openpalm sample {settings.out}/pretrain "Return the"',
        "openpalm data prepare YOUR_TEXTS --out data/mine --tokenizer bpe:8192",
        "openpalm train --model palm-14m --data data/mine --out runs/mine --minutes 30",
        "openpalm report runs/mine",
        f"openpalm serve {best}",
    ]
    console.rule("next, try", align="left")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)
    console.print("or chat with it, judge its answers and train on them, all in the browser:")
    console.print(f"  openpalm serve {best} --feedback", markup=False, soft_wrap=True)
