"""Several tasks as one fine-tuning set: files, how often each is drawn, and texts around fields.

The recipe of FLAN (Wei et al. 2021, "Finetuned Language Models Are Zero-Shot Learners"): every
task is phrased by templates of its own, and tasks are drawn in proportion to their examples, up to
a maximum rate (the examples-proportional mixing of Raffel et al. 2019, section 3.5.2). A template
is text with the names of fields in braces; nothing in it is ever run.
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
from openpalm.base.permutation import mix64
from openpalm.base.typed import at, expect, home, is_number
from openpalm.base.yaml_file import read_yaml
from openpalm.data.corpus.documents import read_rows
from openpalm.data.corpus.sources import is_rows
from openpalm.data.rows.demonstration_files import read_demonstrations, usable
from openpalm.data.rows.preferences import Messages, Usable, check_prompt, says
from openpalm.data.rows.usable import Unusable, collected
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

SUFFIXES = (".yaml", ".yml")
_FIELD = re.compile(r"[^\W\d][\w -]*")

Fill = Callable[[dict[str, Any]], str]


class Template(NamedTuple):
    """How a row is asked and answered."""

    prompt: Fill
    answer: Fill


class Task(NamedTuple):
    data: Path
    weight: float | None = None
    """how often it is drawn, beside the others' weights"""
    templates: tuple[Template, ...] = ()
    """none where the file's own form says what is asked and answered"""


class Mixture(NamedTuple):
    tasks: tuple[Task, ...]
    cap: int | None = None
    """examples beyond which a task is not drawn more often"""

    def shares(self, sizes: Sequence[int]) -> list[int]:
        """How many of an epoch's draws each task has, of tasks that have `sizes` examples.

        In proportion to weights where they are given (an epoch has as many draws as there are
        examples); else to the examples, and a task has at most `cap`.
        """
        weights = [Fraction(task.weight) for task in self.tasks if task.weight is not None]
        if not weights:
            return [min(size, self.cap or size) for size in sizes]
        total, whole = sum(sizes), sum(weights)
        exact = [total * weight / whole for weight in weights]
        shares = [max(1, floor(share)) for share in exact]
        # What rounding left over goes to those that lost most by it.
        order = sorted(range(len(exact)), key=lambda i: floor(exact[i]) - exact[i])
        for i in order[: max(0, total - sum(shares))]:
            shares[i] += 1
        return shares

    def digest(self, path: Path) -> str:
        """A hash of the file and of all that it names."""
        digest = hashlib.sha256(path.read_bytes())
        for task in self.tasks:
            if task.data != path:
                digest.update(hashlib.sha256(task.data.read_bytes()).digest())
        return digest.hexdigest()


def is_mixture(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_mixture(path: Path) -> Mixture:
    """The tasks of a YAML file, or the one task that is any other file.

        cap: 3000                                 # the maximum rate; or weights, below
        tasks:
          - data: sums.jsonl                      # beside the YAML file
            weight: 2
            templates:
              - {prompt: "{question}", answer: "{answer}"}

    Raises DataError naming the file and the entry, SettingsError where it is no YAML.
    """
    if not is_mixture(path):
        return Mixture((Task(path),))
    content = read_yaml(path)
    return at(str(path), _mixture, content, path.parent)


def conversations(task: Task, seed: int) -> Usable[Messages]:
    """The task's rows as conversations; `seed` draws the template of each."""
    if not task.templates:
        return read_demonstrations(task.data)
    if not is_rows(task.data):
        raise DataError(f"{task.data}: templates fill rows of .jsonl or .jsonl.gz; convert it")
    made = []
    for number, (where, row) in enumerate(read_rows(task.data)):
        template = task.templates[mix64(mix64(seed) + number) % len(task.templates)]
        made.append((where, at(where, _filled, template, row)))
    if not made:
        raise DataError(f"{task.data}: is empty; give a file with at least one row")
    return collected(made)


def parse_template(text: str) -> Fill:
    """A text with {field} in it, as a function of a row; {{ and }} are braces.

    Raises DataError for anything but the plain name of a field: no attribute, index or format.
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{shown(text)}: {error}; write {{{{ for a brace that is text") from None
    for _, field, how, conversion in parts:
        if field is not None and (how or conversion or not _FIELD.fullmatch(field)):
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


def _filled(template: Template, row: dict[str, Any]) -> Messages | str:
    prompt, answer = (Message("user", template.prompt(row)),), says(template.answer(row))
    try:
        check_prompt(prompt)
    except Unusable as error:
        return error.reason
    return usable(prompt + answer)


def _mixture(content: dict[str, Any], folder: Path) -> Mixture:
    _known(content, {"tasks", "cap"})
    tasks, cap = content.get("tasks"), content.get("cap")
    expect("tasks", tasks, "a list of tasks", lambda v: isinstance(v, list) and v != [])
    expect("cap", cap, "a whole number above 0", lambda v: v is None or (type(v) is int and v > 0))
    assert isinstance(tasks, list)
    made = tuple(at(f"tasks[{i}]", _task, task, folder) for i, task in enumerate(tasks))
    weighted = sum(task.weight is not None for task in made)
    if weighted not in (0, len(made)):
        raise DataError(f"{weighted} of {len(made)} tasks have a weight; give each one, or none")
    if weighted and cap is not None:
        raise DataError("has weights and a cap; give the one or the other")
    return Mixture(made, cap)


def _task(task: object, folder: Path) -> Task:
    expect("task", task, "data, weight and templates", lambda v: isinstance(v, dict))
    assert isinstance(task, dict)
    _known(task, {"data", "weight", "templates"})
    data, weight, templates = (task.get(name) for name in ("data", "weight", "templates"))
    expect("data", data, "the path of its data", lambda v: isinstance(v, str) and v != "")
    wanted = "a number above 0"
    expect("weight", weight, wanted, lambda v: v is None or (is_number(v) and 1e-9 < v < 1e9))
    wanted = "a list of templates"
    expect("templates", templates, wanted, lambda v: v is None or (isinstance(v, list) and v != []))
    made = (at(f"templates[{i}]", _template, t) for i, t in enumerate(templates or ()))
    return Task(folder / home(str(data)), weight, tuple(made))


def _template(template: object) -> Template:
    expect("template", template, "a prompt and an answer", lambda v: isinstance(v, dict))
    assert isinstance(template, dict)
    _known(template, {"prompt", "answer"})
    return Template(*_texts(template))


def _texts(template: dict[str, Any]) -> Iterator[Fill]:
    for name in ("prompt", "answer"):
        text = template.get(name)
        expect(
            name,
            text,
            "a text with {field} in it",
            lambda v: isinstance(v, str) and v.strip() != "",
        )
        yield at(name, parse_template, str(text))


def _known(mapping: dict[Any, Any], names: set[str]) -> None:
    if unknown := [name for name in mapping if name not in names]:
        raise DataError(f"{shown(unknown[0])} is unknown; known are {', '.join(sorted(names))}")
