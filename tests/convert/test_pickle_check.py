"""Pickles that never end are refused; what torch writes is not."""

import collections
import io
import pickle
import zipfile

import pytest
import torch

from openpalm.convert.files import read_tensors
from openpalm.convert.pickle_check import MAX_DEPTH, check_pickle
from openpalm.errors import CheckpointError

# t = (t, t), sixty times, and then t as the key of a dictionary.
UNFOLDING = b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60
BOMBS = {
    "key": UNFOLDING + b"}h\0K\1s.",
    "keys": UNFOLDING + b"}(h\0K\1K\2K\3u.",
    "argument": UNFOLDING + b"ccollections\nOrderedDict\nh\0\x85R.",
    "state": UNFOLDING + b"ccollections\nOrderedDict\n)\x81h\0b.",
    "storage": UNFOLDING + b"h\0Q.",
    "deep": b"\x80\x02)" + b"\x85" * 100_000 + b"}q\0.",
    "large key": b"\x80\x02}\x8a\x0a" + b"\x7f" * 10 + b"K\1s.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_unfolds_without_end_is_refused(name):
    with pytest.raises(ValueError, match=r"unfolds|nests|more than 64 bits"):
        check_pickle(io.BytesIO(BOMBS[name]))


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("zipped", [False, True])
def test_convert_reads_none_of_them(name, zipped, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(BOMBS[name])
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", BOMBS[name])
            archive.writestr("archive/version", "3")
    with pytest.raises(CheckpointError, match="read safely"):
        read_tensors(path)


@pytest.mark.parametrize("content", [{"a": 1}, {"a", "b"}, b"bytes", [collections.Counter]])
def test_opcodes_that_torch_neither_writes_nor_reads_safely_are_refused(content, tmp_path):
    """Those of newer protocols: torch.load(weights_only=True) refuses them too."""
    data = pickle.dumps(content, 4)
    with pytest.raises(ValueError, match=r"uses the opcode [A-Z_]+, which no checkpoint needs"):
        check_pickle(io.BytesIO(data))
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported operand"):
        torch.load(tmp_path / "a.pt", weights_only=True)


def test_an_object_is_not_filled_once_another_holds_it():
    """Otherwise its holder would be measured as empty."""
    made = b"ccollections\nOrderedDict\n)\x81q\1"
    with pytest.raises(ValueError, match="another one holds"):
        check_pickle(io.BytesIO(b"\x80\x02" + made + b"h\1\x85q\2h\1}b."))


def test_what_is_no_pickle():
    for data in (b"", b"\x80\x02", b"\x80\x02h\0.", b"\x80\x02s.", b"\xff\xfe", b"text\n" * 9):
        with pytest.raises(ValueError, match=r"."):
            check_pickle(io.BytesIO(data))


def test_ordinary_content_passes():
    shared = ("a", 1, (2.5, None))
    content = collections.OrderedDict({f"layer.{i}": [shared, {"x": shared}] for i in range(2000)})
    check_pickle(io.BytesIO(pickle.dumps(content, 2)))
    nested = ()
    for _ in range(MAX_DEPTH - 10):
        nested = (nested,)
    check_pickle(io.BytesIO(pickle.dumps({"deep": nested}, 2)))


@pytest.mark.parametrize("zipped", [False, True])
def test_what_torch_saves_passes(zipped, tmp_path):
    """A model with tied weights and its optimizer's state, in both of torch's forms."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(40)))
    model[1].weight = model[0].weight
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    found, _ = read_tensors(path)
    assert found.names == set(model.state_dict())
