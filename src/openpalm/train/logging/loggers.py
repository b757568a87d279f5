"""Loggers: TensorBoard and Weights & Biases receive the run's metrics and samples.

They get the rows of metrics.jsonl and samples.jsonl, under the same names. If a logger fails it is
reported once and dropped; the run continues.
"""

import os
import secrets
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from openpalm.base.settings import plain
from openpalm.base.yaml_file import to_yaml
from openpalm.errors import SettingsError, one_line
from openpalm.train.config import TrainSettings, logger_names

Say = Callable[[str], None]


class Logger(Protocol):
    """Receives rows."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_installed(settings: TrainSettings) -> None:
    """Raises SettingsError if --loggers names a package that is not installed."""
    for name in logger_names(settings.loggers):
        if find_spec(name) is None:
            raise SettingsError(
                f"--loggers {name}: is not installed; "
                "pip install 'openpalm[logging]', or leave it out"
            )


class Loggers:
    """The loggers of a run that continues after `step`."""

    def __init__(self, settings: TrainSettings, step: int, say: Say):
        self._say = say
        self._open: dict[str, Logger] = {}
        for name in logger_names(settings.loggers):
            self._try(name, lambda kind=_KINDS[name]: kind(settings, step, say))

    def write(self, row: dict[str, Any]) -> None:
        """Sends a row of the run's own files to every logger."""
        for name, logger in [*self._open.items()]:
            self._try(name, lambda logger=logger: logger.write(row))

    def close(self) -> None:
        for name, logger in [*self._open.items()]:
            self._try(name, logger.close)

    def _try(self, name: str, action: Callable[[], Logger | None]) -> None:
        try:
            made = action()
        except Exception as error:  # no failure of a logger may stop the training
            self._open.pop(name, None)
            reason = one_line(error) or type(error).__name__
            self._say(f"--loggers {name}: failed, the run continues without it ({reason[:300]})")
        else:
            if made is not None:
                self._open[name] = made


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, settings: TrainSettings, step: int, say: Say):
        from torch.utils.tensorboard import SummaryWriter

        # Hides what was written after the checkpoint, as it is cut from the run's own files.
        self._writer = SummaryWriter(
            str(settings.out / "tensorboard"), purge_step=step + 1 if step else None
        )
        if not step:
            self._writer.add_text("settings", _indented(to_yaml(settings)), 0)

    def write(self, row: dict[str, Any]) -> None:
        step = row["step"]
        for name, value in row.items():
            if name == "samples":
                self._writer.add_text(name, _indented(_samples(value)), step)
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)
            elif value is not None and name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One Weights & Biases run per run directory; its id is kept in RUN/wandb/run-id.

    Entity, mode and, without --wandb-project, the project are the library's own environment
    variables (WANDB_PROJECT, WANDB_MODE=offline). A resumed run does not send the steps that were
    sent before. Offline they are not known: there, the steps after the checkpoint are written
    twice.
    """

    def __init__(self, settings: TrainSettings, step: int, say: Say):
        wandb = import_module("wandb")
        folder = settings.out / "wandb"
        folder.mkdir(exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=settings.wandb_project or os.environ.get("WANDB_PROJECT", "openpalm"),
            name=settings.wandb_name or settings.out.resolve().name,
            id=_kept_id(folder / "run-id"),
            resume="allow",
            dir=str(settings.out),
            config=plain(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._first = self._run.step
        say(f"wandb: {folder if self._run.offline else self._run.url}")

    def write(self, row: dict[str, Any]) -> None:
        if row["step"] < self._first:
            return
        values = {name: value for name, value in row.items() if value is not None}
        if "samples" in values:
            pairs = [[sample["prompt"], sample["text"]] for sample in values["samples"]]
            values["samples"] = self._wandb.Table(columns=["prompt", "text"], data=pairs)
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[TrainSettings, int, Say], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def _kept_id(file: Path) -> str:
    """The id of the Weights & Biases run: made once, then read."""
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _samples(samples: list[dict[str, Any]]) -> str:
    return "\n\n".join(f"{sample['prompt']}|{sample['text']}" for sample in samples)


def _indented(text: str) -> str:
    """Text as a code block of Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())
