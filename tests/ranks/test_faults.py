"""Faults of one process of several: all of them stop at the same step, one line says why, and the
same command continues to the numbers of a run that nothing disturbed."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rank_runs import LIMIT_S, call, in_step, rank, wait_for
from safetensors.torch import load_file
from torch.distributed import distributed_c10d
from train_runs import rows, same_run, step_names
from train_samples import write_dataset

from openpalm.checkpoint import contents, parts
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import verify
from openpalm.data.batches.loader import Loader
from openpalm.train.objective import NextToken
from ranks import on_ranks

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "plain")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert statuses(out, data) == [0, 0]
    return out


def run(out: Path, data: Path, fault: Any = None, **changes: Any) -> list[tuple[int, str]]:
    return on_ranks(2, call, out, data, fault, changes, limit_s=LIMIT_S)


def statuses(out: Path, data: Path, fault: Any = None, **changes: Any) -> list[int]:
    return [status for status, _ in run(out, data, fault, **changes)]


def error_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("openpalm: error:")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


def terminated(patch: pytest.MonkeyPatch) -> None:
    """As torchrun and Slurm do together: every process gets the signal twice."""
    ask = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    in_step(patch, 3, lambda: [ask(), ask()])


def one_interrupted(patch: pytest.MonkeyPatch) -> None:
    if rank() == 1:
        in_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.parametrize(
    ("fault", "step", "status"), [(terminated, 3, 143), (one_interrupted, 5, 130)]
)
def test_a_signal_to_all_or_one_saves_one_step(
    data: Path, whole: Path, tmp_path: Path, fault: Any, step: int, status: int
):
    out = tmp_path / "run"
    found = run(out, data, fault)
    assert [code for code, _ in found] == [status, status]
    assert step_names(out)[-1] == checkpoint.step_name(step)
    assert f"stopped after step {step}; run the same command again" in found[0][1]
    assert rows(out)[-1]["step"] == step
    assert statuses(out, data) == [0, 0]
    assert same_run(out, whole)


def waits_for_a_hanging_one(patch: pytest.MonkeyPatch) -> None:
    """Process 0 gets the signal while its main thread waits for process 1, which hangs."""
    if rank() == 1:
        in_step(patch, 3, lambda: time.sleep(120))
    else:
        ask = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        in_step(patch, 3, lambda: threading.Timer(1.0, ask).start())


def test_a_process_that_cannot_save_ends_after_the_grace_time(data: Path, tmp_path: Path):
    with pytest.raises(AssertionError, match=r"rank 0 of call died \(143\)"):
        run(tmp_path / "run", data, waits_for_a_hanging_one, **{"parallel.grace_s": 3})


def with_a_hanging_process(out: Path, data: Path) -> tuple[int, str]:
    """Process 1 hangs in step 3 until process 0 has ended."""
    ended = out.parent / "ended"

    def fault(patch: pytest.MonkeyPatch) -> None:
        if rank() == 1:
            in_step(patch, 3, lambda: wait_for(ended.exists))
        else:
            in_step(patch, 3, short_limit)

    try:
        return call(out, data, fault, {"save_every": 2, "parallel.timeout_s": 60})
    finally:
        ended.touch()


def short_limit() -> None:
    """From now on this process waits for others one second, without another for its start."""
    for group in [*distributed_c10d._world.pg_map]:
        distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)


def test_a_process_that_hangs_is_named(data: Path, tmp_path: Path, whole: Path):
    out = tmp_path / "run"
    found = on_ranks(2, with_a_hanging_process, out, data, limit_s=LIMIT_S)
    assert [status for status, _ in found] == [1, 1]
    line = error_line(found[0][1])
    assert "step 3: process 1 (pid " in line
    assert "did not arrive within 60 s; run the same command again to continue" in line
    assert step_names(out) == ["step-00000002"]
    assert statuses(out, data) == [0, 0]
    assert same_run(out, whole)


def no_space_on_one(patch: pytest.MonkeyPatch) -> None:
    original = parts._write_at

    def full(descriptor: int, *more: Any) -> None:
        original(descriptor, *more)
        if rank() == 1 and "step-00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise FULL

    patch.setattr(parts, "_write_at", full)


def no_commit(patch: pytest.MonkeyPatch) -> None:
    original = contents.write_manifest

    def full(partial: Path, lineage: dict[str, Any]) -> None:
        if lineage["step"] == 4:
            raise FULL
        original(partial, lineage)

    patch.setattr(contents, "write_manifest", full)


@pytest.mark.parametrize(("fault", "where"), [(no_space_on_one, ", on process 1"), (no_commit, "")])
def test_a_save_that_fails_on_one_process_stops_all(
    data: Path, whole: Path, tmp_path: Path, fault: Any, where: str
):
    out = tmp_path / "run"
    found = run(out, data, fault, save_every=2, keep_checkpoints=10)
    assert [status for status, _ in found] == [1, 1]
    reason = f"step-00000004: cannot be saved (No space left on device{where})"
    assert error_line(found[0][1]).endswith(reason)
    # Noticed at a step's end, long before the next save asks.
    assert step_names(out) == ["step-00000002"]
    assert not list((out / "checkpoints").glob(".*"))
    assert statuses(out, data) == [0, 0]
    assert same_run(out, whole)


def slow_disk(patch: pytest.MonkeyPatch) -> None:
    original = parts._write_own

    def slow(path: Path, *more: Any) -> None:
        if rank() == 1 and ".step-00000002" in str(path):
            rows_file = next(folder for folder in path.parents if folder.name == "run")
            rows_file /= "metrics.jsonl"
            # Two more steps are taken while this save waits for them.
            wait_for(lambda: '"step": 4, "loss"' in rows_file.read_text(encoding="utf-8"))
            time.sleep(5)
        original(path, *more)

    patch.setattr(parts, "_write_own", slow)


def test_a_save_longer_than_the_time_limit_stalls_nothing(data: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    options = {"save_every": 2, "steps": 8, "keep_every": 2, "parallel.timeout_s": 3}
    assert statuses(out, data, slow_disk, **options) == [0, 0]
    assert step_names(out) == [checkpoint.step_name(step) for step in (2, 4, 6, 8)]
    for saved in checkpoint.steps(out):
        verify(saved, training=True)
    assert same_run(out, whole)


def one_loss_is_not_finite(patch: pytest.MonkeyPatch) -> None:
    original = NextToken.loss
    bad = []
    if rank() == 1:
        in_step(patch, 3, lambda: bad.append(1))

    def loss(self: NextToken, model: Any, batch: Any) -> Any:
        found, metrics = original(self, model, batch)
        return (found * float("nan") if bad and bad.pop() else found), metrics

    patch.setattr(NextToken, "loss", loss)


def all_are_not_finite(patch: pytest.MonkeyPatch) -> None:
    original = NextToken.loss

    def loss(self: NextToken, model: Any, batch: Any) -> Any:
        found, metrics = original(self, model, batch)
        return found * float("nan") if rank() == 1 else found, metrics

    patch.setattr(NextToken, "loss", loss)


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    found = run(out, data, one_loss_is_not_finite)
    assert [status for status, _ in found] == [0, 0]
    steps = {row["step"]: row.get("skipped") for row in rows(out) if "loss" in row}
    assert [step for step, skipped in steps.items() if skipped] == [3]
    kept = out / "skipped" / "step-00000003-rank-1.safetensors"
    assert list(kept.parent.iterdir()) == [kept]
    said = " ".join(found[0][1].split())
    assert "step 3 skipped: loss not finite (on process 1; its batch is kept in" in said
    stored = load_file(kept)
    assert stored["microbatch-0/inputs"].shape == (4, 16)
    assert (stored["microbatch-0/inputs"][:, 1:] == stored["microbatch-0/targets"][:, :-1]).all()


def test_losses_that_stay_not_finite_end_all_and_keep_a_few_batches(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    found = run(out, data, all_are_not_finite, max_skipped_steps=5)
    assert [status for status, _ in found] == [1, 1]
    line = error_line(found[0][1])
    assert "step 5: loss not finite, 5 steps in a row" in line
    assert line.endswith("(on process 1)")
    names = sorted(file.name for file in (out / "skipped").iterdir())
    assert names == [f"step-0000000{step}-rank-1.safetensors" for step in (1, 2, 3)]


def data_vanishes(patch: pytest.MonkeyPatch) -> None:
    original = Loader.__next__

    def gone(self: Any) -> Any:
        if rank() == 1 and self.state_dict()["rows_consumed"] == 16:
            raise FileNotFoundError(2, "No such file or directory", "shard-00001.bin")
        return original(self)

    patch.setattr(Loader, "__next__", gone)


def test_data_that_vanished_on_one_process_stops_all(data: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    found = run(out, data, data_vanishes, dtype="float32")
    assert [status for status, _ in found] == [1, 1]
    assert error_line(found[0][1]).endswith("shard-00001.bin: No such file or directory")
    assert statuses(out, data) == [0, 0]
    assert same_run(out, whole)
