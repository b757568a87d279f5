import glob
import gzip
import json
import os
import tracemalloc
from collections import Counter

import pytest

from openpalm.data.corpus import json_lines
from openpalm.data.corpus.document_reader import (
    Document,
    read_document_blocks,
    read_documents,
    read_pieces,
)
from openpalm.data.corpus.sources import find_sources
from openpalm.errors import DataError


def rows(*values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def texts(*inputs, **options):
    return [document.text for document in read_documents([str(i) for i in inputs], **options)]


def test_a_file_is_one_document(tmp_path):
    path = tmp_path / "novel.dat"
    path.write_bytes("\ufeffé\r\nline\n".encode())
    assert list(read_documents([str(path)])) == [Document("é\r\nline\n", str(path))]


def test_a_line_is_a_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + rows({"text": "one\n", "id": 1}) + b"\n  \n" + rows({"text": ""})
    )
    assert list(read_documents([str(path)])) == [
        Document("one\n", f"{path}:1"),
        Document("", f"{path}:4"),
    ]


def test_gzip_reads_as_the_plain_file(tmp_path):
    data = rows(*({"body": f"document {i} é"} for i in range(500)))
    (tmp_path / "a.jsonl").write_bytes(data)
    # Two members, as `cat a.gz b.gz` makes.
    half = data.index(b"\n", len(data) // 2) + 1
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    plain = texts(tmp_path / "a.jsonl", text_field="body")
    assert len(plain) == 500
    assert texts(tmp_path / "b.jsonl.gz", text_field="body") == plain


def test_folders_are_read_recursively_and_sorted(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.rst", "c/d/e.TEXT", "x.jsonl", "skip.py", "y.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(rows({"text": name}) if "json" in name else name.encode())
    (tmp_path / "empty.txt").touch()
    expected = ["a/b.rst", "a/z.md", "b.txt", "c/d/e.TEXT", "", "x.jsonl"]
    assert texts(tmp_path) == expected


def test_globs_are_sorted_and_a_file_named_like_a_glob_is_that_file(tmp_path):
    for name in ("b.txt", "a.log", "[x].txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"{tmp_path}/*") == ["[x].txt", "a.log", "b.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == ["[x].txt", "b.txt", "sub/c.txt"]
    assert texts(tmp_path / "[x].txt") == ["[x].txt"]


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path):
    write(tmp_path, "a.txt", "._a.txt", ".hidden.md", ".git/x.txt", "f/.ipynb_checkpoints/a.md")
    write(tmp_path, "f/b.md", "f/c.py", "f/picture.png")
    left_out = Counter()
    found = [source.path for source in find_sources([str(tmp_path)], left_out)]
    assert found == [tmp_path / "a.txt", tmp_path / "f/b.md"]
    assert left_out == {"hidden": 4, "of another kind": 2}
    # Named by itself, or inside a hidden folder that was named, it is read.
    assert texts(tmp_path / ".hidden.md") == [".hidden.md"]
    assert texts(tmp_path / ".git") == [".git/x.txt"]


def test_linked_folders_are_followed_once(tmp_path):
    write(tmp_path, "in/a.txt", "in/deep/b.txt", "outside/c.txt")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/deep/up").symlink_to("..")
    (tmp_path / "in/aaa").symlink_to(tmp_path / "in/deep")
    (tmp_path / "in/other").symlink_to(tmp_path / "outside")
    (tmp_path / "in/again").symlink_to(tmp_path / "outside")
    left_out = Counter()
    found = [source.name for source in find_sources([str(tmp_path / "in")], left_out)]
    names = [name.removeprefix(f"{tmp_path}/in/") for name in found]
    assert names == ["a.txt", "again/c.txt", "deep/b.txt"]
    assert +left_out == Counter({"linked a second time": 4})


def test_globs_over_links_end(tmp_path):
    """Thirty links that each lead back: glob.glob alone would follow 30^40 paths."""
    write(tmp_path, "a.txt", "sub/b.txt", ".hidden/c.txt", "sub/.d.txt")
    for i in range(30):
        (tmp_path / f"loop{i}").symlink_to(tmp_path)
    assert texts(f"{tmp_path}/**/*.txt") == ["a.txt", "sub/b.txt"]
    assert texts(f"{tmp_path}/**") == ["a.txt", "sub/b.txt"]
    assert texts(f"{tmp_path}/**/**/sub/**/b.*") == ["sub/b.txt"]
    assert texts(f"{tmp_path}/**/.hidden/*.txt") == [".hidden/c.txt"]


def test_recursive_globs_match_as_the_standard_library(tmp_path):
    write(tmp_path, "a.txt", "x/b.txt", "x/y/c.txt", "x/y/z/d.md", "x/.h/e.txt", ".i/f.txt")
    for pattern in ("**", "**/*.txt", "x/**", "**/y/**", "*/**/c.txt", "**/[cd].*", "x/**/y/*"):
        wanted = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
        names = [str(s.path) for s in find_sources([f"{tmp_path}/{pattern}"])]
        assert names == sorted({name for name in wanted if os.path.isfile(name)}), pattern


@pytest.mark.parametrize("name", ["a.ndjson", "a.json", "a.JSON", "a.json.gz", "a.ndjson.gz"])
def test_other_names_for_an_object_a_line(name, tmp_path):
    data = rows({"text": "one"}, {"text": "two"})
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts(tmp_path / name) == ["one", "two"] == texts(tmp_path)


@pytest.mark.parametrize("content", [[{"text": "a"}], {"text": "a", "b": {"c": 1}}])
def test_json_that_is_not_an_object_a_line(content, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(DataError, match=r"a\.json:1: not JSON .* each line must be one object"):
        texts(tmp_path / "a.json")
    write(tmp_path, "b.txt")
    assert texts(tmp_path) == ["b.txt"]  # of a folder it is left out, and counted


def test_a_line_of_millions_of_values_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_VALUES", 1000)
    path = tmp_path / "a.jsonl"
    for inner in ("{}," * 2000, '"",' * 2000, "[[" * 600, '{"a":1},' * 600):
        path.write_text('{"text": "a", "x": [' + inner + "0]}")
        with pytest.raises(DataError, match=r":1: a line of .* bytes with more than 1,000 values"):
            texts(path)
    # Marks inside a text are no values.
    long = '[{,}] \\" \\\\' * 3000
    path.write_bytes(rows({"text": long, "x": [1, 2, 3]}))
    assert texts(path) == [long]


def test_inputs_keep_their_order(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "b", tmp_path / "a", tmp_path / "b") == ["b", "a", "b"]


def test_the_tap_gets_every_raw_byte_once(tmp_path):
    data = rows({"text": "x" * 3000}, {"text": "y"})
    files = {"a.jsonl": data, "b.jsonl.gz": gzip.compress(data), "c.txt": b"\xef\xbb\xbfabc"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        (source,) = find_sources([str(tmp_path / name)])
        seen = []
        if source.is_one:
            list(read_pieces(source, seen.append))
        else:
            list(read_document_blocks(source, seen.append))
        assert b"".join(seen) == content


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "empty.jsonl": (b"", "is empty"),
    "blank-lines.jsonl": (b"\n\n", "is empty"),
    "picture.png": (b"\x89PNG\r\n\x00\x01", "NUL byte at offset 6"),
    "utf16.txt": ("text".encode("utf-16"), "convert it to UTF-8 if it is UTF-16"),
    "late.txt": (b"a" * 9_000_000 + b"\0", "NUL byte at offset 9000000"),
    "latin.txt": (b"caf\xe9 au lait", "not valid UTF-8, byte 0xe9 at offset 3"),
    "bom.txt": (b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5"),
    "cut.txt": ("é".encode()[:1], "not valid UTF-8, byte 0xc3 at offset 0"),
    "latin.jsonl": (rows({"text": "a"}) + b'{"text": "\xe9"}', ":2: not valid UTF-8, byte 0xe9"),
    "nul.jsonl": (rows({"text": "a"}) * 2 + b"\0\n", ":3: NUL byte at offset 0"),
    "broken.jsonl": (b'{"text": "a"\n', ":1: not JSON"),
    "prose.jsonl": (rows({"text": "a"}) + b"once upon\n", ":2: not JSON .* near 'once upon"),
    "list.jsonl": (b'["text"]\n', ":1: a JSON list, not an object"),
    "number.jsonl": (b"3\n", ":1: a JSON int, not an object"),
    "deep.jsonl": (b"[" * 500_000, ":1: JSON nested too deeply"),
    "deep-escape.jsonl": (
        b'{"text": "\\u0041", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        ":1: JSON nested too deeply",
    ),
    "digits.jsonl": (b'{"a": ' + b"9" * 10_000 + b"}", ":1: not JSON"),
    "field.jsonl": (
        rows({"body": "a", "id": 1}),
        "no field 'text'; it has 'body', 'id'; name one with --text-field",
    ),
    "none.jsonl": (rows({}), "it has no field at all"),
    "type.jsonl": (rows({"text": 3}), "field 'text' is a int, not a text"),
    "null.jsonl": (rows({"text": None}), "field 'text' is a NoneType"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', ":1: holds '\\\\ud83d', half a surrogate pair"),
    "plain.jsonl.gz": (rows({"text": "a"}), "gzip data damaged"),
    "cut.jsonl.gz": (gzip.compress(rows({"text": "a"}) * 9)[:-9], "gzip data damaged"),
    "flipped.jsonl.gz": (
        gzip.compress(rows({"text": "a"}))[:-8] + b"\0" * 8,
        "gzip data damaged",
    ),
    "tail.jsonl.gz": (gzip.compress(rows({"text": "a"})) + b"junk", "gzip data damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_errors_name_the_problem_in_one_line(name, tmp_path):
    data, says = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=says) as error:
        texts(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no/such/file.txt", "no such file or folder"),
        ("no-such-*.txt", "matches no file"),
        ("builtin:shakespeare", "no such built-in corpus; known: builtin:python-docs"),
        ("/dev/null", "not a regular file"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_missing_inputs(given, says):
    with pytest.raises(DataError, match=says) as error:
        texts(given)
    assert str(error.value).startswith(given)


def test_no_input_at_all():
    with pytest.raises(DataError, match="no input; name a file"):
        texts()


def test_a_folder_without_text(tmp_path):
    (tmp_path / "program.py").write_text("pass")
    with pytest.raises(DataError, match=r"holds no \*\.txt \*\.text"):
        texts(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_file_without_read_permission(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        texts(tmp_path / "a.txt")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def walk(path, onerror):
        onerror(PermissionError(13, "Permission denied", str(path)))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied"):
        texts(tmp_path)


def test_names_of_fields_cannot_flood_or_forge_the_message(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows({f"{i}\n\x1b[31m" + "x" * 999: 1 for i in range(999)}))
    with pytest.raises(DataError) as error:
        texts(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1200


def test_a_bomb_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (100 << 20)))
    tracemalloc.start()
    with pytest.raises(DataError, match=":1: a line of more than 1048576 bytes"):
        texts(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_text_above_the_size_limit_is_not_read(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"1099511627776 bytes in one text, the limit"):
        texts(path)
