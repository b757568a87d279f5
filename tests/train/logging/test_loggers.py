"""What TensorBoard reads back is what metrics.jsonl holds; a logger that fails stops nothing."""

import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openpalm.train.config import TrainSettings
from openpalm.train.logging import loggers
from openpalm.train.logging.loggers import Loggers, WeightsAndBiases, check_installed
from openpalm.train.logging.metrics import read_rows
from openpalm.train.trainer import Trainer

Train = Callable[..., int]


def settings(out: Path, **more: Any) -> TrainSettings:
    return TrainSettings(data=Path("data"), out=out, model="tiny", steps=5, **more)


class Recorded:
    """A logger that keeps what it gets, and fails when told to."""

    fails: tuple[str, ...] = ()
    rows: list[dict[str, Any]]

    def __init__(self, settings: TrainSettings, step: int, say: Any):
        self.rows, self.step, self.closed = [], step, False
        type(self).made = self
        self._fail("open")

    def write(self, row: dict[str, Any]) -> None:
        self._fail("write")
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True
        self._fail("close")

    def _fail(self, when: str) -> None:
        if when in self.fails:
            raise ConnectionError(f"no route\nto host while it should {when}")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    class Own(Recorded):
        pass

    monkeypatch.setitem(loggers._KINDS, "wandb", Own)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    return Own


def test_a_logger_gets_every_row_of_the_run(train: Train, tmp_path: Path, recorded: type[Recorded]):
    assert train(tmp_path / "run", loggers="wandb") == 0
    files = [tmp_path / "run" / name for name in ("metrics.jsonl", "samples.jsonl")]
    wanted = [row for file in files for row in read_rows(file)]
    assert sorted(recorded.made.rows, key=str) == sorted(wanted, key=str)
    assert recorded.made.closed


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_logger_that_fails_is_reported_once_and_dropped(
    train: Train,
    tmp_path: Path,
    recorded: type[Recorded],
    capsys: pytest.CaptureFixture[str],
    when: str,
):
    assert train(tmp_path / "plain") == 0
    capsys.readouterr()
    recorded.fails = (when,)
    assert train(tmp_path / "run", loggers="wandb") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "--loggers" in line]
    assert told == [
        "--loggers wandb: failed, the run continues without it "
        f"(no route to host while it should {when})"
    ]
    plain, logged = (
        [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("plain", "run")
    )
    assert plain == logged, "logging changes nothing that is computed"


@pytest.mark.parametrize("loggers", ["tensorbord", "tensorboard;wandb", "none", "wandb,"])
def test_an_unknown_logger(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], loggers: str
):
    assert train(tmp_path / "run", loggers=loggers) == 2
    assert capsys.readouterr().err == (
        f"openpalm: error: --loggers {loggers}: must be tensorboard or wandb, "
        "or both with a comma between\n"
    )


def test_a_missing_package_is_reported_before_any_work(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert train(tmp_path / "run", loggers="wandb, tensorboard") == 2
    assert capsys.readouterr().err == (
        "openpalm: error: --loggers wandb: is not installed; pip install 'openpalm[logging]', "
        "or leave it out\n"
    )
    assert not (tmp_path / "run").exists()
    check_installed(settings(tmp_path))


def test_another_log_is_no_other_run(train: Train, tmp_path: Path, recorded: type[Recorded]):
    assert train(tmp_path / "run", steps=8) == 0
    assert train(tmp_path / "run", steps=8, loggers="wandb") == 0


def events(run: Path) -> Any:
    """What TensorBoard itself reads of a run's directory."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = reader.EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "tensors": 0})
    return read.Reload()


def check_scalars(run: Path) -> None:
    """TensorBoard shows each number of metrics.jsonl at its step, once."""
    shown = events(run)
    rows = read_rows(run / "metrics.jsonl")
    names = {n for row in rows for n, v in row.items() if v is not None} - {"step", "skipped"}
    # mfu may be in steps before a kill only: there is none where a step beat the measured peak.
    assert {*shown.Tags()["scalars"]} - {"mfu"} == names - {"mfu"}
    for name in names:
        kept = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        found = [(event.step, event.value) for event in shown.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in kept]
        assert [v for _, v in found] == pytest.approx([v for _, v in kept], rel=1e-6)


def text_of(event: Any) -> str:
    return event.tensor_proto.string_val[0].decode()


def test_tensorboard_shows_the_rows(train: Train, tmp_path: Path):
    run = tmp_path / "run"
    pytest.importorskip("tensorboard")
    assert train(run, loggers="tensorboard") == 0
    check_scalars(run)
    shown = events(run)
    assert "    model: tiny\n" in text_of(shown.Tensors("settings/text_summary")[0])
    samples = shown.Tensors("samples/text_summary")
    assert [event.step for event in samples] == [4, 8]
    assert all("|" in text_of(sample) for sample in samples)


@pytest.fixture
def stopped_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Kills the run, without any of its care, in the middle of that step."""
    original = Trainer.forward_backward

    def arrange(step: int) -> None:
        def patched(self: Trainer, batches: Any) -> Any:
            if self.step + 1 == step and self.steps < 10**6:
                monkeypatch.setattr(Trainer, "forward_backward", original)
                raise Killed
            return original(self, batches)

        monkeypatch.setattr(Trainer, "forward_backward", patched)

    return arrange


class Killed(BaseException):
    """As SIGKILL would."""


def test_tensorboard_shows_a_resumed_run_once(
    train: Train, tmp_path: Path, stopped_at: Callable[[int], None]
):
    run = tmp_path / "run"
    pytest.importorskip("tensorboard")
    stopped_at(7)
    with pytest.raises(Killed):
        train(run, loggers="tensorboard")
    assert [event.step for event in events(run).Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert train(run, loggers="tensorboard") == 0
    check_scalars(run)


def test_rows_that_are_not_hidden_are_noticed(
    train: Train,
    tmp_path: Path,
    stopped_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
):
    writer = pytest.importorskip("torch.utils.tensorboard")
    original = writer.SummaryWriter
    monkeypatch.setattr(writer, "SummaryWriter", lambda path, purge_step: original(path))
    stopped_at(7)
    with pytest.raises(Killed):
        train(tmp_path / "run", loggers="tensorboard")
    assert train(tmp_path / "run", loggers="tensorboard") == 0
    with pytest.raises(AssertionError):
        check_scalars(tmp_path / "run")


class FakeRun:
    """What of a wandb run we use: rows under their step, which only goes up."""

    def __init__(self, step: int):
        self.step, self.offline, self.url = step, False, "https://logger.example/run"
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        assert step >= self.step, "the library drops it with a warning"
        self.logged.append((step, values))

    def finish(self) -> None:
        self.step = -1


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(asked=[], run=FakeRun(0))

    def init(**how: Any) -> FakeRun:
        made.asked.append(how)
        return made.run

    made.init, made.Settings = init, dict
    made.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", made)  # type: ignore[arg-type]
    return made


def test_wandb_continues_the_same_run(tmp_path: Path, fake_wandb: SimpleNamespace):
    said: list[str] = []
    first = WeightsAndBiases(settings(tmp_path), 0, said.append)
    first.write({"step": 1, "loss": 2.0, "mfu": None})
    samples = [{"prompt": "p", "text": "t"}]
    first.write({"step": 1, "samples": samples})
    fake_wandb.run = FakeRun(step=3)
    second = WeightsAndBiases(settings(tmp_path), 1, said.append)
    for step in (2, 3, 4):
        second.write({"step": step, "loss": 1 / step})
    one, two = fake_wandb.asked
    assert one["id"] == two["id"] == (tmp_path / "wandb/run-id").read_text().strip()
    assert {one["resume"], two["resume"]} == {"allow"}
    assert one["config"]["model"] == "tiny"
    assert [step for step, _ in fake_wandb.run.logged] == [3, 4]
    assert said == ["wandb: https://logger.example/run"] * 2


def test_a_row_without_numbers_that_json_lacks(tmp_path: Path, fake_wandb: SimpleNamespace):
    logger = WeightsAndBiases(settings(tmp_path), 0, lambda line: None)
    logger.write({"step": 1, "loss": None, "skipped": "loss not finite", "grad_norm": math.pi})
    table = [{"prompt": "p", "text": "t"}, {"prompt": "q", "text": "u"}]
    logger.write({"step": 1, "samples": table})
    assert fake_wandb.run.logged == [
        (1, {"step": 1, "skipped": "loss not finite", "grad_norm": math.pi}),
        (1, {"step": 1, "samples": (["prompt", "text"], [["p", "t"], ["q", "u"]])}),
    ]


def test_a_run_that_is_stopped_closes_its_logger(
    train: Train, tmp_path: Path, recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch
):
    original = Trainer.forward_backward

    def patched(self: Trainer, batches: Any) -> Any:
        if self.step == 2 and self.steps < 10**6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "forward_backward", patched)
    with pytest.raises(SystemExit):
        train(tmp_path / "run", loggers="wandb")
    assert recorded.made.closed
    assert [row["step"] for row in recorded.made.rows] == [1, 2, 3]


def test_without_loggers_nothing_is_opened(tmp_path: Path):
    none = Loggers(settings(tmp_path), 0, pytest.fail)
    none.write({"step": 1})
    none.close()
    assert list(tmp_path.iterdir()) == []
