import hashlib
import inspect
import subprocess
import sys

import pytest

from openpalm.data.corpus import builtin
from openpalm.data.corpus.builtin import (
    ANSWER_CHARACTERS,
    HELD_OUT_PHRASINGS,
    TRAIN_PHRASINGS,
    python_docs,
    question_answers,
)
from openpalm.errors import DataError


@pytest.fixture(scope="module")
def documents():
    return list(python_docs())


def test_it_is_megabytes_of_english_in_documents_of_some_length(documents):
    assert 1_500_000 < sum(len(document.text) for document in documents) < 5_000_000
    assert len(documents) > 1500
    short = [document for document in documents if len(document.text) < 100]
    assert len(short) < 0.05 * len(documents)


def test_docstrings_read_as_text(documents):
    (found,) = (d for d in documents if "\nshutil.copytree(src, dst, " in "\n" + d.text)
    assert "Recursively copy a directory tree" in found.text
    assert found.place.startswith("builtin:python-docs:shutil")
    together = "\n".join(document.text for document in documents)
    assert 'The "assert" statement' in together
    assert "json.decoder.JSONDecoder.decode(s, " in together  # without self


def digest(documents):
    return hashlib.sha256(repr([(d.place, d.text) for d in documents]).encode()).hexdigest()


@pytest.fixture(scope="module")
def elsewhere():
    """A process of its own, with its own seed of hashes: the documents' digest, the modules."""
    program = (
        "import hashlib, sys\nfrom openpalm.data.corpus.builtin import python_docs\n"
        + inspect.getsource(digest)
        + "print(digest(python_docs()), *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found, *modules = done.stdout.split()
    return found, modules


def test_nothing_of_the_library_is_imported_or_run(elsewhere):
    # antigravity opens a browser, this prints a poem, idlelib needs a display.
    _, modules = elsewhere
    assert "openpalm.data.corpus.builtin" in modules
    assert not {"antigravity", "this", "idlelib", "tkinter", "torch"} & set(modules)


def test_the_order_is_the_same_in_every_process(documents, elsewhere):
    assert digest(documents) == elsewhere[0]
    assert digest(documents[::-1]) != elsewhere[0]


def test_questions_and_answers():
    found = {one.name: one for one in question_answers()}
    assert len(found) == len(question_answers()) > 2000
    copytree = found["shutil.copytree"]
    assert (
        copytree.answer == "Recursively copy a directory tree and return the destination directory."
    )
    assert "What does shutil.copytree do?" in copytree.train_questions
    for name, one in found.items():
        assert not any(part.startswith("_") for part in name.split("."))
        assert 12 < len(one.answer) <= ANSWER_CHARACTERS
        assert "\n" not in one.answer


def test_held_out_phrasings_are_never_trained_on():
    assert TRAIN_PHRASINGS
    assert HELD_OUT_PHRASINGS
    assert not set(TRAIN_PHRASINGS) & set(HELD_OUT_PHRASINGS)
    one = question_answers()[0]
    assert not set(one.train_questions) & set(one.held_out_questions)
    assert all(one.name in question for question in one.train_questions + one.held_out_questions)


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return a copy of it. More.", "Return a copy of it."),
        ("Return one (e.g. two) of\nthem all: x\n\nMore.", "Return one (e.g. two) of them all: x."),
        ("copy(x, y) -> z\n\nReturn a copy of x.", "Return a copy of x."),
        ("Too short.", None),
        (">>> f(1) is an example\n1", None),
        ("Return " + "word " * 80, "Return " + "word " * 37 + "word..."),
    ],
)
def test_an_answer_is_the_first_sentence(docstring, answer):
    assert builtin._summary(docstring) == answer


def test_definitions_behind_conditions_and_broken_files(tmp_path):
    (tmp_path / "m.py").write_text(
        'if x:\n    def f(a, /, b=1, *c, d, **e):\n        "Doc f."\n'
        'else:\n    def f():\n        "Other."\n'
        'class C(Base):\n    "Doc C."\n    @property\n    def p(self):\n        "Doc p."\n'
        '    async def m(self, /, x: int):\n        "Doc \\ud800 m."\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    entries = [
        (one.name, one.heading, one.text)
        for path in sorted(tmp_path.glob("*.py"))
        for one in builtin._entries_of(path, tmp_path)
    ]
    assert entries == [
        ("m.f", "m.f(a, /, b=1, *c, d, **e)", "Doc f."),
        ("m.C", "class m.C(Base)", "Doc C."),
        ("m.C.p", "m.C.p", "Doc p."),
        ("m.C.m", "m.C.m(x: int)", "Doc ? m."),
    ]


def test_a_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    builtin._entries.cache_clear()
    with pytest.raises(DataError, match="no library sources in"):
        list(python_docs())
