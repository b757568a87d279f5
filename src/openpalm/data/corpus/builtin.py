"""Built-in corpus from CPython itself: the language reference and the library's docstrings.

Also questions with answers, made from the docstrings. Parses the library with `ast`, without
importing it, in a fixed order: one Python version always gives the same documents.
"""

import ast
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from openpalm.data.corpus.document import Document
from openpalm.errors import DataError

TRAIN_PHRASINGS = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "Tell me about {name}.",
    "Describe {name} in one sentence.",
    "I found {name} in some code. What is it?",
)
# Never trained on: a correct answer to these shows that the model learnt the name, rather than
# the wording of a question.
HELD_OUT_PHRASINGS = (
    "Can you tell me what {name} does?",
    "How would you summarise {name}?",
)

# Many docstrings are one short sentence. As documents of their own they would fill the corpus with
# end-of-text tokens; so neighbours in a module share a document of about a paragraph.
DOCUMENT_CHARACTERS = 400
ANSWER_CHARACTERS = 200
SIGNATURE_CHARACTERS = 240
# Tests, third-party packages, and an old copy of the language (lib2to3).
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "turtledemo", "lib2to3", "_vendor", "lib-dynload"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "__pycache__"}
# Public modules with their docstrings in a private file.
PUBLIC_MODULES = {
    "_pydecimal": "decimal",
    "_pydatetime": "datetime",
    "_pyio": "io",
    "_collections_abc": "collections.abc",
}


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A public name of the standard library and the first sentence of its docstring."""

    name: str
    answer: str

    @property
    def train_questions(self) -> tuple[str, ...]:
        return tuple(phrasing.format(name=self.name) for phrasing in TRAIN_PHRASINGS)

    @property
    def held_out_questions(self) -> tuple[str, ...]:
        return tuple(phrasing.format(name=self.name) for phrasing in HELD_OUT_PHRASINGS)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One docstring: module, dotted name, heading line, dedented text."""

    module: str
    name: str
    heading: str
    text: str
    callable: bool


def python_docs() -> Iterator[Document]:
    """The language reference by topic, then the library's docstrings by module; about 2.5 MB.

    Raises DataError if this Python was installed without the library's source files.
    """
    yield from _topics()
    group: list[_Entry] = []
    for entry in _entries():
        full = sum(len(one.text) for one in group) >= DOCUMENT_CHARACTERS
        if group and (full or entry.module != group[0].module):
            yield _joined(group)
            group = []
        group.append(entry)
    if group:
        yield _joined(group)


def question_answers() -> list[QuestionAnswer]:
    """One for each public class or function, if its docstring starts with a sentence."""
    found: dict[str, QuestionAnswer] = {}
    for entry in _entries():
        public = not any(part.startswith("_") for part in entry.name.split("."))
        if entry.callable and public and entry.name not in found:
            answer = _summary(entry.text)
            if answer is not None:
                found[entry.name] = QuestionAnswer(entry.name, answer)
    return list(found.values())


BUILTINS: dict[str, Callable[[], Iterator[Document]]] = {"python-docs": python_docs}


def question_rows(items: Iterable[QuestionAnswer], seed: int) -> list[dict[str, Any]]:
    """Conversations that ask for every item in every training phrasing, shuffled."""
    turns = [(question, item.answer) for item in items for question in item.train_questions]
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in turns
    ]
    random.Random(seed).shuffle(rows)
    return rows


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a separate package in some distributions; the docstrings remain
        return
    for name in sorted(topics):
        yield Document(topics[name].strip() + "\n", f"builtin:python-docs:topics.{name}")


def _joined(group: list[_Entry]) -> Document:
    text = "\n\n".join(f"{entry.heading}\n{entry.text}" for entry in group)
    return Document(text + "\n", f"builtin:python-docs:{group[0].name}")


@cache
def _entries() -> tuple[_Entry, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    entries = tuple(entry for path in _sources(root) for entry in _entries_of(path, root))
    if not entries:
        raise DataError(
            f"builtin:python-docs: no library sources in {root}; install them, or name a text file"
        )
    return entries


def _sources(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _entries_of(path: Path, root: Path) -> Iterator[_Entry]:
    parts = [part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"]
    if not parts or parts[-1].startswith(("__main__", "_sysconfigdata")):
        return
    module = ".".join(parts)
    module = PUBLIC_MODULES.get(module, module)
    tree = _parsed(path)
    if tree is None:
        return
    if text := _docstring(tree):
        yield _Entry(module, module, f"module {module}", text, False)
    seen: set[str] = set()
    for name, heading, node in _definitions(tree.body, module, False):
        text = _docstring(node)
        if text and name not in seen:
            seen.add(name)
            yield _Entry(module, name, heading, text, True)


def _parsed(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None  # the library has files with deliberate syntax errors


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _docstring(node: _Definition | ast.Module) -> str | None:
    text = ast.get_docstring(node)
    return text and text.encode("utf-8", "replace").decode().replace("\0", "?").strip()


def _definitions(
    body: list[ast.stmt], prefix: str, in_class: bool
) -> Iterator[tuple[str, str, _Definition]]:
    """(dotted name, heading, node) at module and class level, also inside if and try."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            name = f"{prefix}.{node.name}"
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield name, f"class {name}({bases})" if bases else f"class {name}", node
            yield from _definitions(node.body, name, True)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            yield name, name + _signature(node, in_class), node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], prefix, in_class)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> str:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return ""
    first = [*node.args.posonlyargs, *node.args.args][:1]
    bound = in_class and first and first[0].arg in ("self", "cls", "metacls", "mcls")
    arguments = ast.unparse(node.args)
    if bound:
        arguments = re.sub(r"^\w+(, /)?(, )?", "", arguments)
    return f"({arguments})" if len(arguments) <= SIGNATURE_CHARACTERS else "(...)"


def _summary(text: str) -> str | None:
    """The first sentence of a docstring as one line, or None if it does not start with one."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    # Docstrings of C functions begin with a paragraph that repeats the signature.
    if re.match(r"[\w.]+\s?\([^)]*\)", paragraphs[0]):
        paragraphs = paragraphs[1:]
    if not paragraphs or not re.match(r"[A-Z]\w*[ ,]", paragraphs[0]) or ">>>" in paragraphs[0]:
        return None
    sentence = re.match(r".*?[.!?](?=\s+[A-Z\"'`(]|$)", paragraphs[0])
    answer = sentence[0] if sentence else paragraphs[0].rstrip(" :;,") + "."
    if len(answer.split()) < 4:
        return None
    if len(answer) > ANSWER_CHARACTERS:
        answer = answer[: ANSWER_CHARACTERS - 3].rsplit(" ", 1)[0].rstrip(" ,;:.") + "..."
    return answer
