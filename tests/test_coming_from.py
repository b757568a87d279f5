"""docs/coming-from.md names options that the program has, files that exist and tests that run."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from openpalm.cli.main import VERBS, main

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| original |")
]
OF_DATA = ("prepare", "build", "inspect", "blocks", "push")


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@cache
def options(verb: str) -> set[str]:
    """The options in the verb's --help."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*verb.split(), "--help"]) == 0, verb
    return set(re.findall(r"^ +(--[\w.-]+)", said.getvalue(), re.MULTILINE))


def verbs_of(row: list[str]) -> list[str]:
    """The verbs that the row's commands call, with `data` and what follows it as one."""
    found = []
    for first, second in re.findall(r"openpalm ([\w-]+)(?: ([a-z]+))?", row[1]):
        assert first in VERBS, row
        if first == "data":
            assert second in OF_DATA, row
        found.append(f"data {second}" if first == "data" else first)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row(row: list[str]):
    assert len(row) == 3
    ours = re.sub(r"torchrun .*?-m (?=openpalm)", "", " ".join(code(row[1])))
    given = re.findall(r"(?<![\w-])--[\w.-]+", ours)
    # An option without a command is of a command in the rows above it.
    known = set[str]()
    for verb in (*verbs_of(row), "train", "sample", "serve", "eval", "data prepare", "data blocks"):
        known |= options(verb)
    assert {name.replace("_", "-") for name in given} <= known
    for test in code(row[2]):
        check_test(test)


def check_test(name: str) -> None:
    file, _, function = name.partition("::")
    assert (ROOT / file).is_file(), name
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions or (not function and functions), name


def test_names_outside_the_tables():
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    for word in code(text):
        if word.startswith("tests/"):
            check_test(word)
    for file in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", PAGE):
        assert (ROOT / "docs" / file).is_file(), file
    for recipe in re.findall(r"configs/([\w.-]+\.yaml)", PAGE):
        assert (ROOT / "configs" / recipe).is_file(), recipe
    sections = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert sections == [
        "conceptofmind/PaLM",
        "palm-rlhf-pytorch",
        "mesh-transformer-jax",
        "nanoPALM",
    ]
