"""Files that grow: nothing whole is lost, nothing torn is kept."""

import json
import os

import pytest

from openpalm.base.jsonl import MAX_BYTES, JsonlWriter, open_jsonl, write_rows
from openpalm.errors import DataError, SettingsError, StorageError


def add(path, *rows):
    with open_jsonl(path) as file:
        found = list(file.found)
        for row in rows:
            file.append(row)
    return found


def test_rows_stay_and_more_follow(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    assert add(path, {"a": 1}, {"a": "ä\n"}) == []
    assert add(path, {"a": 3}) == [{"a": 1}, {"a": "ä\n"}]
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, "ä\n", 3]


@pytest.mark.parametrize("torn", [b'{"a": 2', b"{", b"{" + b"x" * 200_000])
def test_a_torn_end_is_cut(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    add(path, {"a": 1})
    with path.open("ab") as file:
        file.write(torn)
    assert add(path, {"a": 3}) == [{"a": 1}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 3}]


def test_killed_at_any_byte_the_whole_rows_stay(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"n": n, "text": "x" * n} for n in range(4)]
    add(path, *rows)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert add(path) == rows[: sum(end <= size for end in ends)]


def test_a_row_is_there_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open_jsonl(path) as file:
        file.append({"a": 1})
        assert json.loads(path.read_text()) == {"a": 1}


def test_a_second_process_is_kept_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open_jsonl(path), pytest.raises(SettingsError, match="another process is writing it"):
        add(path)


def test_what_is_no_file_of_rows_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"must be a .jsonl"):
        add(tmp_path / "rows.txt")
    (tmp_path / "rows.txt").touch()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(SettingsError, match="is no file"):
        add(tmp_path / "folder.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(SettingsError, match="is no file"):
        add(tmp_path / "pipe.jsonl")
    with pytest.raises(SettingsError, match="choose another place"):
        add(tmp_path / "rows.txt" / "rows.jsonl")


class Disk:
    """Takes three bytes at a time, and `room` of them in all."""

    def __init__(self, room):
        self.room, self.content = room, b"torn"

    def truncate(self, size):
        self.content = self.content[:size]

    def write(self, data):
        taken = data[: min(3, self.room - len(self.content))]
        if not taken:
            raise OSError(28, "No space left on device")
        self.content += taken
        return len(taken)


def test_a_slow_disk_gets_everything_and_a_full_one_says_so(tmp_path):
    slow, full = Disk(1000), Disk(12)
    rows = JsonlWriter(slow, tmp_path, [], 0)
    for n in range(3):
        rows.append({"n": n})
    assert [json.loads(line)["n"] for line in slow.content.splitlines()] == [0, 1, 2]
    with pytest.raises(StorageError, match="the rows so far are kept"):
        JsonlWriter(full, tmp_path, [], 0).append({"text": "longer than that"})


@pytest.mark.parametrize("content", ["notes", "{}\nnotes", "notes\n", "3\n", "[" * 9999 + "\n"])
def test_a_file_of_another_kind_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="choose a new file"):
        add(path, {"a": 1})
    assert path.read_text() == content


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: nothing is on the disk
    with pytest.raises(DataError, match="larger than"):
        add(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert write_rows(path, iter([{"a": 1}, {"a": 2}])) == 2
    assert len(path.read_text().splitlines()) == 2
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(StorageError):
        write_rows(tmp_path / "folder.jsonl", iter([{"a": 1}]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.jsonl", "rows.jsonl"]
