"""Text that is split, repaired and detokenized before it is hashed."""

import builtins
import json

import numpy as np
import pytest

from openpalm.data.corpus import cleaning, document_reader
from openpalm.data.corpus.cleaning import Cleaning
from openpalm.data.corpus.document import Document
from openpalm.data.corpus.document_reader import documents, read_document_blocks, read_pieces
from openpalm.data.corpus.sources import find_sources
from openpalm.errors import DataError

END = "<|endoftext|>"


def pieces_of(text, size):
    return [Document(text[i : i + size], "x") for i in range(0, len(text), size)]


def texts(path, chosen):
    (source,) = find_sources([str(path)], cleaning=chosen)
    blocks = read_document_blocks(source)
    return [document.text for block in blocks for document in documents(block)]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_long_text_is_split_at_the_marker_wherever_it_is_read(size):
    text = f"one\n{END}two {END}{END} three"
    found = Cleaning(END).split_pieces(pieces_of(text, size))
    assert [document.text for document in found] == text.split(END)


def test_behind_the_last_marker_there_is_no_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"one{END}two{END}")
    assert texts(path, Cleaning(END)) == ["one", "two"]
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"text": f"one{END}two{END}"}) + "\n" + json.dumps({"text": "3"}))
    assert texts(rows, Cleaning(END)) == ["one", "two", "3"]


def test_a_split_file_is_detokenized(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f" a , b . \n{END} = = c = = \n")
    assert texts(path, Cleaning(END, detokenize="wikitext")) == ["a, b.\n", "== c ==\n"]


def test_a_long_text_is_cleaned_by_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(document_reader, "BLOCK_BYTES", 7)
    text = ' He said , " one @-@ two . " \n' * 9 + "no end ."
    path = tmp_path / "a.txt"
    path.write_text(text)
    (source,) = find_sources([str(path)], cleaning=Cleaning(detokenize="wikitext"))
    read = "".join(piece.text for piece in read_pieces(source))
    assert read == 'He said, "one-two."\n' * 9 + "no end."


def test_token_ids_are_not_changed():
    document = Document("", "x", np.arange(3, dtype=np.uint32))
    assert list(Cleaning(END, detokenize="wikitext").documents(document)) == [document]


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(cleaning, "MAX_CLEANED_BYTES", 50)
    for chosen, method in ((Cleaning(END), "split_pieces"), (Cleaning(detokenize="wikitext"), "")):
        with pytest.raises(DataError, match="more than 50 characters; split this document"):
            list(getattr(chosen, method or "pieces")(pieces_of("x" * 100, 10)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split_text": ""}, "--split-text: is empty"),
        ({"fix_text": "all"}, "--fix-text all: must be none or ftfy"),
        ({"detokenize": "ptb"}, "--detokenize ptb: must be none or wikitext"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(DataError, match=says):
        Cleaning(**options)


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "ftfy":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs ftfy; pip install 'openpalm\[data\]'"):
        _ = Cleaning(fix_text="ftfy").fixer


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_text_is_mended_as_the_library_mends_the_whole(size):
    ftfy = pytest.importorskip("ftfy")
    text = "schÃ¶n &lt; 1\r\nÃ©tÃ© “x” ﬁn &amp; x²\n<b> &lt;i&gt; &amp; â€œquoteâ€\x9d\nlast"
    chosen = Cleaning(fix_text="ftfy")
    whole = ftfy.fix_text(text, normalization="NFKC")
    assert "schön < 1\nété" in whole
    assert "".join(piece.text for piece in chosen.pieces(pieces_of(text, size))) == whole
    assert [document.text for document in chosen.documents(Document(text, "x"))] == [whole]
    assert chosen.fixer == f"ftfy {ftfy.__version__}"
