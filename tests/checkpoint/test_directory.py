"""The checkpoint directory: what goes in comes out, and nothing damaged or hostile gets in."""

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import openpalm
from openpalm.base import hashing, json_file
from openpalm.base.console import shown
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.directory import TrainState
from openpalm.checkpoint.manifest import manifest_text, verify, write_manifest
from openpalm.errors import CheckpointError, SettingsError, StorageError
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

CONFIG = ModelConfig(
    vocab_size=80, dim=16, depth=2, heads=2, head_dim=8, ff_dim=32, kv_heads=1, context=16
)
TOKENIZER = '{"any": "text of a tokenizer"}'


def made(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    model = Transformer(config)
    initialise(model, seed)
    return model.eval()


def state() -> TrainState:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "optimizer/a.weight/exp_avg": torch.randn(7, 5, generator=generator),
        "optimizer/a.weight/step": torch.tensor(12.0),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "random/cpu": torch.get_rng_state(),
        "empty": torch.empty(0),
    }
    return TrainState(tensors, {"step": 12, "loader": {"rows_consumed": 96, "sample": "é\u2028"}})


def save(directory: Path, model: Transformer | None = None, **more: Any) -> Path:
    options: dict[str, Any] = {
        "tokenizer_json": TOKENIZER,
        "train": state(),
        "lineage": {"step": 12, "parent": None, "why": "é"},
        "fingerprint": True,
    }
    checkpoint.save(directory, model or made(), **options | more)
    return directory


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pristine") / "step-00000012")


@pytest.fixture
def copied(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def rewrite_manifest(directory: Path, **changes: Any) -> None:
    """Makes the manifest agree with the files again, as somebody who means harm would."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    lineage = manifest["lineage"]
    (directory / "manifest.json").unlink()
    write_manifest(directory, lineage)
    if changes:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "sha256"} | changes
        text = manifest_text(body)
        (directory / "manifest.json").write_text(text, encoding="utf-8")


def names_in(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


FILES = [
    "card.md",
    "config.json",
    "fingerprint.safetensors",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "train/state.json",
    "train/state.safetensors",
]


# --- what goes in comes out ----------------------------------------------------------------------


def test_the_files_of_a_checkpoint(pristine: Path):
    assert names_in(pristine) == FILES
    manifest = verify(pristine)
    assert sorted(manifest["files"]) == [name for name in FILES if name != "manifest.json"]
    assert manifest["lineage"] == {"step": 12, "parent": None, "why": "é"}
    assert "2 heads" not in (pristine / "card.md").read_text(encoding="utf-8")
    modes = {path.stat().st_mode & 0o777 for path in pristine.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert not list(pristine.parent.glob(".*"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2, "qk_norm": True},
        {"tied": False, "bias": True, "feedforward": "gelu", "rotary": "interleaved"},
        {"xpos_base": 512.0, "dropout": 0.1},
    ],
    ids=["palm", "multi-head", "gpt-j", "xpos"],
)
def test_a_model_comes_back_bit_for_bit(changes: dict[str, Any], tmp_path: Path):
    model = made(replace(CONFIG, **changes))
    save(tmp_path / "ckpt", model)
    back = openpalm.load(tmp_path / "ckpt")
    assert back.config == model.config
    assert not back.training
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    ids = torch.arange(12)[None] * 5 % 80
    assert torch.equal(back.logits(ids), model.logits(ids))
    assert back.logits(ids).shape == (1, 12, 80)


def test_a_model_in_bfloat16_is_the_rounded_one(pristine: Path):
    back = openpalm.load(pristine, dtype="bfloat16")
    for name, value in made().named_parameters():
        assert torch.equal(back.get_parameter(name), value.to(torch.bfloat16))


def test_an_unknown_dtype_is_named(pristine: Path):
    with pytest.raises(SettingsError, match="dtype float16: must be one of float32, bfloat16"):
        openpalm.load(pristine, dtype="float16")


def test_the_training_state_comes_back_bit_for_bit(pristine: Path):
    back, expected = checkpoint.load_train_state(pristine), state()
    assert back.values == expected.values
    assert back.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        if name != "random/cpu":
            assert torch.equal(back.tensors[name], value)
        assert back.tensors[name].dtype == value.dtype
    torch.set_rng_state(back.tensors["random/cpu"])


def test_saving_twice_gives_equal_weights_and_replaces_the_first(tmp_path: Path):
    save(tmp_path / "ckpt", made(seed=1))
    save(tmp_path / "ckpt", made(seed=2))
    back = openpalm.load(tmp_path / "ckpt")
    assert torch.equal(back.embedding, made(seed=2).embedding)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_the_least_a_checkpoint_may_hold(tmp_path: Path):
    checkpoint.save(tmp_path / "ckpt", made())
    assert names_in(tmp_path / "ckpt") == [
        "card.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert checkpoint.tokenizer_json(tmp_path / "ckpt") is None
    openpalm.load(tmp_path / "ckpt")


def test_deleting_train_publishes(copied: Path):
    shutil.rmtree(copied / "train")
    assert torch.equal(openpalm.load(copied).embedding, made().embedding)
    assert checkpoint.tokenizer_json(copied) == TOKENIZER
    with pytest.raises(CheckpointError, match=r"holds no train/ to resume; .*--init"):
        checkpoint.load_train_state(copied)


# --- nothing damaged gets in ---------------------------------------------------------------------


def refused(directory: Path, file: str = "") -> str:
    """What the reader of `file` says when it refuses, which names the directory and the file."""
    read = checkpoint.load_train_state if file.startswith("train/") else openpalm.load
    with pytest.raises(CheckpointError) as caught:
        read(directory)
    message = str(caught.value)
    assert str(directory) in message
    assert file in message
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(copied: Path, file: str):
    (copied / file).unlink()
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_truncated_file_is_named(copied: Path, file: str, kept: float):
    content = (copied / file).read_bytes()
    size = min(int(len(content) * kept), len(content) - 1)  # 1.0: all but the last byte
    (copied / file).write_bytes(content[:size])
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_named(copied: Path, file: str, at: float):
    content = bytearray((copied / file).read_bytes())
    content[min(int(len(content) * at), len(content) - 1)] ^= 1
    (copied / file).write_bytes(content)
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
def test_a_longer_file_is_named(copied: Path, file: str):
    with (copied / file).open("ab") as stream:
        stream.write(b" ")
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
def test_a_directory_in_a_file_s_place_is_named(copied: Path, file: str):
    (copied / file).unlink()
    (copied / file).mkdir()
    refused(copied, file)


def test_damage_anywhere_is_refused(copied: Path):
    """Truncations and changed bytes at seeded places of every file, white space too."""
    drawn = random.Random(0)
    for _ in range(60):
        name = drawn.choice(FILES)
        file = copied / name
        content = file.read_bytes()
        at = drawn.randrange(len(content))
        other = bytes([content[at] ^ drawn.randrange(1, 256)])
        changed = [content[:at], content[:at] + other + content[at + 1 :]][drawn.randrange(2)]
        file.write_bytes(changed)
        refused(copied, name)
        file.write_bytes(content)
    openpalm.load(copied)


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("\n", "\r"), ("  ", "\t"), ("\n", "\n\n")])
def test_white_space_of_the_manifest_counts_too(copied: Path, change: tuple[str, str]):
    file = copied / "manifest.json"
    file.write_bytes(file.read_bytes().replace(change[0].encode(), change[1].encode(), 1))
    refused(copied, "manifest.json")


def test_a_half_deleted_train_is_damage(copied: Path):
    (copied / "train" / "state.safetensors").unlink()
    refused(copied, "train/state.safetensors")
    shutil.rmtree(copied / "train")
    (copied / "train").mkdir()
    refused(copied, "train/")


UNREADABLE = (errno.EIO, errno.EACCES, errno.EMFILE)


@pytest.mark.parametrize("number", UNREADABLE)
def test_a_file_that_the_system_fails_to_read_is_no_damage(
    a_run: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """No older checkpoint takes its place: the work stops, and says which file."""
    newest = checkpoint.steps(a_run)[-1]

    def broken(path: Path, *more: Any, **named: Any) -> Any:
        if path == newest / file:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *more, **named)

    opened = Path.open
    monkeypatch.setattr(Path, "open", broken)
    for file in ("model.safetensors", "config.json", "manifest.json"):
        with pytest.raises(StorageError) as caught:
            openpalm.load(a_run)
        assert str(newest / file) in str(caught.value)
        assert os.strerror(number) in str(caught.value)
    file = "train/state.safetensors"
    assert checkpoint.latest(a_run) == newest
    with pytest.raises(StorageError, match=rf"train/state.safetensors.*{os.strerror(number)}"):
        checkpoint.latest(a_run, training=True)
    with pytest.raises(StorageError, match=r"train/state\.safetensors"):
        checkpoint.load_train_state(newest)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    a_run: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", broken)
    with pytest.raises(StorageError, match=r"checkpoints: cannot be read \(Permission denied\)"):
        checkpoint.latest(a_run)
    monkeypatch.undo()
    assert checkpoint.steps(a_run / "nowhere") == []


def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content is hashed from now on, in the order of hashing."""
    names: list[str] = []
    digest = hashing.hashlib.file_digest

    def counted(file: Any, algorithm: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashing.hashlib, "file_digest", counted)
    return names


MODEL = ["card.md", "config.json", "fingerprint.safetensors", "model.safetensors", "tokenizer.json"]
TRAIN = ["state.json", "state.safetensors"]


def test_only_what_is_read_is_hashed_and_once(copied: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashing, "SETTLED_NS", -1)
    names = hashed_files(monkeypatch)
    openpalm.load(copied)
    checkpoint.load(checkpoint.resolve(copied))
    assert checkpoint.tokenizer_json(copied) == TOKENIZER
    assert sorted(names) == MODEL
    checkpoint.resolve(copied, training=True)
    checkpoint.load_train_state(copied)
    verify(copied)
    assert sorted(names) == sorted([*MODEL, *TRAIN])
    (copied / "card.md").touch()
    verify(copied)
    assert names[len(MODEL) + len(TRAIN) :] == ["card.md"]


def test_damage_in_train_counts_where_train_is_read(copied: Path):
    content = bytearray((copied / "train" / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "train" / "state.safetensors").write_bytes(content)
    openpalm.load(copied)
    for read in (verify, checkpoint.load_train_state):
        with pytest.raises(CheckpointError, match=r"train/state.safetensors was altered"):
            read(copied)
    with pytest.raises(CheckpointError, match="was altered"):
        checkpoint.resolve(copied, training=True)


LISTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "emptied": (lambda files: files.clear(), "does not list config.json"),
    "no weights": (lambda files: files.pop("model.safetensors"), "does not list model.safetensors"),
    "no config": (lambda files: files.pop("config.json"), "does not list config.json"),
    **{
        f"name {name[:12]!r}": (
            lambda files, name=name: files.update({name: {"bytes": 1, "sha256": "0" * 64}}),
            "its list of files",
        )
        for name in (
            "x" * 300,
            "/etc/passwd",
            "../up",
            "a/../b",
            "a//b",
            "./a",
            "",
            "a\0b",
            "\ud800",
        )
    },
    "name of 4,500": (
        lambda files: files.update({"a/" * 2250 + "b": {"bytes": 1, "sha256": "0" * 64}}),
        "File name too long",
    ),
    "no hash": (lambda files: files["card.md"].update(sha256=7), "its list of files"),
    "no size": (lambda files: files["card.md"].update(bytes="7"), "its list of files"),
    "no entry": (lambda files: files.update({"card.md": None}), "its list of files"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_files_that_was_not_written_here(copied: Path, kind: str):
    change, says = LISTS[kind]
    files = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["files"]
    change(files)
    rewrite_manifest(copied, files=files)
    assert says in refused(copied)


def test_a_file_that_the_manifest_does_not_list_is_not_used(copied: Path):
    files = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["files"]
    for name in ("tokenizer.json", "fingerprint.safetensors", "train/state.safetensors"):
        del files[name]
    (copied / "fingerprint.safetensors").write_bytes(b"none")
    rewrite_manifest(copied, files=files)
    openpalm.load(copied)
    assert checkpoint.tokenizer_json(copied) is None
    with pytest.raises(CheckpointError, match=r"lists no train/state.safetensors"):
        checkpoint.load_train_state(copied)
    del files["train/state.json"]
    rewrite_manifest(copied, files=files)
    with pytest.raises(CheckpointError, match=r"lists no train/state.json"):
        checkpoint.load_train_state(copied)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite(copied: Path, number: float, dtype: str):
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    weights["norm.weight"][3] = number
    safetensors.torch.save_file(weights, copied / "model.safetensors")
    (copied / "fingerprint.safetensors").unlink()
    rewrite_manifest(copied)
    with pytest.raises(CheckpointError, match=r"model.safetensors: norm.weight .* not finite"):
        openpalm.load(copied, dtype=dtype)
    said: list[str] = []
    assert not checkpoint.load(copied, allow=said.append).norm.weight.isfinite().all()
    assert len(said) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["optimizer/a.weight/exp_avg", "model/critic.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_is_not_finite(tmp_path: Path, number: float, name: str, dtype: torch.dtype):
    whole = state().tensors | {name: torch.arange(12.0, dtype=dtype).view(3, 4)}
    directory = save(tmp_path / "whole", train=TrainState(whole, {"step": 12}))
    assert torch.equal(checkpoint.load_train_state(directory).tensors[name], whole[name])
    whole[name][2, 1] = number
    directory = save(tmp_path / "ruined", train=TrainState(whole, {"step": 12}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_train_state(directory)
    assert str(caught.value) == (
        f"{directory}/train: {name} holds numbers that are not finite; "
        "take an older checkpoint or another copy"
    )
    openpalm.load(directory)  # what is published is whole


def test_what_a_rollout_keeps_may_be_infinite(tmp_path: Path):
    kept = state().tensors | {"loader/logprobs": torch.tensor([0.0, -float("inf")])}
    directory = save(tmp_path / "rollout", train=TrainState(kept, {"step": 12}))
    found = checkpoint.load_train_state(directory).tensors["loader/logprobs"]
    assert torch.equal(found, kept["loader/logprobs"])


def test_the_fingerprint_notices_other_weights_with_a_valid_manifest(copied: Path):
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    weights["blocks.1.project_out.down"][3, 5] += 0.5
    safetensors.torch.save_file(weights, copied / "model.safetensors")
    rewrite_manifest(copied)
    verify(copied)
    assert "computes other logits than when it was written" in refused(copied)


def test_the_fingerprint_notices_other_code(copied: Path, monkeypatch: pytest.MonkeyPatch):
    honest = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: honest(x) * 1.01)
    assert "computes other logits than when it was written" in refused(copied)


def test_the_fingerprint_allows_what_rounding_does(copied: Path):
    pair = safetensors.torch.load_file(copied / "fingerprint.safetensors")
    pair["logits"] += 2e-5 * pair["logits"].abs().max()
    safetensors.torch.save_file(pair, copied / "fingerprint.safetensors")
    rewrite_manifest(copied)
    openpalm.load(copied)


@pytest.mark.parametrize("kind", ["other shape", "other name", "no tensors", "nan"])
def test_a_fingerprint_that_is_none(copied: Path, kind: str):
    file = copied / "fingerprint.safetensors"
    nan = torch.full((1, 16, 80), float("nan"))
    contents = {
        "other shape": {"logits": torch.zeros(1, 16, 7)},
        "other name": {"more": torch.zeros(1)},
        "nan": {"logits": nan},
    }
    if kind == "no tensors":
        file.write_bytes(b"nothing")
    else:
        safetensors.torch.save_file(contents[kind], file)
    rewrite_manifest(copied)
    refused(copied)


# --- nothing hostile gets in ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/hostname", ".."])
def test_a_manifest_stays_in_its_directory(copied: Path, name: str):
    (copied.parent / "outside").write_bytes(b"secret")
    files = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["files"]
    rewrite_manifest(copied, files={**files, name: {"bytes": 6, "sha256": "00"}})
    assert "not one this project writes" in refused(copied, "manifest.json")


@pytest.mark.parametrize(
    "files", [None, [], {"card.md": 3}, {"card.md": {}}, {"card.md": {"bytes": 1}}, "x"]
)
def test_a_list_of_files_that_is_none(copied: Path, files: Any):
    rewrite_manifest(copied, files=files)
    refused(copied, "manifest.json")


@pytest.mark.parametrize("changes", [{"format": "other"}, {"version": 2}, {"version": "1"}])
def test_another_format_is_not_guessed_at(copied: Path, changes: dict[str, Any]):
    rewrite_manifest(copied, **changes)
    refused(copied, "manifest.json")


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": HUGE},
        {"vocab_size": HUGE},
        {"vocab_size": HUGE, "dim": HUGE},
        {"ff_dim": HUGE},
        {"heads": HUGE, "head_dim": HUGE - 1},
        {"heads": HUGE, "kv_heads": HUGE, "head_dim": HUGE - 1, "dim": HUGE},
        {"depth": 1},
        {"depth": 3},
        {"dim": 8},
        {"tied": False},
        {"bias": True},
        {"vocab_size": 0},
        {"vocab_size": 2**70},
        {"dim": "16"},
        {"dim": True},
        {"rotary": ["halves"]},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_config_that_lies_builds_no_model(copied: Path, changes: dict[str, Any]):
    file = copied / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"] |= changes
    file.write_text(json.dumps(content), encoding="utf-8")
    rewrite_manifest(copied)
    refused(copied)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"model": 1}', "[" * 100_000, '{"format": "openpalm-checkpoint"}'],
    ids=["empty", "list", "null", "torn", "number", "deep", "bare"],
)
def test_a_config_that_is_none(copied: Path, text: str):
    (copied / "config.json").write_text(text, encoding="utf-8")
    rewrite_manifest(copied)
    refused(copied, "config.json")


@pytest.mark.parametrize("file", ["manifest.json", "config.json"])
def test_json_of_any_size_is_not_read(copied: Path, file: str, monkeypatch: pytest.MonkeyPatch):
    with (copied / file).open("r+b") as stream:
        stream.truncate(json_file.MAX_BYTES + 1)  # sparse
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("read it"))
    with pytest.raises(CheckpointError, match="too large"):
        json_file.read_json(copied / file, "take another copy")


@pytest.mark.parametrize("kind", ["other shapes", "other names", "no tensors", "header", "empty"])
def test_weights_of_something_else(copied: Path, kind: str):
    file = copied / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    if kind == "other shapes":
        weights["norm.weight"] = torch.zeros(17)
        safetensors.torch.save_file(weights, file)
    elif kind == "other names":
        weights["norm.scale"] = weights.pop("norm.weight")
        safetensors.torch.save_file(weights, file)
    elif kind == "header":
        file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    else:
        file.write_bytes(b"PK\x03\x04 not tensors" if kind == "no tensors" else b"")
    rewrite_manifest(copied)
    refused(copied, "model.safetensors")


def test_weights_that_fit_another_model_are_refused(pristine: Path):
    with pytest.raises(CheckpointError, match="a checkpoint of another model"):
        checkpoint.load_weights(made(replace(CONFIG, ff_dim=64)), pristine)


# Headers that promise what their file does not hold, as (shape, first byte, last byte, dtype).
LIES = {
    "huge": ([2**40], [0, 2**42], "F32"),
    "huge product": ([2**32, 2**32], [0, 4], "F32"),
    "more than it has": ([8], [0, 32], "F32"),
    "less than it has": ([1], [0, 4], "F32"),
    "backwards": ([1], [16, 12], "F32"),
    "negative": ([-4], [0, 16], "F32"),
    "another dtype": ([4], [0, 16], "PICKLE"),
    "no numbers": (["4"], [0, 16], "F32"),
}


def write_header(path: Path, header: bytes, content: bytes = bytes(16)) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


@pytest.mark.parametrize("kind", LIES)
def test_a_state_with_a_header_that_lies(copied: Path, kind: str):
    shape, offsets, dtype = LIES[kind]
    path = copied / "train" / "state.safetensors"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_header(path, json.dumps({"a": entry}).encode())
    rewrite_manifest(copied)
    assert checkpoint.load_train_state(copied).tensors["a"].tolist() == [0.0] * 4
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    write_header(path, json.dumps({"a": entry}).encode())
    rewrite_manifest(copied)
    verify(copied)  # nothing but the content is wrong
    assert "cannot be read" in refused(copied, "train/state.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04", bytes(8), b"\xff" * 64])
def test_a_state_that_is_no_safetensors_file(copied: Path, content: bytes):
    (copied / "train" / "state.safetensors").write_bytes(content)
    rewrite_manifest(copied)
    assert "cannot be read" in refused(copied, "train/state.safetensors")


def test_any_damage_to_the_state_s_header_is_a_clear_error_or_another_name(copied: Path):
    """Even with a manifest that agrees: one byte in every ten of the header changed."""
    path = copied / "train" / "state.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    drawn = random.Random(1)
    outcomes = set()
    for first in range(0, header, 10):
        at = drawn.randrange(first, min(first + 10, header))
        other = bytes([whole[at] ^ drawn.randrange(1, 256)])
        path.write_bytes(whole[:at] + other + whole[at + 1 :])
        rewrite_manifest(copied)
        try:
            checkpoint.load_train_state(copied)
            outcomes.add("read")  # a letter of a tensor's name, say
        except CheckpointError as error:
            outcomes.add(str(error).partition(" (")[0])
    assert outcomes <= {"read", f"{path}: cannot be read"}
    assert len(outcomes) == 2


def test_a_state_that_the_manifest_does_not_list_is_not_used(copied: Path):
    """Files beside the listed ones, as torch.distributed.checkpoint writes them, change nothing."""
    expected = checkpoint.load_train_state(copied)
    (copied / "train" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    safetensors.torch.save_file({"half": torch.zeros(3)}, copied / "train" / "more.safetensors")
    found = checkpoint.load_train_state(copied)
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    assert torch.equal(found.tensors["half"], expected.tensors["half"])


@pytest.mark.parametrize("version", ["0.1.0", "9.0", None, ["0.1.0"], "0.1.0\n" + "x" * 200])
def test_a_state_of_another_version_is_refused_by_its_name(copied: Path, version: Any):
    """The model loads; to resume is the user's mistake and no damage of the checkpoint."""
    (copied / "train" / "state.safetensors").rename(copied / "train" / "__0_0.distcp")
    rewrite_manifest(copied, versions={"openpalm": version, "torch": "2.6"})
    with pytest.raises(SettingsError) as caught:
        checkpoint.load_train_state(copied)
    said = str(caught.value)
    assert str(copied) in said
    assert f"was written by OpenPaLM {shown(str(version))}" in said
    assert f"resumed by {openpalm.__version__}" in said
    assert "--init" in said
    assert len(said.splitlines()) == 1
    assert torch.equal(openpalm.load(copied).embedding, made().embedding)


def test_a_state_of_another_version_in_the_same_form_is_read(copied: Path):
    rewrite_manifest(copied, versions={"openpalm": "0.3.0", "torch": "2.6"})
    assert checkpoint.load_train_state(copied).values == state().values


# --- saving that fails ---------------------------------------------------------------------------


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


FULL = "No space left on device"
FAILURES: dict[str, tuple[str, BaseException]] = {
    "tensors": (
        "directory.tensors.safetensors.torch.save_file",
        safetensors.SafetensorError(f"I/O error: {FULL} (os error 28)"),
    ),
    "tensors, as an OSError": ("directory.tensors.safetensors.torch.save_file", no_space()),
    "texts": ("directory._write_text", no_space()),
    "hashes": ("manifest.sha256_of", no_space()),
    "sync": ("os.fsync", no_space()),
}


@pytest.mark.parametrize("phase", FAILURES)
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
):
    older = save(tmp_path / "step-00000001")
    where, error = FAILURES[phase]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for name in ("step-00000002", "step-00000001"):
        with monkeypatch.context() as patch:
            target = where if where == "os.fsync" else f"openpalm.checkpoint.{where}"
            patch.setattr(target, fail)
            with pytest.raises(StorageError) as caught:
                save(tmp_path / name, made(seed=1))
        assert str(caught.value) == f"{tmp_path / name}: cannot be saved ({FULL})"
        assert [path.name for path in tmp_path.iterdir()] == [older.name]
        assert torch.equal(openpalm.load(older).embedding, made().embedding)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (safetensors.SafetensorError("I/O error: (os error 5)"), "Input/output error"),
    ],
    ids=["read-only", "permission", "safetensors"],
)
def test_other_refusals_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(StorageError, match=rf"cannot be saved \({said}\)"):
        save(tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ValueError("a bug")])
def test_what_is_not_the_disk_s_fault_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint.tensors, "write", fail)
    with pytest.raises(type(error)):
        save(tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts an empty file system of so many KiB; only root may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def of(kilobytes: int) -> Path:
        nonlocal mounted
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except OSError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip("mounting needs root")
        mounted = True
        return folder

    yield of
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Callable[[int], Path]):
    """Every size from room for one checkpoint to room for two, so that each write meets it."""
    older = save(small_disk(4096) / "step-00000001")
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in older.rglob("*") if path.is_file())
    saved, said = False, set[str]()
    for kilobytes in range(used + 4, 3 * used, 8):
        disk = small_disk(kilobytes)
        try:
            save(disk / "step-00000002")
            saved = True
            break
        except StorageError as error:
            said.add(str(error))
        assert [path.name for path in disk.iterdir()] == [older.name]
        verify(older)
    assert saved
    assert said == {f"{disk / 'step-00000002'}: cannot be saved ({FULL})"}
    assert kilobytes > used + 40
    verify(disk / "step-00000002")


# --- a run's checkpoints -------------------------------------------------------------------------


@pytest.fixture
def a_run(pristine: Path, tmp_path: Path) -> Path:
    for step in (2, 10, 9, 100_000_000):
        shutil.copytree(pristine, tmp_path / "run" / "checkpoints" / checkpoint.step_name(step))
    return tmp_path / "run"


def test_steps_are_in_the_order_of_numbers(a_run: Path):
    (a_run / "checkpoints" / "damaged-step-00000200").mkdir()
    (a_run / "checkpoints" / ".step-00000300.partial-1").mkdir()
    (a_run / "checkpoints" / "step-4").mkdir()
    (a_run / "checkpoints" / "step-00000004.bak").mkdir()
    found = [path.name for path in checkpoint.steps(a_run)]
    assert found == ["step-00000002", "step-00000009", "step-00000010", "step-100000000"]
    assert checkpoint.latest(a_run) == a_run / "checkpoints" / "step-100000000"
    assert checkpoint.resolve(a_run) == checkpoint.latest(a_run)


def test_the_newest_whole_one_is_taken_and_it_says_so(
    a_run: Path, capsys: pytest.CaptureFixture[str]
):
    folder = a_run / "checkpoints"
    (folder / "step-100000000" / "model.safetensors").write_bytes(b"torn")
    (folder / "step-00000010" / "manifest.json").unlink()
    assert checkpoint.latest(a_run) == folder / "step-00000009"
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("passing over a damaged checkpoint:")
    assert "step-100000000: model.safetensors is torn (4 bytes)" in first
    assert "step-00000010" in second
    told: list[str] = []
    assert openpalm.load(a_run)
    checkpoint.latest(a_run, told.append)
    assert len(told) == 2


def test_a_run_without_a_whole_checkpoint(a_run: Path, tmp_path: Path):
    for directory in checkpoint.steps(a_run):
        (directory / "manifest.json").write_text("{}", encoding="utf-8")
    assert checkpoint.latest(a_run) is None
    with pytest.raises(CheckpointError, match=r"its \d+ checkpoints are damaged \(.*; restore one"):
        openpalm.load(a_run)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint yet; let it train longer"):
        openpalm.load(tmp_path / "empty")


def test_a_path_that_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint or run"):
        openpalm.load(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "file"):
        (tmp_path / "file").write_bytes(b"\x80\x04K\x01.")
        with pytest.raises(CheckpointError, match=r"not a checkpoint of OpenPaLM.*convert"):
            openpalm.load(path)


def test_what_a_killed_save_left_is_cleared(a_run: Path):
    folder = a_run / "checkpoints"
    for name in (".step-00000011.partial-77", ".step-00000002.old"):
        (folder / name / "train").mkdir(parents=True)
        (folder / name / "train" / "state.json").write_bytes(b"{")
    assert checkpoint.latest(a_run) == folder / "step-100000000"
    checkpoint.remove_partial(a_run)
    assert not list(folder.glob(".*"))
    assert len(checkpoint.steps(a_run)) == 4


def test_a_save_after_a_killed_one_of_the_same_number(tmp_path: Path):
    """In a container a process may get the number of the one that was killed."""
    for leftover in (f".ckpt.partial-{os.getpid()}", ".ckpt.old"):
        (tmp_path / leftover / "train").mkdir(parents=True)
        (tmp_path / leftover / "config.json").write_bytes(b"half")
    save(tmp_path / "ckpt")
    save(tmp_path / "ckpt", made(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert torch.equal(openpalm.load(tmp_path / "ckpt").embedding, made(seed=1).embedding)


def test_a_config_of_another_version_names_both_versions(tmp_path: Path):
    landed = Path(__file__).resolve().parents[1] / "landed" / "data" / "palm" / "checkpoint"
    directory = tmp_path / "checkpoint"
    shutil.copytree(landed, directory)
    file = directory / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["wings"] = 2
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_config(directory)
    assert str(caught.value) == (
        f"{file}: was written by OpenPaLM '0.1.0', and this is {openpalm.__version__} (unknown "
        "model field wings); install that version, or take an older checkpoint or another copy"
    )
