"""Hostile checkpoint files give one clear line; nothing is executed, nothing large is built."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openpalm.convert.detect import read_foreign
from openpalm.convert.files import read_tensors
from openpalm.errors import CheckpointError

Save = Callable[..., Path]


class Bomb:
    """Pickles as a call of the given function: what a hostile checkpoint is made of."""

    def __init__(self, function: object, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("function", [os.mkdir, exec, Path.touch])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_bomb_does_nothing(tmp_path: Path, protocol: int, function: object):
    target = tmp_path / "executed"
    argument = f"open({str(target)!r}, 'w')" if function is exec else str(target)
    path = tmp_path / "bomb.pt"
    for number, write in enumerate((torch.save, pickle.dump)):
        with path.open("wb") as file:
            keyword = {"pickle_protocol": protocol} if number == 0 else {"protocol": protocol}
            write({"model": Bomb(function, argument)}, file, **keyword)
        said = refusal(path)
        assert "executed" in said.replace(str(path), "")
    assert not target.exists()


def test_a_bomb_in_the_stand_ins_state_stays_data(tmp_path: Path, data: Path):
    """The allowed class name with a hostile state: a call in it is refused, data is kept inert."""
    source = (data / "nanoPALM/palm/ckpt.pt").read_bytes()
    path = tmp_path / "ckpt.pt"
    hostile = [
        (b"cposix\nmkdir\n(X\x08\x00\x00\x00executedtR", "posix.mkdir"),  # a call as state
        (b"N", "hold no settings"),  # no state at all
        (b"(NK\x01t", "hold no settings"),  # the (state, slots) form, which would set attributes
        (b"}(X\x06\x00\x00\x00n_headX\x01\x00\x00\x00xu", "cannot be 'x'"),
        (b"}(X\x06\x00\x00\x00n_headK\x00u", "cannot be 0"),
        (b"}(X\x07\x00\x00\x00n_layerJ\xff\xff\xff\xffu", "cannot be -1"),
        (b"}(X\x07\x00\x00\x00n_layerK\x09u", "the tensors say 2"),
    ]
    for state, said in hostile:
        path.write_bytes(_with_model_args(source, state))
        assert said in refusal(path)
    assert not Path("executed").exists()


def _with_model_args(checkpoint: bytes, state: bytes) -> bytes:
    """The checkpoint with other opcodes as the state of its pickled settings."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                start = content.index(b"cmodel\nPaLMConfig\n")
                begin = content.index(b"}", start)
                end = content.index(b"ub", begin) + 1
                content = content[:begin] + state + content[end:]
            new.writestr(entry.filename, content)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02.", b"hello world\n" * 40, bytes(range(256)) * 20, b"PK\x03\x04" + b"\0" * 99],
    ids=["empty", "short", "text", "binary", "torn zip"],
)
@pytest.mark.parametrize("name", ["palm.pt", "palm.bin", "palm.safetensors"])
def test_other_bytes_are_refused(tmp_path: Path, content: bytes, name: str):
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name)


def test_torn_files_are_refused(tmp_path: Path, data: Path):
    whole = (data / "palm-rlhf-pytorch/v0.8.0/palm/palm.pt").read_bytes()
    path = tmp_path / "palm.pt"
    for end in range(100, len(whole), len(whole) // 25):
        path.write_bytes(whole[:end])
        refusal(path)


def test_a_few_bytes_cannot_claim_many_numbers(saved: Save, palm: dict[str, Tensor]):
    palm["token_emb.weight"] = torch.zeros(1).expand(10**6, 10**6)
    assert "claims more numbers" in refusal(saved(palm))


def test_one_storage_under_many_names_is_refused(saved: Save, palm: dict[str, Tensor]):
    shared = torch.zeros(200, 200)
    palm |= {f"layers.{i}.fn.attn_out.weight": shared for i in range(2, 50)}
    assert "more bytes than the file" in refusal(saved(palm))


def test_a_zip_bomb_is_refused(tmp_path: Path, saved: Save):
    source = saved({"token_emb.weight": torch.zeros(1 << 20)})
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "unpacks to more bytes" in refusal(path)


def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path):
    header = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4]}}'
    path = tmp_path / "palm.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "safetensors" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"a": 1},
        {1: torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.int64)},
        {"a": torch.zeros(2).to_sparse()},
        torch.zeros(3),
        {"model": {"model": {"model": {"model": {"model": {"model": {}}}}}}},
    ],
    ids=["list", "empty", "number", "key", "whole", "sparse", "tensor", "nested"],
)
def test_what_is_no_state_dict_is_refused(saved: Save, content: object):
    refusal(saved(content))


def test_missing_and_ambiguous_places(tmp_path: Path, data: Path):
    assert "no such file" in refusal(tmp_path / "nothing.pt")
    assert "no checkpoint file" in refusal(tmp_path)
    assert "ckpt.pt, model_state_dict.pt" in refusal(data / "nanoPALM" / "palm")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_wrappers_and_prefixes_fall_away(
    saved: Save, palm: dict[str, Tensor], wrapper: str, prefix: str
):
    wrapped = {wrapper: {prefix + name: tensor for name, tensor in palm.items()}, "step": 3}
    tensors, around = read_tensors(saved(wrapped))
    assert tensors.names == set(palm)
    assert around == {"step": 3}


def test_safetensors_and_folders_read_alike(tmp_path: Path, palm: dict[str, Tensor], saved: Save):
    expected = read_foreign(saved(palm))
    del palm["to_logits.weight"]  # safetensors refuses shared storages
    (tmp_path / "folder").mkdir()
    save_file(palm, tmp_path / "folder" / "palm.safetensors")
    found = read_foreign(tmp_path / "folder")
    assert found.config == expected.config
    assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(saved: Save, palm: dict[str, Tensor], dtype: torch.dtype):
    foreign = read_foreign(saved({name: tensor.to(dtype) for name, tensor in palm.items()}))
    assert {tensor.dtype for tensor in foreign.state.values()} == {torch.float32}


def test_the_old_file_format_of_torch_is_read(tmp_path: Path, palm: dict[str, Tensor]):
    path = tmp_path / "palm.pt"
    torch.save(palm, path, _use_new_zipfile_serialization=False)
    assert read_foreign(path).config.depth == 2
