"""Saving that fails: the older checkpoint stays and nothing else."""

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checkpoints import made, save

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import verify
from openpalm.errors import StorageError


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


FULL = "No space left on device"


FAILURES: dict[str, tuple[str, BaseException]] = {
    "tensors": (
        "directory.tensors.safetensors.torch.save_file",
        safetensors.SafetensorError(f"I/O error: {FULL} (os error 28)"),
    ),
    "tensors, as an OSError": ("directory.tensors.safetensors.torch.save_file", no_space()),
    "texts": ("contents.Contents.write_small", no_space()),
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
