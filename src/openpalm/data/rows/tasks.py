"""A mixture of fine-tuning tasks from a YAML file: data, weight and prompt templates of each task.

The recipe of FLAN (Wei et al. 2021, "Finetuned Language Models Are Zero-Shot Learners"): each task
has its own templates, and is sampled in proportion to its number of examples up to a cap (Raffel
et al. 2019, section 3.5.2, examples-proportional mixing). A template is text with {field} names; it
is never executed.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import floor
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from openpalm.base.console import shown
from openpalm.base.hub import PREFIX, fetch_dataset_file
from openpalm.base.permutation import mix64
from openpalm.base.typed import at, expect, home, is_number
from openpalm.base.yaml_file import packaged, read_yaml
from openpalm.data.corpus.json_lines import read_rows
from openpalm.data.corpus.sources import is_rows
from openpalm.data.rows.messages import Messages, assistant_turn, check_prompt
from openpalm.data.rows.read_result import ReadResult, UnusableRow, collect_results
from openpalm.data.rows.readers.demonstrations import check_demonstration, read_demonstrations
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

SUFFIXES = (".yaml", ".yml")
_FIELD = re.compile(r"[^\W\d][\w -]*")

FillTemplate = Callable[[dict[str, Any]], str]
"""row -> text of a template with the row's fields in it"""


class Template(NamedTuple):
    """The prompt and the completion of a row."""

    prompt: FillTemplate
    completion: FillTemplate


class Task(NamedTuple):
    data: Path
    weight: float | None = None
    """sampling weight, relative to those of the other tasks"""
    templates: tuple[Template, ...] = ()
    """empty if the rows have a format of their own (data/rows/row_formats.py)"""
    address: str | None = None
    """where `data` came from, if it is the local copy of a file on the Hub"""

    @property
    def name(self) -> str:
        """The task's data as the user wrote it."""
        return self.address or str(self.data)


class Mixture(NamedTuple):
    tasks: tuple[Task, ...]
    cap: int | None = None
    """largest number of examples that counts for a task's share (FLAN's maximum rate)"""

    def shares(self, sizes: Sequence[int]) -> list[int]:
        """The number of samples of each task in an epoch; `sizes` are the tasks' examples.

        With weights, an epoch has as many samples as there are examples, divided by weight.
        Without, each task has its own number of examples, at most `cap`.
        """
        weights = [Fraction(task.weight) for task in self.tasks if task.weight is not None]
        if not weights:
            return [min(size, self.cap or size) for size in sizes]
        total, whole = sum(sizes), sum(weights)
        # Fractions: the shares must be the same on every machine, for a run that resumes.
        exact = [total * weight / whole for weight in weights]
        shares = [max(1, floor(share)) for share in exact]
        # The largest remainders get the samples that rounding down left over.
        order = sorted(range(len(exact)), key=lambda i: floor(exact[i]) - exact[i])
        for i in order[: max(0, total - sum(shares))]:
            shares[i] += 1
        return shares

    def digest(self, path: Path) -> str:
        """A hash of the YAML file and of all data files in it."""
        path = packaged(path)
        digest = hashlib.sha256(path.read_bytes())
        for task in self.tasks:
            if task.data != path:
                digest.update(hashlib.sha256(task.data.read_bytes()).digest())
        return digest.hexdigest()


def is_mixture(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_mixture(path: Path) -> Mixture:
    """The tasks of a YAML file; any other file is a single task.

        cap: 3000                                 # or weights, below
        tasks:
          - data: sums.jsonl                      # relative to the YAML file, or hf://
            weight: 2
            templates:
              - {prompt: "{question}", answer: "{answer}"}

    Raises DataError naming the file and the entry, SettingsError if it is not YAML.
    """
    if not is_mixture(path):
        return Mixture((Task(path),))
    path = packaged(path)
    content = read_yaml(path)
    return at(str(path), _parse_mixture, content, path.parent)


def read_conversations(task: Task, seed: int) -> ReadResult[Messages]:
    """Reads a task's rows as conversations; `seed` chooses the template of each row."""
    if not task.templates:
        return read_demonstrations(task.data)
    if not is_rows(task.data):
        raise DataError(f"{task.data}: templates fill rows of .jsonl or .jsonl.gz; convert it")
    found = []
    for number, (where, row) in enumerate(read_rows(task.data)):
        # A hash of seed and row number: the choice does not depend on the order of reading.
        template = task.templates[mix64(mix64(seed) + number) % len(task.templates)]
        found.append((where, at(where, _fill, template, row)))
    if not found:
        raise DataError(f"{task.data}: is empty; give a file with at least one row")
    return collect_results(found)


def parse_template(text: str) -> FillTemplate:
    """Compiles a text with {field} names to a function of a row; {{ and }} are literal braces.

    Raises DataError unless each is the plain name of a field. `str.format` would also evaluate
    attributes, indices and format specifications, which reach beyond the row.
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{shown(text)}: {error}; write {{{{ for a brace that is text") from None
    for _, field, specification, conversion in parts:
        if field is not None and (specification or conversion or not _FIELD.fullmatch(field)):
            raise DataError(
                f"{shown(text)}: {shown('{' + field + '}')} is not the plain name of a field"
            )

    def fill(row: dict[str, Any]) -> str:
        return "".join(
            literal + ("" if field is None else _field_text(row, field))
            for literal, field, _, _ in parts
        )

    return fill


def _field_text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    expect(field, value, "a text or a number", lambda v: isinstance(v, str) or is_number(v))
    return str(value)


def _fill(template: Template, row: dict[str, Any]) -> Messages | str:
    prompt = (Message("user", template.prompt(row)),)
    completion = assistant_turn(template.completion(row))
    try:
        check_prompt(prompt)
    except UnusableRow as error:
        return error.reason
    return check_demonstration(prompt + completion)


def _parse_mixture(content: dict[str, Any], folder: Path) -> Mixture:
    _refuse_unknown(content, {"tasks", "cap"})
    tasks, cap = content.get("tasks"), content.get("cap")
    expect("tasks", tasks, "a list of tasks", lambda v: isinstance(v, list) and v != [])
    expect("cap", cap, "a whole number above 0", lambda v: v is None or (type(v) is int and v > 0))
    assert isinstance(tasks, list)
    made = tuple(at(f"tasks[{i}]", _parse_task, task, folder) for i, task in enumerate(tasks))
    weighted = sum(task.weight is not None for task in made)
    if weighted not in (0, len(made)):
        raise DataError(f"{weighted} of {len(made)} tasks have a weight; give each one, or none")
    if weighted and cap is not None:
        raise DataError("has weights and a cap; give the one or the other")
    return Mixture(made, cap)


def _parse_task(task: object, folder: Path) -> Task:
    expect("task", task, "data, weight and templates", lambda v: isinstance(v, dict))
    assert isinstance(task, dict)
    _refuse_unknown(task, {"data", "weight", "templates"})
    data, weight, templates = (task.get(name) for name in ("data", "weight", "templates"))
    expect("data", data, "the path of its data", lambda v: isinstance(v, str) and v != "")
    wanted = "a number above 0"
    expect("weight", weight, wanted, lambda v: v is None or (is_number(v) and 1e-9 < v < 1e9))
    wanted = "a list of templates"
    expect("templates", templates, wanted, lambda v: v is None or (isinstance(v, list) and v != []))
    made = (at(f"templates[{i}]", _parse_task_template, t) for i, t in enumerate(templates or ()))
    made = tuple(made)  # before the download: a wrong template is reported at once
    if str(data).startswith(PREFIX):
        return Task(fetch_dataset_file(str(data)), weight, made, str(data))
    return Task(folder / home(str(data)), weight, made)


def _parse_task_template(template: object) -> Template:
    expect("template", template, "a prompt and an answer", lambda v: isinstance(v, dict))
    assert isinstance(template, dict)
    _refuse_unknown(template, {"prompt", "answer"})
    return Template(*_parse_texts(template))


def _parse_texts(template: dict[str, Any]) -> Iterator[FillTemplate]:
    for name in ("prompt", "answer"):
        text = template.get(name)
        expect(
            name,
            text,
            "a text with {field} in it",
            lambda v: isinstance(v, str) and v.strip() != "",
        )
        yield at(name, parse_template, str(text))


def _refuse_unknown(mapping: dict[Any, Any], names: set[str]) -> None:
    if unknown := [name for name in mapping if name not in names]:
        raise DataError(f"{shown(unknown[0])} is unknown; known are {', '.join(sorted(names))}")
