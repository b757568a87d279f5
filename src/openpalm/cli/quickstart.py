"""`openpalm quickstart`: the whole line in minutes, on text that every Python carries.

Each stage is what its own verb does, so every figure here can be had again by hand. A stage that
is already done is not done again.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from openpalm.align.config import SftSettings
from openpalm.base.settings import parse
from openpalm.errors import SettingsError, count_of
from openpalm.train.config import OptimSettings, PretrainSettings

if TYPE_CHECKING:
    from rich.console import Console

    from openpalm.data.corpus.builtin import QuestionAnswer
    from openpalm.data.dataset.manifest import Manifest
    from openpalm.train.sizing.budget import Size

VOCABULARY = 4096
PRETRAIN_SHARE, FINETUNE_SHARE = 0.62, 0.20
QUESTIONS_A_MINUTE, MAX_QUESTIONS = 40, 200
JUDGED_A_MINUTE, ANSWERS_EACH, LEAST_GAP, LEAST_JUDGED = 60, 4, 0.1, 16
"""Questions whose answers are judged, answers to each, token F1 that two must differ by, and the
judgements without which nothing can be learnt."""
EXAMPLE = "shutil.copytree"
GOOD_F1 = 0.8
"""Token F1 from which on the answers are worth showing."""


@dataclass(frozen=True)
class QuickstartSettings:
    """How long, and where to."""

    minutes: float = 5.0
    """budget: about 62 % pretraining, 20 % fine-tuning"""
    out: Path = Path("runs/quickstart")
    """directory for data, runs and report"""
    seed: int = 0
    """of everything random"""

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise SettingsError(f"--minutes {self.minutes}: must be above 0 and at most a day")


@dataclass(frozen=True)
class Answered:
    """A question put to the model before and after fine-tuning."""

    question: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Preferred:
    """What learning from judgements changed: mean token F1 of answers drawn at temperature 1."""

    judgements: int
    before: float
    after: float


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

    console = Console(highlight=False)
    started = time.monotonic()
    manifest = prepare_data(settings, console)
    compared = baselines(settings)
    pretrain(settings, console, compared)
    finetune(settings, console)
    answered = question(settings, console)
    preferred = prefer(settings, console)
    summary = summarise(settings, compared, answered, time.monotonic() - started)
    write_report(settings, console, manifest, answered, preferred, summary)
    for line in shortcomings(summary, settings):
        console.print(line, style="yellow", markup=False)
    _next_commands(settings.out / ("dpo" if preferred else "sft"), settings, console)


def prepare_data(settings: QuickstartSettings, console: "Console") -> "Manifest":
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
        f"{train.bytes / train.tokens:.2f} bytes a token"
    )
    return manifest


def baselines(settings: QuickstartSettings) -> dict[str, float]:
    """Bits a byte of the validation text under gzip and a model that counts five bytes back."""
    from openpalm.data.dataset.shards import open_dataset
    from openpalm.evaluate.compression import WittenBell, documents, gzip_bits

    dataset = open_dataset(settings.out / "data")
    training, validation = documents(dataset, "train"), documents(dataset, "val")
    text = b"".join(validation)
    order5 = WittenBell(training).bits(validation)
    return {"gzip": gzip_bits(text) / len(text), "order5": order5 / len(text)}


def pretrain(settings: QuickstartSettings, console: "Console", compared: dict[str, float]) -> None:
    from openpalm.cli.train import pretrain as train_verb

    size = _size(settings)
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
    console.print(f"{outcome.step} steps; checkpoint {outcome.checkpoint}")
    console.print(
        f"validation: {_last_bits(settings):.3f} bits a byte; a model that counts five bytes back "
        f"has {compared['order5']:.3f}, gzip {compared['gzip']:.3f}"
    )
    samples = _last_row(settings.out / "pretrain" / "samples.jsonl")["samples"]
    for sample in samples:
        console.print(f"[dim]{'-' * 20}[/dim]")
        console.print(sample["prompt"], style="blue", end="", markup=False)
        console.print(sample["text"], markup=False)


def _size(settings: QuickstartSettings) -> "Size":
    """What this machine can train in the time; a quickstart that goes on keeps what it has."""
    from openpalm.train.sizing.budget import SIZES, affordable, training_flops

    kept = settings.out / "size.json"
    if kept.exists():
        model = json.loads(kept.read_text(encoding="utf-8"))["model"]
        return next(size for size in SIZES if size.model == model)
    size = affordable(training_flops(settings.minutes * 60 * PRETRAIN_SHARE))
    kept.write_text(json.dumps({"model": size.model}) + "\n", encoding="utf-8")
    return size


def finetune(settings: QuickstartSettings, console: "Console") -> None:
    from openpalm.cli.sft import finetune as sft_verb

    console.rule("3  fine-tuning on questions and answers", align="left")
    data = settings.out / "questions.jsonl"
    names = questions_about(settings)
    written = _write_questions(data, names, settings.seed)
    console.print(
        f"{written:,} questions about {len(names):,} functions and classes, "
        f"{len(names[0].train_questions)} phrasings each"
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
    console.print(f"{outcome.step} steps; checkpoint {outcome.checkpoint}")


def question(settings: QuickstartSettings, console: "Console") -> list[Answered]:
    """Asks in phrasings that fine-tuning never saw, before and after it."""
    console.rule("4  questions in words it was not trained on", align="left")
    count = max(4, int(min(MAX_QUESTIONS, QUESTIONS_A_MINUTE * settings.minutes)))
    chosen = questions_about(settings)[:count]
    questions = [item.held_out_questions[0] for item in chosen]
    with console.status("answering"):
        before = _answers(settings.out / "pretrain", questions)
        after = _answers(settings.out / "sft", questions)
    answered = [
        Answered(q, item.answer, b, a)
        for q, item, b, a in zip(questions, chosen, before, after, strict=True)
    ]
    for item in answered[:4]:
        console.print(f"[blue]{item.question}[/blue]")
        console.print(item.after, markup=False)
    f1 = _before_and_after(answered)
    console.print(
        f"token F1 against the docstrings over {len(answered)} questions: "
        f"{f1[0]:.3f} before fine-tuning, {f1[1]:.3f} after"
    )
    return answered


def prefer(settings: QuickstartSettings, console: "Console") -> Preferred | None:
    """Judges the model's own answers by their docstrings, and trains on the judgements.

    None where its answers are too much alike, or all as bad, to prefer any.
    """
    from openpalm.align.config import DpoSettings
    from openpalm.cli.dpo import prefer as dpo_verb

    console.rule("5  preferring the better of its own answers", align="left")
    names = questions_about(settings)
    asked = names[: max(16, int(JUDGED_A_MINUTE * settings.minutes))]
    data = settings.out / "preferences.jsonl"
    if not data.exists():
        with console.status(f"answering {len(asked)} questions {ANSWERS_EACH} times"):
            judged = _judgements(settings, asked)
        data.write_text("".join(json.dumps(row) + "\n" for row in judged), encoding="utf-8")
    judgements = len(data.read_text(encoding="utf-8").splitlines())
    if judgements < LEAST_JUDGED:
        found = count_of(judgements, "judgement")
        console.print(f"{found}: its answers are too much alike to prefer any")
        return None
    outcome = dpo_verb(
        DpoSettings(
            data=data,
            out=settings.out / "dpo",
            init=str(settings.out / "sft"),
            epochs=2,  # more, and the model forgets what the few judgements do not ask about
            seed=settings.seed,
            sequence_length=128,
            batch_tokens=32 * 128,
            optim=OptimSettings(lr=1e-4, weight_decay=0.0),
        ),
    )
    console.print(f"{outcome.step} steps; checkpoint {outcome.checkpoint}")
    questions = [item.held_out_questions[0] for item in asked]
    references = [item.answer for item in asked]
    with console.status("answering"):
        f1s = [
            _mean_f1(_answers(settings.out / run, questions, temperature=1.0), references)
            for run in ("sft", "dpo")
        ]
    result = Preferred(judgements, *f1s)
    console.print(
        f"{result.judgements} judgements; token F1 of answers drawn at temperature 1 to held-out "
        f"phrasings: {result.before:.3f} before, {result.after:.3f} after"
    )
    return result


def _judgements(settings: QuickstartSettings, asked: "list[QuestionAnswer]") -> list[dict]:
    """The best and the worst of several answers to each question, as Preference records."""
    from openpalm.data.rows.preferences import Candidate, Preference
    from openpalm.data.text.conversation import Message
    from openpalm.evaluate.token_f1 import token_f1

    questions = [q for item in asked for q in [item.train_questions[0]] * ANSWERS_EACH]
    texts = _answers(settings.out / "sft", questions, temperature=1.0)
    records = []
    for i, item in enumerate(asked):
        group = texts[i * ANSWERS_EACH : (i + 1) * ANSWERS_EACH]
        scored = sorted((token_f1(text, item.answer), text) for text in group if text)
        if len(scored) < 2 or scored[-1][0] - scored[0][0] < LEAST_GAP:
            continue
        record = Preference(
            id=f"quickstart-{i}",
            prompt=(Message("user", item.train_questions[0]),),
            candidates=(Candidate(scored[-1][1]), Candidate(scored[0][1])),
            kind="compare",
            payload={"better": 0, "worse": 1, "strength": 1},
            author="token F1 against the docstring",
            author_kind="model",
            created=datetime.now(UTC).isoformat(),
        )
        records.append(record.to_json())
    return records


def summarise(
    settings: QuickstartSettings,
    compared: dict[str, float],
    answered: list[Answered],
    seconds: float,
) -> dict[str, Any]:
    """Writes summary.json and returns it; one that is there already keeps its seconds."""
    from openpalm.base.device import multiplies_bfloat16, processor
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.train.metrics import last, read_rows

    before, after = _before_and_after(answered)
    rows = {run: read_rows(settings.out / run / "metrics.jsonl") for run in ("pretrain", "sft")}
    path = settings.out / "summary.json"
    if path.exists():
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    newest = checkpoint.resolve(settings.out / "pretrain")
    summary = {
        "bits_per_byte": _last_bits(settings),
        **compared,
        "f1_before": before,
        "f1_after": after,
        "seconds": round(seconds, 1),
        "train_seconds": round(sum(last(r, "elapsed_s") for r in rows.values()), 1),
        "steps": last(rows["pretrain"], "step"),
        "parameters": checkpoint.load_config(newest).parameters,
        "processor": processor(),
        "native_bfloat16": multiplies_bfloat16(),
    }
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def shortcomings(summary: dict[str, Any], settings: QuickstartSettings) -> list[str]:
    """What is not worth showing, why, and what to do."""
    found = []
    if summary["bits_per_byte"] > summary["order5"]:
        found.append(
            f"The language model is poor: {summary['bits_per_byte']:.3f} bits a byte, where "
            f"counting five bytes back gives {summary['order5']:.3f}."
        )
    if summary["f1_after"] < GOOD_F1:
        found.append(
            f"The answers are poor: token F1 {summary['f1_after']:.2f}, where {GOOD_F1} is good."
        )
    if found:
        longer = max(15, round(3 * settings.minutes))
        found.append(
            f"{summary['steps']:,} steps in {settings.minutes:g} minutes are too few on this "
            f"processor; openpalm quickstart --minutes {longer} --out runs/longer takes more."
        )
    return found


def write_report(
    settings: QuickstartSettings,
    console: "Console",
    manifest: "Manifest",
    answered: list[Answered],
    preferred: Preferred | None,
    summary: dict[str, Any],
) -> None:
    from openpalm.report.page import Section, environment_section, table, write_page
    from openpalm.report.run_page import run_sections

    console.rule("6  report", align="left")
    train, val = manifest.splits["train"], manifest.splits["val"]
    rows = [
        ("processor", summary["processor"]),
        ("training text", f"{train.bytes:,} bytes, {train.tokens:,} tokens"),
        ("validation text", f"{val.bytes:,} bytes, {val.tokens:,} tokens"),
        ("validation bits a byte", round(summary["bits_per_byte"], 3)),
        ("gzip -9, bits a byte", round(summary["gzip"], 3)),
        ("order-5 model, bits a byte", round(summary["order5"], 3)),
        ("questions asked", len(answered)),
        ("token F1 before fine-tuning", round(summary["f1_before"], 3)),
        ("token F1 after fine-tuning", round(summary["f1_after"], 3)),
    ]
    runs = ["pretrain", "sft"]
    if preferred is not None:
        runs.append("dpo")
        rows += [
            ("judgements of its own answers", preferred.judgements),
            ("token F1 at temperature 1 before preferences", round(preferred.before, 3)),
            ("token F1 at temperature 1 after preferences", round(preferred.after, 3)),
        ]
    columns = ["question", "docstring", "before fine-tuning", "after"]
    shown = [(i.question, i.reference, i.before, i.after) for i in answered[:12]]
    page = settings.out / "report.html"
    write_page(
        page,
        "OpenPaLM quickstart",
        [
            Section("Summary", table(["", ""], rows)),
            Section("Questions in held-out words", table(columns, shown)),
            *(section for run in runs for section in run_sections(settings.out / run)),
            environment_section(),
        ],
    )
    console.print(f"report: {page}")


def questions_about(settings: QuickstartSettings) -> "list[QuestionAnswer]":
    """As many of the library's top-level functions and classes as the budget can teach."""
    from openpalm.data.corpus.builtin import question_answers
    from openpalm.train.sizing.budget import facts

    everything = [item for item in question_answers() if item.name.count(".") == 1]
    random.Random(settings.seed).shuffle(everything)
    everything.sort(key=lambda item: item.name != EXAMPLE)
    return everything[: facts(settings.minutes * 60 * FINETUNE_SHARE, _tokens_per_s(settings))]


def _write_questions(path: Path, names: "list[QuestionAnswer]", seed: int) -> int:
    """Every name in every training phrasing, in one shuffled order; returns how many."""
    rows = []
    for item in names:
        for asked in item.train_questions:
            turns = [("user", asked), ("assistant", item.answer)]
            rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    random.Random(seed).shuffle(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return len(rows)


def _answers(run_directory: Path, questions: list[str], *, temperature: float = 0.0) -> list[str]:
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import tokenizer_of
    from openpalm.data.text.conversation import Message, render, stop_ids
    from openpalm.generate.engine import Engine, Request
    from openpalm.generate.sampling import Sampling

    directory = checkpoint.resolve(run_directory)
    tokenizer = tokenizer_of(directory)
    assert tokenizer is not None
    engine = Engine(checkpoint.load(directory), slots=32, owned=True)
    stops = stop_ids(tokenizer)
    prompts = [
        render(tokenizer, [Message("user", q)], add_generation_prompt=True).ids for q in questions
    ]
    requests = [
        Request(ids, 64, Sampling(temperature=temperature, seed=i), stops)
        for i, ids in enumerate(prompts)
    ]
    return [tokenizer.decode(ids).strip() for ids in engine.completions(requests)]


def _before_and_after(answered: list[Answered]) -> list[float]:
    """Mean token F1 of either's answers."""
    references = [item.reference for item in answered]
    sides = zip(*((item.before, item.after) for item in answered), strict=True)
    return [_mean_f1(side, references) for side in sides]


def _mean_f1(texts: Sequence[str], references: Sequence[str]) -> float:
    from openpalm.evaluate.token_f1 import token_f1

    return fmean(token_f1(*pair) for pair in zip(texts, references, strict=True))


def _last_row(path: Path) -> dict:
    from openpalm.train.metrics import read_rows

    return read_rows(path)[-1]


def _tokens_per_s(settings: QuickstartSettings) -> float:
    """The pace of pretraining: the median of its steps."""
    from openpalm.train.metrics import read_rows

    rows = read_rows(settings.out / "pretrain" / "metrics.jsonl")
    return median(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)


def _last_bits(settings: QuickstartSettings) -> float:
    from openpalm.train.metrics import last, read_rows

    return last(read_rows(settings.out / "pretrain" / "metrics.jsonl"), "val_bits_per_byte")


def _next_commands(best: Path, settings: QuickstartSettings, console: "Console") -> None:
    commands = [
        f'openpalm sample {best} --chat "What does {EXAMPLE} do?" --stream',
        f"openpalm serve {best}",
        f'openpalm sample {settings.out}/pretrain "Return the"',
        "openpalm data prepare YOUR_TEXTS --out data/mine --tokenizer bpe:8192",
        "openpalm train --model palm-14m --data data/mine --out runs/mine --minutes 30",
        "openpalm report runs/mine",
    ]
    console.rule("next, try", align="left")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)
