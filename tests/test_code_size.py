"""The counter of lines of logic and comments, on text counted by hand."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_spec = importlib.util.spec_from_file_location(
    "code_size", Path(__file__).with_name("code_size.py")
)
assert _spec
assert _spec.loader
code_size = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(code_size)

TEXT = '''"""A module docstring
of two lines."""

import os
from pathlib import (
    Path,
)

# a comment
SIZE = 3  # another
"""An attribute docstring."""


def double(value):
    """A function docstring."""
    text = """a string
    that is code"""
    return text, 2 * value
'''


def test_logic_is_neither_docstring_import_comment_nor_blank():
    assert code_size.logic_and_comments(TEXT) == (5, 2)
    assert code_size.function_lengths(TEXT) == [5]


def test_report_names_what_is_counted(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "run.py").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.py").write_text("a = 1\n", encoding="utf-8")
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "0001_initial.py").write_text(TEXT, encoding="utf-8")
    lines = code_size.report(tmp_path).splitlines()
    assert lines[0].split() == ["lines", "of", "logic", "6", "in", "2", "files"]
    assert "in the hard bodies   40.0 (run 40)" in lines
    assert lines[-2:] == ["  .                    1", "  train                1"]


def test_hard_bodies_are_files_of_today():
    package = ROOT / "src" / "openpalm"
    assert [name for name in code_size.HARD_BODIES if not (package / name).is_file()] == []
