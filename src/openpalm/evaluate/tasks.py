"""Tasks of lm-evaluation-harness: loaded by name, with rows from the Hub or from files, and run.

The library is imported inside the functions; what it prints is hidden, its errors become DataError.
"""

import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openpalm.errors import DataError, OpenPalmError, one_line
from openpalm.evaluate.harness import HarnessModel, as_lm
from openpalm.evaluate.task_code import no_scripts, refuse_code, sandboxed

FEWSHOT_SEED = 1234
"""Seed of the choice of examples for few-shot prompts; the library's default."""
RESAMPLES = 1000
"""Bootstrap resamples for the standard error of a metric that is no mean, such as perplexity."""
_LOADING = "task "
_SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
_ROW_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task, or of a group of tasks."""

    task: str
    metric: str
    value: float
    stderr: float | None
    rows: int | None
    """number of rows scored"""
    shots: int | None
    """number of examples in each prompt"""
    higher_is_better: bool | None
    version: str | None
    """version of the task in the library"""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their rows, which have been read."""

    names: tuple[str, ...]
    loaded: dict[str, Any]
    shots: int | None
    limit: int | None
    chat: bool
    warnings: dict[str, None]
    """what the library warned of, each once"""
    code: bool = False
    """whether definitions may run code"""

    def warning_lines(self) -> list[str]:
        return [f"lm-evaluation-harness warns: {text}" for text in self.warnings]


def task_names(names: str) -> tuple[str, ...]:
    """The names in --tasks, each once."""
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def load_tasks(
    names: Sequence[str],
    path: Path | None = None,
    *,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    code_option: str = "code=True",
    code: bool = False,
) -> Tasks:
    """Reads the rows of the tasks. `path` is a folder with task definitions (.yaml) and rows.

    A folder PATH/TASK with files such as test.jsonl or train.parquet holds the rows of the splits
    of TASK, in the format of the dataset that its definition names, which is then not fetched.
    `shots` is the number of examples in a prompt (default: the task's own), `limit` the number of
    rows of each task (default all), `chat` whether prompts are conversations. `code` says that
    definitions below `path` may run Python code; `code_option` is the user's word for it.
    """
    if path is not None and not path.is_dir():
        raise DataError(f"--task-path {path}: no such folder; check the path")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    warnings: dict[str, None] = {}
    if path is not None and not code:
        refuse_code(path, code_option)
    own = _own_tasks(path)
    for name in names:
        manager = _library_tasks() if own is None or name not in own.task_index else own
        if name not in manager.task_index:
            raise DataError(_unknown(name, manager.all_tasks, path))
        folder = None if path is None or not (path / name).is_dir() else path / name
        scripts = nullcontext() if code or manager is not own else no_scripts(code_option)
        with _quiet(_LOADING + name, warnings), _templates(code=code), scripts:
            if folder is None:
                found = manager.load([name])
            else:
                found = _load_with_rows(manager, name, row_files(folder))
        for kind, entries in loaded.items():
            entries |= found.get(kind, {})
    for name, task in loaded["tasks"].items():
        with _quiet(_LOADING + name, warnings), _templates(code=code):
            _prepare(task, shots)
    return Tasks(tuple(names), loaded, shots, limit, chat, warnings, code)


def run_tasks(model: HarnessModel, tasks: Tasks, *, resamples: int = RESAMPLES) -> list[TaskScore]:
    """Every metric of every task, for the model."""
    with _quiet("the tasks", tasks.warnings), _templates(code=tasks.code):
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples in every run
        found = import_module("lm_eval.evaluator").evaluate(
            as_lm(model),
            tasks.loaded,
            limit=tasks.limit,
            bootstrap_iters=resamples,
            log_samples=False,
            apply_chat_template=tasks.chat,
            fewshot_as_multiturn=tasks.chat,
        )
    return [score for name, row in found["results"].items() for score in _scores(found, name, row)]


def _templates(*, code: bool) -> AbstractContextManager[None]:
    return nullcontext() if code else sandboxed()


@cache
def _library_tasks() -> Any:
    """The definitions that come with the library; reading these thousands takes seconds."""
    with _quiet("the library"):
        return import_module("lm_eval.tasks").TaskManager()


def _own_tasks(path: Path | None) -> Any:
    """The definitions below --task-path, or None without any."""
    if path is None or next(path.rglob("*.yaml"), None) is None:
        return None
    make = import_module("lm_eval.tasks").TaskManager
    with _quiet(f"--task-path {path}"):
        own = make(include_path=str(path), include_defaults=False)
        # A group may name tasks of the library.
        return make(include_path=str(path)) if own.all_groups else own


def _prepare(task: Any, shots: int | None) -> None:
    """Sets the number of examples; a task that has 0 in its definition keeps it."""
    own = task.get_config("num_fewshot")
    if own != 0 and (shots is not None or own is None):
        task.set_config(key="num_fewshot", value=shots or 0)


def row_files(folder: Path) -> dict[str, Path]:
    """The files with the rows of a task, by split."""
    files = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in _ROW_FILES}
    if len({_ROW_FILES[file.suffix] for file in files.values()}) != 1:
        raise DataError(
            f"{folder}: must hold files such as test.jsonl, or .parquet files, and not both"
        )
    return files


def _load_with_rows(manager: Any, name: str, files: dict[str, Path]) -> dict[str, Any]:
    """The task with the rows of these files in place of its dataset."""
    changed = definition_with_rows(manager.task_index[name].yaml_path, name, files)
    with TemporaryDirectory() as folder:
        definition = Path(folder) / f"{name}.yaml"
        definition.write_text(json.dumps(changed), encoding="utf-8")  # JSON is YAML
        return manager.load([str(definition)])


def definition_with_rows(given: Path, name: str, files: dict[str, Path]) -> dict[str, Any]:
    """The definition of a task in the file `given`, with other rows."""
    return {
        "include": str(given),
        "task": name,
        "dataset_path": _ROW_FILES[next(iter(files.values())).suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        # A split that the definition names but the folder lacks would be an error.
        **{key: split if split in files else None for key, split in _SPLITS.items()},
    }


def _scores(found: dict[str, Any], name: str, row: dict[str, Any]) -> Iterator[TaskScore]:
    """The metrics in a row of the library's results: keys such as `acc,none`, `acc_stderr,none`."""
    better = found.get("higher_is_better", {}).get(name, {})
    rows = found.get("n-samples", {}).get(name, {}).get("effective")
    version = found.get("versions", {}).get(name)
    for key, value in row.items():
        metric, comma, kept = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not comma or metric.endswith("_stderr") or not is_number:
            continue
        stderr = row.get(f"{metric}_stderr,{kept}")
        yield TaskScore(
            task=name,
            metric=metric if kept == "none" else key,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            rows=rows,
            shots=found.get("n-shot", {}).get(name),
            higher_is_better=better.get(metric),
            version=None if version is None else str(version),
        )


def _unknown(name: str, known: Sequence[str], path: Path | None) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else "; see `lm_eval ls tasks`"
    where = "" if path is None else f" and {path} defines none with a readable .yaml"
    return f"--tasks {name}: lm-evaluation-harness has no such task{where}{hint}"


class _Collect(logging.Handler):
    """Keeps the warnings that the library logs, each once and in one line."""

    def __init__(self, into: dict[str, None]):
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.setdefault(" ".join(record.getMessage().split())[:300].rstrip(":"))


@contextmanager
def _quiet(what: str, warnings: dict[str, None] | None = None) -> Iterator[None]:
    """Hides what the library prints, and collects its warnings.

    Raises its errors as DataError, with the reason in a line.
    """
    logger = logging.getLogger("lm_eval")
    propagate, serial = logger.propagate, os.environ.get("DISABLE_MULTIPROC")
    handler = _Collect({} if warnings is None else warnings)
    logger.addHandler(handler)
    logger.propagate = False
    # Bootstrapping would start processes, each with a copy of this one.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    except OpenPalmError:
        raise
    except Exception as error:  # a definition or a row that the library cannot use
        raise DataError(_reason(what, error)) from None
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        if serial is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = serial


def _reason(what: str, error: Exception) -> str:
    line = one_line(error, 300) or "no message"
    reason = f"{what}: lm-evaluation-harness failed ({type(error).__name__}: {line})"
    if not what.startswith(_LOADING):
        return f"{reason}; check the number of examples and the rows"
    return (
        f"{reason}; to use rows of your own, put them in DIR/TASK/test.jsonl and give "
        "--task-path DIR"
    )
