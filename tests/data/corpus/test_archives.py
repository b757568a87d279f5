"""Archives made by the standard library, packed texts, and archives that nobody honest makes."""

import gzip
import io
import json
import lzma
import tarfile

import pytest

from openpalm.data.corpus import archives, document_reader, line_streams, tar_members
from openpalm.data.corpus.document_reader import read_documents
from openpalm.errors import DataError

LONG = "folder/" + "n" * 150 + "/é.txt"


def texts(*paths, **options):
    return [document.text for document in read_documents([str(p) for p in paths], **options)]


def make_tar(path, members, mode="w", kind=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


MEMBERS = [
    ("a.txt", b"one"),
    ("folder/b.md", "\ufefftwö\n".encode() * 300),
    (LONG, b"three"),
    (".hidden/c.txt", b"\0not read"),
    ("._a.txt", b"\0not read"),
    ("rows.jsonl", b'{"text": "four"}\n\n{"text": "five"}\n'),
    ("empty.txt", b""),
]
WANTED = ["one", "twö\n" + "\ufefftwö\n" * 299, "three", "four", "five", ""]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("x.tar", "w"),
        ("x.tar.gz", "w:gz"),
        ("x.tgz", "w:gz"),
        ("x.tar.xz", "w:xz"),
        ("x_data.xz", "w:xz"),
        ("0001.gz", "w:gz"),
    ],
)
def test_a_member_is_a_document(name, mode, kind, tmp_path):
    path = make_tar(tmp_path / name, MEMBERS, mode, kind)
    assert texts(path) == WANTED
    found = list(read_documents([str(path)]))
    assert found[2].place == f"{path}:{LONG}"
    assert found[4].place == f"{path}:rows.jsonl:3"


def test_folders_inside_and_a_ustar_prefix(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("d" * 90)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("d" * 90 + "/" + "e" * 60 + ".txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    (document,) = read_documents([str(path)])
    assert document.text == "abc"
    assert document.place.endswith("d/" + "e" * 60 + ".txt")


def test_packed_texts_and_rows(tmp_path):
    text = "größer\n" * 1000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode()))
    rows = json.dumps({"text": "row"}).encode() + b"\n"
    # Two streams with padding between them, as `cat` and tools with blocks make them.
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(rows) + bytes(8) + lzma.compress(rows))
    assert texts(tmp_path) == [text, text, "row", "row"]
    (tmp_path / "d.xz").write_bytes(lzma.compress(b"short"))
    assert texts(tmp_path / "d.xz") == ["short"]


def test_packed_zstandard_text(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"a text"))
    assert texts(path) == ["a text"]


def test_an_archive_in_a_folder_is_read_only_by_name(tmp_path):
    make_tar(tmp_path / "x.tar", MEMBERS)
    (tmp_path / "a.txt").write_text("text")
    assert texts(tmp_path) == ["text"]
    assert texts(tmp_path / "*.tar") == WANTED


def member(name="a.txt", size=3, kind=b"0"):
    """A member's header; sizes that do not fit are binary, as tarfile writes them."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def block(data):
    return data + bytes(-len(data) % 512)


GOOD = member() + block(b"abc")
SPARSE_PAX = b"22 GNU.sparse.major=1\n"
HOSTILE = {
    "outside": (member("../../etc/x") + block(b"abc"), "outside the archive"),
    "absolute": (member("/etc/x") + block(b"abc"), "outside the archive"),
    "windows": (member("..\\x") + block(b"abc"), "outside the archive"),
    "link": (member("a", 0, tarfile.SYMTYPE), "is a link"),
    "hard link": (member("a", 0, tarfile.LNKTYPE), "is a link"),
    "device": (member("a", 0, tarfile.CHRTYPE), "no regular file"),
    "pipe": (member("a", 0, tarfile.FIFOTYPE), "no regular file"),
    "sparse": (member("a", 0, b"S"), "a sparse file"),
    "sparse pax": (
        member("p", 22, b"x") + block(SPARSE_PAX) + member("a", 0),
        "a sparse file",
    ),
    "lying size": (member("a.txt", 1 << 20), "ends inside a member"),
    "huge size": (member("a.txt", 1 << 62), "more than 67108864 bytes"),
    "huge hidden size": (member(".a", 1 << 62), "a member that is not read"),
    "huge rows": (member("a.jsonl", 1 << 62) + block(b'{"text": ""}\n'), "ends inside a member"),
    "huge name": (member("x", 1 << 40, b"L"), "bytes of attributes"),
    "cut name": (member("x", 1000, b"L") + b"abc", "ends inside a member"),
    "wrong attributes": (member("p", 9, b"x") + block(b"99999 a=b"), "attributes of a member"),
    "wrong number": (
        member("p", 11, b"x") + block(b"11 size=-1\n") + member("a", 0),
        "a size is wrong",
    ),
    "wrong sum": (GOOD[:150] + b"7" + GOOD[151:], "a header is wrong"),
    "cut header": (GOOD + member()[:200], "a header is wrong"),
    "data behind": (GOOD + bytes(1024) + GOOD, "data follows its end"),
    "binary": (member("a.png", 4) + block(b"\x89PN\0"), "NUL byte at offset 3"),
    "latin1": (member("a.txt", 1) + block(b"\xe9"), "not valid UTF-8"),
    "nested": (member("b.tar.gz", 3) + block(b"abc"), "unpack the archive"),
    "no row": (member("b.jsonl", 3) + block(b"abc"), "b.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_a_line(name, tmp_path):
    data, says = HOSTILE[name]
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=says) as error:
        texts(path)
    assert str(error.value).startswith(f"{path}")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_bombs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "MAX_SKIPPED_BYTES", 1 << 20)
    monkeypatch.setattr(document_reader, "MAX_TEXT_BYTES", 1 << 20)
    monkeypatch.setattr(line_streams, "MAX_XZ_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(GOOD + bytes(3 << 20)))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a\n" * (1 << 20)))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(b"abc", preset=9))
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress(member("d.txt", 2 << 20) + b"a" * (2 << 20)))
    for name, says in (
        ("a.tar.gz", "data follows its end"),
        ("b.txt.gz", "bytes in one text, the limit is 1048576"),
        ("c.txt.xz", "a dictionary of more than 1048576 bytes"),
        ("d.tar.gz", "a text of more than 1048576 bytes"),
    ):
        with pytest.raises(DataError, match=says):
            texts(tmp_path / name)


@pytest.mark.parametrize("cut", [10, 60])
def test_a_cut_xz_file(cut, tmp_path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(bytes(range(1, 127)) * 9)[:-cut])
    with pytest.raises(DataError, match=r"a.txt.xz: xz data damaged.*the last stream is not whole"):
        texts(path)
    path.write_bytes(b"no xz at all")
    with pytest.raises(DataError, match="xz data damaged"):
        texts(path)
