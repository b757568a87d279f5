"""`openpalm eval`: loss of a checkpoint on prepared data or a text, and scores of tasks."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpalm.base.files import write_atomically
from openpalm.base.settings import check, check_field, parse
from openpalm.cli.model_options import ModelOptions
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.evaluate.perplexity import SplitLoss
    from openpalm.evaluate.scoring import Advance
    from openpalm.evaluate.tasks import TaskScore
    from openpalm.generate.engine import Engine

_MAX_TEXT_BYTES = 256 << 20
"""The tokens of --text are in memory at once; a small compressed file can hold far more."""
_OF_DATA = ("split", "document_mask")
_OF_TEXT = ("overlap", "text_field")
_OF_TASKS = ("task_path", "run_task_code", "num_fewshot", "limit", "apply_chat_template", "out")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(ModelOptions):
    """The checkpoint, and what it is measured on."""

    path: str
    """run, checkpoint or hub name"""
    data: Path | None = None
    """folder that `openpalm data prepare` wrote: the loss over a whole split"""
    text: Path | None = None
    """text file, or a .jsonl or .parquet with a text in every row: bits per byte, without
    preparation"""
    tasks: str | None = None
    """tasks of lm-evaluation-harness, with a comma between; needs pip install 'openpalm[eval]'"""
    split: Literal["val", "train"] = "val"
    """with --data: split of the data"""
    document_mask: bool = False
    """with --data: attention only within a document; for models trained with --document-mask"""
    sequence_length: int | None = None
    """with --data and --text: tokens in a window; default: the model's context"""
    overlap: int = 0
    """with --text: tokens at the end of a window that are the context of the next"""
    text_field: str = "text"
    """with --text: field or column of a row that has the text"""
    task_path: Path | None = None
    """with --tasks: folder with task definitions (.yaml), or with rows for tasks of the library
    (TASK/test.jsonl)"""
    run_task_code: bool = False
    """with --task-path: run the Python code that definitions in the folder name"""
    num_fewshot: int | None = None
    """with --tasks: examples in each prompt; default: the task's own number"""
    limit: int | None = None
    """with --tasks: rows of each task, from the first on; default: all"""
    apply_chat_template: bool = False
    """with --tasks: prompts are conversations, for a fine-tuned model"""
    batch_size: int = 16
    """with --tasks and --text: sequences at a time; 1 computes each exactly as the server does
    for one client"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """data type of weights and arithmetic"""
    force: bool = False
    """accept data, a tokenizer or an adapter that was made for another checkpoint"""
    out: Path | None = None
    """with --tasks: JSON file for the scores; default: tasks.json of the run, if PATH is a run"""
    json: bool = False
    """print one JSON object"""

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.data, self.text, self.tasks)) != 1:
            raise SettingsError("give one of --data, --text and --tasks")
        for name in ("sequence_length", "batch_size", "limit"):
            check_field(self, name, lambda v: v >= 1, "1 or more")
        for name in ("overlap", "num_fewshot"):
            check_field(self, name, lambda v: v >= 0, "0 or more")
        others = {"data": _OF_DATA, "text": _OF_TEXT, "tasks": _OF_TASKS}
        for owner, names in others.items():
            for name in names if getattr(self, owner) is None else ():
                if getattr(self, name) != getattr(type(self), name):
                    option = name.replace("_", "-")
                    raise SettingsError(f"--{option}: is an option of --{owner}; leave it out")
        if self.tasks is not None and self.sequence_length is not None:
            raise SettingsError("--sequence-length: --tasks uses the model's context; leave it out")
        if self.data is not None and self.tokenizer is not None:
            raise SettingsError("--tokenizer: the data has its own; leave it out")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        EvalSettings,
        argv,
        verb="eval",
        about="Measures a model: the loss over a split of prepared data, bits per byte of a text, "
        "or the scores of tasks of lm-evaluation-harness.",
        examples=[
            "openpalm eval runs/tiny --data data/docs",
            "openpalm eval runs/tiny --data data/docs --quantize int4 --json",
            "openpalm eval runs/tiny --text book.txt --overlap 512",
            "openpalm eval runs/tiny --tasks lambada_openai,piqa --limit 100 --out scores.json",
        ],
        positional=["path"],
    )
    if settings.tasks is not None:
        _tasks(settings, settings.tasks)
    elif settings.text is not None:
        _text(settings, settings.text)
    else:
        assert settings.data is not None
        _data(settings, settings.data)


def _data(settings: EvalSettings, data: Path) -> None:
    """The loss over a split of prepared data."""
    import torch
    from rich.console import Console

    from openpalm.base.device import pick_device, pick_dtype
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import give_adapter, weights_path
    from openpalm.data.dataset.shards import open_dataset
    from openpalm.evaluate.perplexity import dataset_loss
    from openpalm.generate.quantize import quantize
    from openpalm.train.initial_weights import check_reads

    dataset = open_dataset(data)
    directory = checkpoint.resolve(weights_path(settings.path), training=settings.verify)
    checkpoint.check_generates_text(directory)
    remedy = "prepare the data with the model's tokenizer"
    if forced := check_reads(directory, dataset.tokenizer(), remedy, force=settings.force):
        print(f"eval: warning: {forced}", file=sys.stderr)
    device = pick_device(settings.device)
    model = checkpoint.load(directory, str(device))
    give_adapter(model, settings.adapter, directory, force=settings.force)
    in_bfloat16 = pick_dtype(settings.dtype, device) == "bfloat16"
    weights = settings.quantize or ("bfloat16" if in_bfloat16 else "float32")
    if weights != "float32":
        model = quantize(model, weights)
    length = settings.sequence_length or model.config.context
    with Console(stderr=True).status(f"reading the {settings.split} split"):
        result = dataset_loss(
            model,
            dataset,
            settings.split,
            length,
            torch.float32,
            document_mask=settings.document_mask,
        )
    row = {"split": settings.split, "weights": weights, **_measures(result, length)}
    _show_loss(settings, settings.split, row | {"document_mask": settings.document_mask})


def _text(settings: EvalSettings, text: Path) -> None:
    """Bits per byte of the texts in a file."""
    from openpalm.base.progress_bar import ProgressBar
    from openpalm.cli.common import serving_model
    from openpalm.data.corpus.document_reader import read_documents
    from openpalm.errors import DataError
    from openpalm.evaluate.text import text_loss, text_windows

    texts, size = [], 0
    for document in read_documents([str(text)], text_field=settings.text_field):
        if document.ids is None and document.text:
            texts.append(document.text)
            size += len(document.text.encode())
        if size > _MAX_TEXT_BYTES:
            raise DataError(
                f"--text {text}: more than {_MAX_TEXT_BYTES:,} bytes of text; prepare it with "
                "`openpalm data prepare`, and give --data"
            )
    if not texts:
        raise DataError(f"--text {text}: has no text; give a text file")
    engine, tokenizer, _ = serving_model(settings.path, settings, slots=settings.batch_size)
    length = settings.sequence_length or engine.model.config.context
    wanted = f"below the {length} tokens of a window"
    check(settings.overlap < length, "overlap", settings.overlap, wanted)
    windows = text_windows(tokenizer, texts, length, settings.overlap)
    with ProgressBar("scoring", len(windows)) as bar:
        result = text_loss(engine, windows, size, bar.advance)
    row = {"text": str(text), "weights": _weights(engine), **_measures(result, length)}
    _show_loss(settings, str(text), row | {"overlap": settings.overlap})


def _weights(engine: "Engine") -> str:
    return engine.weights or str(engine.model.embedding.dtype).removeprefix("torch.")


def _measures(result: "SplitLoss", length: int) -> dict[str, Any]:
    return {
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "sequence_length": length,
    }


def _show_loss(settings: EvalSettings, name: str, row: dict[str, Any]) -> None:
    if settings.json:
        print(json.dumps(row))
        return
    overlap = f" that overlap by {row['overlap']}" if row.get("overlap") else ""
    print(
        f"{name}: {row['nats_per_token']:.4f} nats per token, "
        f"{row['bits_per_byte']:.4f} bits per byte "
        f"({row['tokens']:,} tokens in windows of {row['sequence_length']}{overlap})"
    )


def _tasks(settings: EvalSettings, names: str) -> None:
    """The scores of tasks of lm-evaluation-harness."""
    from rich.console import Console

    from openpalm.cli.common import serving_model
    from openpalm.evaluate.harness import HarnessModel, check_installed
    from openpalm.evaluate.tasks import load_tasks, run_tasks, task_names

    check_installed("--tasks")
    wanted = task_names(names)
    check(bool(wanted), "tasks", repr(names), "names of tasks")
    out = _scores_file(settings)
    engine, tokenizer, _ = serving_model(settings.path, settings, slots=settings.batch_size)
    with Console(stderr=True).status("reading the tasks (some seconds)"):
        tasks = load_tasks(
            wanted,
            settings.task_path,
            shots=settings.num_fewshot,
            limit=settings.limit,
            chat=settings.apply_chat_template,
            code=settings.run_task_code,
            code_option="--run-task-code",
        )
    model = HarnessModel(engine, tokenizer, progress=_visible_progress(), seed=0)
    scores = run_tasks(model, tasks)
    for line in (*tasks.warning_lines(), *model.note_lines()):
        print(f"eval: {line}", file=sys.stderr)
    result = _results(settings, _weights(engine), scores)
    if out is not None:
        write_atomically(out, json.dumps(result, indent=1) + "\n")
    if settings.json:
        print(json.dumps(result))
    else:
        _print_scores(result)
        if out is not None:
            print(out)


def _visible_progress() -> Any:
    """A progress bar on the standard error of now, while the library's output is hidden."""
    from openpalm.base.progress_bar import ProgressBar

    visible = sys.stderr

    @contextmanager
    def shown(label: str, total: int) -> "Iterator[Advance]":
        with redirect_stderr(visible), ProgressBar(label, total) as bar:
            yield bar.advance

    return shown


def _scores_file(settings: EvalSettings) -> Path | None:
    """The file for the scores; a run's own tasks.json is shown in its report."""
    from openpalm.base.typed import home
    from openpalm.report.task_scores import SCORES_FILE

    if settings.out is not None:
        if settings.out.is_dir():
            raise SettingsError(f"--out {settings.out}: is a directory; give the name of a file")
        return settings.out
    run = Path(home(settings.path))
    return run / SCORES_FILE if (run / "metrics.jsonl").is_file() else None


def _results(settings: EvalSettings, weights: str, scores: "Sequence[TaskScore]") -> dict[str, Any]:
    from dataclasses import asdict

    from openpalm import __version__

    return {
        "openpalm": __version__,
        "model": settings.path,
        "weights": weights,
        "limit": settings.limit,
        "chat_template": settings.apply_chat_template,
        "scores": [asdict(score) for score in scores],
    }


def _print_scores(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from openpalm.report.task_scores import COLUMNS, score_rows

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in score_rows(result["scores"]):
        table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    Console(width=max(80, Console().width)).print(table)
