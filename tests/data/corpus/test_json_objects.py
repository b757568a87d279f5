"""Objects of a .json file, split in blocks of any size, equal what json.loads reads."""

import gzip
import json
import random

import pytest

from openpalm.data.corpus import json_lines, json_objects
from openpalm.data.corpus.json_objects import read_objects
from openpalm.errors import DataError

NINES = "9" * 5000
TEXTS = ["", "a", '"', "\\", '\\"', "[{", "}]", "日本 😀", "\n", ",", "\\\\", "\u2028"]


def draw(rng, depth=3):
    kind = rng.randrange(6 if depth else 4)
    if kind < 2:
        return "".join(rng.choices(TEXTS, k=rng.randrange(4)))
    if kind < 4:
        return rng.choice([None, True, 0, -1.5e3, 12])
    if kind == 4:
        return [draw(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): draw(rng, depth - 1) for _ in range(rng.randrange(4))}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_equal_to_json_loads(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_objects, "BLOCK_BYTES", size)
    rng = random.Random(size)
    for number in range(20):
        rows = [{"value": draw(rng)} for _ in range(rng.randrange(6))]
        ways = [
            json.dumps(rows),
            json.dumps(rows, indent=2, ensure_ascii=False),
            "\n".join(map(json.dumps, rows)),
        ]
        for i, text in enumerate(ways):
            path = tmp_path / f"{number}-{i}.json"
            path.write_text(text, encoding="utf-8")
            assert list(read_objects(path)) == [
                (f"{path}, record {n}", row) for n, row in enumerate(rows, start=1)
            ]


def test_compressed_and_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf [ {} ]\n"))
    assert [row for _, row in read_objects(path)] == [{}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, 2]', r"record 2: is no JSON object"),
        ("[null]", r"record 1: is no JSON object"),
        ('[{"a": 1}', r"record 1: the file ends before its last bracket"),
        ('[{"a": 1}, {"b": [', r"record 2: the file ends before its last bracket"),
        ('{"a": "x', r"record 1: the file ends before its last bracket"),
        ("[{]]", r"record 1: not JSON|ends before its last bracket"),
        ('[{"a": ]}]', r"record 1: not JSON|ends before its last bracket"),
        ('[{"a": nul}]', r"record 1: not JSON"),
        (f'[{{"a": {NINES}}}]', r"record 1: not JSON"),
        (f'[{{"a": {"[" * 100_000}{"]" * 100_000}}}]', r"record 1: JSON nested too deeply"),
        ('[{"a": "\\ud800"}]', r"record 1: holds '\\ud800', half a surrogate pair"),
        ('[{"a": "\0"}]', r"record 1: NUL byte"),
        ("<html>", r"record 1: is no JSON object"),
    ],
)
def test_what_is_refused(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says) as caught:
        list(read_objects(path))
    assert "\n" not in str(caught.value)


def test_an_object_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(json_objects, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(json_objects, "BLOCK_BYTES", 100)
    path = tmp_path / "x.json"
    path.write_text('[{}, {"a": "' + "x" * 2000, encoding="utf-8")
    with pytest.raises(DataError, match="record 2: is longer than 1000 bytes; split it"):
        list(read_objects(path))


def test_the_values_of_an_object_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_VALUES", 100)
    path = tmp_path / "x.json"
    path.write_text('[{"a": [' + "{}," * 200 + "{}]}]", encoding="utf-8")
    with pytest.raises(DataError, match=r"record 1: .* with more than 100 values"):
        list(read_objects(path))


def test_not_utf8(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match="record 1: not valid UTF-8, byte 0xff"):
        list(read_objects(path))
