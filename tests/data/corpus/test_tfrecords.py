"""TFRecords of token ids, written here by the format's description, and damaged ones."""

import dataclasses
import struct

import numpy as np
import pytest

from openpalm.data.corpus import tfrecords
from openpalm.data.corpus.document_reader import read_documents
from openpalm.data.corpus.sources import find_sources
from openpalm.data.corpus.tfrecords import crc32c
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError


def slow_crc32c(data):
    """Bit by bit, as RFC 3720 describes it."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def masked(data):
    crc = slow_crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value):
    data = b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


def nested(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(ids, name=b"text", *, packed=True, kind=3):
    """tf.train.Example with one feature of int64."""
    if packed:
        values = nested(1, b"".join(map(varint, ids)))
    else:
        values = b"".join(varint(1 << 3) + varint(i) for i in ids)
    entry = nested(1, name) + nested(2, nested(kind, values))
    return nested(1, nested(1, entry))


def record(data, length=None):
    size = struct.pack("<Q", len(data) if length is None else length)
    return size + masked(size) + data + masked(data)


def ids_of(path, **options):
    found = read_documents([str(path)], **options)
    return [None if one.ids is None else one.ids.tolist() for one in found]


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_the_checksums_of_rfc_3720(data, value):
    assert crc32c(data) == slow_crc32c(data) == value


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 4095, 4096, 4097, 4098, 8195, 9000])
def test_the_checksum_of_any_length(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == slow_crc32c(data)


@pytest.mark.parametrize("packed", [True, False])
def test_a_record_is_a_document_of_ids(packed, tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50400, 2049).tolist(), [0, 1, 127, 128, 2**32 - 1], []]
    path = tmp_path / "a.tfrecords"
    path.write_bytes(b"".join(record(example(row, packed=packed)) for row in rows))
    assert ids_of(path) == rows


def proto_example(ids):
    """tf.train.Example by the protobuf library, from the published message definitions."""
    pool = pytest.importorskip("google.protobuf.descriptor_pool").DescriptorPool()
    descriptor = pytest.importorskip("google.protobuf.descriptor_pb2").FieldDescriptorProto
    factory = pytest.importorskip("google.protobuf.message_factory")
    file = pytest.importorskip("google.protobuf.descriptor_pb2").FileDescriptorProto()
    file.name, file.package, file.syntax = "example.proto", "t", "proto3"

    def message(within, name, *fields):
        made = within.add(name=name)
        for field, number, kind, is_repeated in fields:
            label = descriptor.LABEL_REPEATED if is_repeated else descriptor.LABEL_OPTIONAL
            entry = made.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                entry.type, entry.type_name = descriptor.TYPE_MESSAGE, f".t.{kind}"
            else:
                entry.type = kind
        return made

    message(file.message_type, "Int64List", ("value", 1, descriptor.TYPE_INT64, True))
    message(file.message_type, "FloatList", ("value", 1, descriptor.TYPE_FLOAT, True))
    lists = ("float_list", 2, "FloatList", False), ("int64_list", 3, "Int64List", False)
    message(file.message_type, "Feature", *lists)
    features = message(file.message_type, "Features", ("feature", 1, "Features.Entry", True))
    pairs = ("key", 1, descriptor.TYPE_STRING, False), ("value", 2, "Feature", False)
    message(features.nested_type, "Entry", *pairs)
    message(file.message_type, "Example", ("features", 1, "Features", False))
    pool.Add(file)
    example = factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    for name in ("other", "text"):
        entry = example.features.feature.add(key=name)
        if name == "other":
            entry.value.float_list.value.append(0.5)
        else:
            entry.value.int64_list.value.extend(ids)
    return example.SerializeToString()


def test_files_of_other_libraries(tmp_path):
    """Records of tensorboard's writer, messages of the protobuf library."""
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    rows = [[0, 5, 127, 128, 50256], list(range(0, 50400, 7)), [2**32 - 1] * 3]
    path = tmp_path / "a.tfrecords"
    with path.open("wb") as file:
        for row in rows:
            writer(file).write(proto_example(row))
    assert ids_of(path) == rows


def test_other_features_are_passed_over(tmp_path):
    other = example([1], b"other") + nested(9, b"new") + varint(9 << 3) + varint(5)
    path = tmp_path / "a.tfrecord"
    path.write_bytes(record(other + example([7, 8])))
    assert ids_of(path) == [[7, 8]]
    assert ids_of(path, text_field="other") == [[1]]


def test_an_index_lists_files(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.tfrecords").write_bytes(record(example([i])))
    index = tmp_path / "lists" / "all.train.index"
    index.parent.mkdir()
    (index.parent / "3.tfrecords").write_bytes(record(example([3])))
    # A path is that of the working directory, or else next to the list.
    index.write_text(f"0.tfrecords\n\n{tmp_path}/2.tfrecords\n3.tfrecords\n")
    monkeypatch.chdir(tmp_path)
    assert ids_of(index) == [[0], [2], [3]]
    assert [source.given for source in find_sources([str(index)])] == [str(index)] * 3


def test_an_index_of_urls(tmp_path):
    """mesh-transformer-jax's lists name files of a bucket; fsspec's memory stands in for one."""
    fsspec = pytest.importorskip("fsspec")
    for i in range(2):
        fsspec.filesystem("memory").pipe(f"/bucket/{i}.tfrecords", record(example([i])))
    content = "memory://bucket/0.tfrecords\nmemory://bucket/1.tfrecords\n"
    (tmp_path / "x.index").write_text(content)
    fsspec.filesystem("memory").pipe("/bucket/all.index", content.encode())
    assert ids_of(tmp_path / "x.index") == ids_of("memory://bucket/all.index") == [[0], [1]]
    (tmp_path / "x.index").write_text("memory://bucket/missing.tfrecords\n")
    with pytest.raises(DataError, match=r"memory://bucket/missing.tfrecords"):
        find_sources([str(tmp_path / "x.index")])


def test_a_dataset_of_records(tmp_path):
    """Ids stay as they are; a document ends behind an end-of-text id, and with its record."""
    end, path = Tokenizer.byte().end_of_text, tmp_path / "a.tfrecords"
    rows = [[*b"one", end, *b"two"], [*b"three", end], *([i % 256] * 9 for i in range(300))]
    path.write_bytes(b"".join(record(example(row)) for row in [*rows, rows[0]]))
    (tmp_path / "x.index").write_text("a.tfrecords\n")
    request = PrepareRequest(
        inputs=[str(tmp_path / "x.index")], out=tmp_path / "out", tokenizer="byte", val="tail:0.1"
    )
    manifest = prepare(request)
    assert manifest.documents.duplicates == 300 - 256 + 1
    tokens = open_dataset(tmp_path / "out").tokens("train")[:].tolist()
    assert tokens[:22] == [*rows[0], *rows[1], *rows[2]]
    starts = open_dataset(tmp_path / "out").document_offsets("train").tolist()
    assert starts[:5] == [0, 4, 7, 13, 22]
    with pytest.raises(DataError, match=r"a\.tfrecords: record 1: holds token ids, not text"):
        prepare(dataclasses.replace(request, out=tmp_path / "other", tokenizer="bpe:300"))


def test_an_index_of_something_else_is_a_text(tmp_path):
    path = tmp_path / "book.index"
    path.write_text("Aardvark, 3\n")
    (document,) = read_documents([str(path)])
    assert document.text == "Aardvark, 3\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("missing.tfrecords", "no such file"),
        ("notes.txt", "not a .tfrecords or .tfrecord file"),
    ],
)
def test_a_wrong_line_of_an_index(line, says, tmp_path):
    (tmp_path / "a.tfrecords").write_bytes(record(example([1])))
    index = tmp_path / "x.index"
    index.write_text(f"{tmp_path}/a.tfrecords\n{line}\n")
    with pytest.raises(DataError, match=rf"x\.index:2: .*{says}"):
        find_sources([str(index)])


GOOD = record(example([1, 2, 3]))
FLIPPED = bytearray(GOOD)
FLIPPED[-6] ^= 1
LENGTH = bytearray(GOOD)
LENGTH[0] ^= 1
BODY = example([1, 2, 3])
DAMAGED = {
    "cut head": (GOOD[:7], "the file ends inside it"),
    "cut data": (GOOD[:-9], "the file ends inside it"),
    "cut checksum": (GOOD[:-1], "the file ends inside it"),
    "second cut": (GOOD + GOOD[:20], "record 2: damaged .the file ends inside it"),
    "wrong data": (bytes(FLIPPED), "checksum of its data is wrong"),
    "wrong length": (bytes(LENGTH), "checksum of its length is wrong"),
    "huge length": (record(BODY, 1 << 63), "the limit is 67108864"),
    "lying length": (record(BODY, 1 << 20), "the file ends inside it"),
    "no protobuf": (record(b"\xff" * 30), "a number without an end"),
    "endless number": (record(b"\x0a" + b"\xff" * 5), "a number without an end"),
    "endless id": (
        record(nested(1, nested(1, nested(1, b"text") + nested(2, nested(3, nested(1, b"\x81")))))),
        "a number without an end",
    ),
    "long id": (
        record(
            nested(
                1,
                nested(
                    1,
                    nested(1, b"text") + nested(2, nested(3, nested(1, b"\xff" * 11 + b"\x01"))),
                ),
            )
        ),
        "a number without an end",
    ),
    "inner length": (record(b"\x0a\x7fabc"), "no tf.train.Example"),
    "huge inner length": (record(b"\x0a" + varint(1 << 62) + b"abc"), "no tf.train.Example"),
    "group": (record(b"\x0b\x0c"), "unknown type 3"),
    "field zero": (record(b"\x00\x01"), "no tf.train.Example"),
    "large id": (record(example([1 << 32])), "numbers that are no token ids"),
    "negative id": (record(example([(1 << 64) - 1])), "numbers that are no token ids"),
    "no ids": (record(example([1], kind=1)), "not a list of int64"),
    "no text": (record(example([1], b"ids")), "no feature 'text'; it has 'ids'"),
    "empty record": (record(b""), "no feature 'text'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_a_line(name, tmp_path):
    data, says = DAMAGED[name]
    path = tmp_path / "a.tfrecords"
    path.write_bytes(data)
    with pytest.raises(DataError, match=says) as error:
        ids_of(path)
    assert str(error.value).startswith(f"{path}: record ")
    assert "\n" not in str(error.value)


def test_a_message_of_too_many_fields_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecords, "MAX_FIELDS", 100)
    path = tmp_path / "a.tfrecords"
    path.write_bytes(record(b"\x10\x01" * 101))
    with pytest.raises(DataError, match=r"no tf\.train\.Example"):
        ids_of(path)


def test_an_empty_file(tmp_path):
    path = tmp_path / "a.tfrecords"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        ids_of(path)
