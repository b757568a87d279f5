"""Processes that were started differently, or do not share storage, are refused before step 1.

Without these checks each process would update its part of the weights with its own options.
"""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from rank_runs import LIMIT_S, call, rank
from train_runs import same_run
from train_samples import write_dataset

from openpalm.base import files
from openpalm.cli import common
from ranks import on_ranks

LATE_S = 0.3
"""seconds after which a process sees the files that another one wrote"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "plain")


def started(out: Path, data: Path, own: dict[str, Any], fault: Any) -> tuple[int, str]:
    """The run, with other options on process 1."""
    options = {"data": data, "steps": 4, "save_every": 2, "eval_every": 4}
    return call(out, data, fault, options | (own if rank() == 1 else {}))


def refusal(out: Path, data: Path, own: dict[str, Any], fault: Any = None) -> str:
    """The one line of process 0 of a run that is refused."""
    found = on_ranks(2, started, out, data, own, fault, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [2, 2], found
    [line] = found[0][1].splitlines()
    return line


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"optim.lr": 0.5},
            r"--optim.lr: 0.5 on process 1 \(.+\), not set on process 0; start all",
        ),
        ({"dtype": "bfloat16"}, "--dtype: bfloat16 on process 1 .*, float32 on process 0"),
        ({"parallel.tensor": 2}, "--parallel: tensor 2 on process 1, shard 2 on process 0; start"),
        ({"init": "somewhere"}, "--init: somewhere on process 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_are_refused(data: Path, tmp_path: Path, own: dict[str, Any], said: str):
    assert re.search(said, refusal(tmp_path / "run", data, own))
    assert not (tmp_path / "run").exists()


def another_version(patch: pytest.MonkeyPatch) -> None:
    if rank() == 1:
        patch.setattr(common, "__version__", "0.0.1")


def test_another_version_is_refused(data: Path, tmp_path: Path):
    line = refusal(tmp_path / "run", data, {}, another_version)
    assert "version of OpenPaLM: 0.0.1 on process 1" in line


def test_other_data_are_refused_and_a_copy_is_not(data: Path, tmp_path: Path):
    other = write_dataset(tmp_path / "other", seed=1)
    assert "hash of the data: " in refusal(tmp_path / "run", data, {"data": other})
    copy = shutil.copytree(data, tmp_path / "copy")
    found = on_ranks(2, started, tmp_path / "run", data, {"data": copy}, None, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [0, 0]


def may_not_write(patch: pytest.MonkeyPatch) -> None:
    original = Path.write_text

    def refused(self: Path, *more: Any, **options: Any) -> int:
        if rank() == 1:
            raise PermissionError(13, "Permission denied")
        return original(self, *more, **options)

    patch.setattr(Path, "write_text", refused)


def sees_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "LATE_S", LATE_S)
    hidden(patch, for_s=float("inf"))


def sees_late(patch: pytest.MonkeyPatch) -> None:
    hidden(patch, for_s=LATE_S)


def hidden(patch: pytest.MonkeyPatch, for_s: float) -> None:
    """Process 1 does not see a file or checkpoint for some time after it asks for it first."""
    asked: dict[str, float] = {}

    def late(original: Any) -> Any:
        def look(self: Path, *more: Any, **options: Any) -> Any:
            writes = "w" in str(more[:1]) + str(options.get("mode"))
            entry = re.search(r"/run/\w+/(checkpoints/)?[^/]+", str(self))
            if rank() == 1 and entry and not writes:
                first = asked.setdefault(entry[0], time.monotonic())
                if time.monotonic() - first < for_s:
                    raise FileNotFoundError(2, "No such file or directory", str(self))
            return original(self, *more, **options)

        return look

    for name in ("open", "stat", "read_text"):
        patch.setattr(Path, name, late(getattr(Path, name)))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (may_not_write, r"process 1 on .+ may not write there \(Permission denied\)"),
        (sees_nothing, "process 1 on .+ does not see the files that process 0 writes there"),
    ],
)
def test_a_run_directory_that_is_not_shared_is_refused(
    data: Path, tmp_path: Path, fault: Any, said: str
):
    out = tmp_path / "run" / "new"
    assert re.search(f"--out .+: {said}", refusal(out, data, {}, fault))
    assert list(out.iterdir()) == []


def assert_finished(out: Path, data: Path, fault: Any) -> None:
    found = on_ranks(2, started, out, data, {}, fault, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [0, 0], found


def test_storage_that_shows_files_late_changes_nothing(data: Path, tmp_path: Path):
    for fault in (None, sees_late):
        out = tmp_path / "run" / ("late" if fault else "whole")
        assert_finished(out, data, fault)
        shutil.rmtree(out / "checkpoints" / "step-00000004")
        assert_finished(out, data, fault)  # from step 2
    assert same_run(tmp_path / "run" / "late", tmp_path / "run" / "whole")
