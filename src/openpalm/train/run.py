"""A run's directory: begun, gone on with after any kill, finished once.

    RUN/config.yaml        the settings, with what was chosen by measuring
    RUN/metrics.jsonl      a row a step, and rows of evaluations
    RUN/samples.jsonl      what the model wrote on the way
    RUN/profile/           with --profile.steps; tensorboard/ and wandb/ with --loggers
    RUN/checkpoints/       step-NNNNNNNN directories

At a step the rows are written first, then the probes', then the checkpoint: whatever a checkpoint
restores, its rows are there.
"""

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openpalm.base.device import keep_freed_memory, pick_device
from openpalm.base.settings import plain, spell
from openpalm.checkpoint import directory as checkpoint
from openpalm.errors import CheckpointError, SettingsError, TrainingError, WorkError, count_of
from openpalm.model.transformer import initialise
from openpalm.parallel.world import world
from openpalm.train import run_directory
from openpalm.train.config import (
    LEAST_STEPS_APART,
    PROBES_A_RUN,
    BatchShape,
    Ramp,
    TrainSettings,
    batch_shape,
)
from openpalm.train.initial_weights import check_trained
from openpalm.train.loggers import Loggers, check_installed
from openpalm.train.metrics import LiveLine, RowFile, read_rows
from openpalm.train.profile import Profiler
from openpalm.train.sizing.measure import choose
from openpalm.train.spec import TrainSpec, make_trainer
from openpalm.train.trainer import StepReport, Trainer

_NOT_ITS_STATE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What restoring raises where a field or tensor is missing, or of another type or shape."""


@dataclass(frozen=True)
class Outcome:
    """Where a run ended."""

    checkpoint: Path
    step: int
    was_finished: bool
    """True where there was nothing left to do"""


def run_training(settings: TrainSettings, spec: TrainSpec) -> Outcome:
    """Begins the run in `settings.out`, or goes on with it; returns its last checkpoint.

    Raises SettingsError where the directory belongs to other settings or another process,
    TrainingError where the run diverges.
    """
    check_trained(settings, spec.config)
    check_installed(settings)
    out = settings.out
    device = pick_device(settings.device)
    length = settings.sequence_length or spec.config.context
    if settings.memory.keeps_freed:
        keep_freed_memory()
    if spec.shape is not None and settings.batch_ramp is not None:
        raise SettingsError("--batch-ramp: a step on rollouts has one size; leave it out")
    if spec.objective is not None:
        _refuse_next_tokens_own(settings)
    shape = spec.shape or batch_shape(settings, length, world().size)
    with ExitStack() as stack:
        stack.enter_context(run_directory.locked(out))
        settings = _settled(settings, spec, shape, device)
        chosen = settings.chosen
        assert chosen.steps is not None
        newest = checkpoint.latest(out, say=lambda line: None)
        if newest is not None and _step_of(newest) >= chosen.steps:
            return Outcome(newest, chosen.steps, was_finished=True)
        run_directory.refuse_other_version(out)
        newest = checkpoint.latest(out, training=True)
        run_directory.write_settings(settings)
        torch.manual_seed(settings.seed)
        trainer = make_trainer(settings, spec, shape, device, spec.fill)
        session = _Session(settings, spec, trainer, shape)
        if newest is not None:
            session.restore(newest)
        return session.run()


def _refuse_next_tokens_own(settings: TrainSettings) -> None:
    for name, value in (
        ("z_loss", settings.z_loss or None),
        ("memory.loss_chunk", settings.memory.loss_chunk),
    ):
        if value is not None:
            raise SettingsError(f"{spell(name)} {value}: is of `train` and `sft`; leave it out")


class _Session:
    """One process's part of a run: from where it stands to the end, or to the next signal."""

    def __init__(
        self, settings: TrainSettings, spec: TrainSpec, trainer: Trainer, shape: BatchShape
    ):
        self.settings = settings
        self.spec = spec
        self.trainer = trainer
        self.shape = shape
        self.rows = RowFile(settings.out / "metrics.jsonl")
        self.started = time.monotonic()
        tenth = max(LEAST_STEPS_APART, trainer.steps // PROBES_A_RUN)
        self.eval_every = settings.eval_every or settings.chosen.eval_every or tenth
        self.save_every = settings.save_every or tenth

    def restore(self, newest: Path) -> None:
        """Raises CheckpointError where the state in train/ is not one that `_save` wrote."""
        checkpoint.load_weights(self.trainer.model, newest)
        state = checkpoint.load_train_state(newest)
        try:
            self.trainer.restore(state.tensors, state.values)
            elapsed_s = float(state.values["elapsed_s"])
            if not 0 <= elapsed_s < math.inf or self.trainer.step != _step_of(newest):
                raise ValueError(f"step {self.trainer.step} after {elapsed_s} s")
        except torch.OutOfMemoryError:
            raise
        except _NOT_ITS_STATE as error:
            raise CheckpointError(
                f"{newest / 'train'}: its state is not one that this run saves "
                f"({_wrong_in_state(error)}); remove this checkpoint to continue from an older one"
            ) from error
        self.started = time.monotonic() - elapsed_s

    def run(self) -> Outcome:
        self._clear_later_than(self.trainer.step)
        with ExitStack() as stack:
            line = LiveLine(self.spec.label, self.trainer.steps)
            loggers = Loggers(self.settings, self.trainer.step, line.say)  # may ask for a password
            self.loggers = stack.enter_context(closing(loggers))
            stop = stack.enter_context(_signals())
            stack.enter_context(line)
            line.start_at(self.trainer.step)
            line.say(self._opening())
            profiler = Profiler(self.settings, self.trainer.device, line.say)
            self.profiler = stack.enter_context(closing(profiler))
            while self.trainer.step < self.trainer.steps:
                self._step(line)
                if stop and self.trainer.step < self.trainer.steps:
                    self._save_what_is_not()
                    more = "run the same command again to continue"
                    line.say(f"stopped after step {self.trainer.step}; {more}")
                    _die_of(stop[0])
        last = self.settings.out / "checkpoints" / checkpoint.step_name(self.trainer.step)
        return Outcome(last, self.trainer.step, was_finished=False)

    def _opening(self) -> str:
        if self.trainer.step:
            return f"{self.spec.label}: going on after step {self.trainer.step}"
        chosen, tokens = self.settings.chosen, self.shape.sequence_length * self.shape.sequences
        trained = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        part = "" if self.settings.trains_all else f" ({trained:,} of them learn)"
        return (
            f"{self.spec.label}: {self.spec.config.parameters:,} parameters{part}, "
            f"{count_of(self.trainer.steps, 'step')} "
            f"of {tokens:,} tokens, {chosen.dtype} on {self.trainer.device.type}, "
            f"{self.settings.optim.name} at lr {self.spec.peak_rate(self.settings):.3g}"
        )

    def _step(self, line: LiveLine) -> None:
        self.profiler.before_step()
        before = time.monotonic()
        try:
            report = self.trainer.train_step()
        except TrainingError:
            raise
        except WorkError:  # no batch could be made: a reward failed
            self._save_what_is_not()
            raise
        row = self._row(report, time.monotonic() - before)
        self.profiler.after_step()
        self.loggers.write(self.rows.append(row))
        line.show(row)
        if report.skipped:
            line.say(f"step {report.step} skipped: {report.skipped}")
        last, alarm = report.step == self.trainer.steps, None
        if last or report.step % self.eval_every == 0:
            alarm = self._probe(report.step, line)
        if last or alarm or report.step % self.save_every == 0:
            self._save()
        if alarm:
            raise TrainingError(f"step {report.step}: {alarm}; {self._best_told()}")

    def _row(self, report: StepReport, seconds: float) -> dict[str, Any]:
        rate = report.count / seconds
        chosen, share = self.settings.chosen, None
        ramped = self.shape.ramp.share(report.step, self.trainer.steps)
        sequences = ramped * self.shape.sequences * self.trainer.world.size
        step_tokens = self.shape.sequence_length * sequences
        whole = self.settings.trains_all and report.count == step_tokens
        if chosen.peak_flops and whole:  # masked tokens and frozen weights cost other FLOPs
            flops = self.spec.config.flops_per_token(self.shape.sequence_length)
            reached = rate * flops / chosen.peak_flops
            # Above 1 the peak was measured while the machine was busy: then it is none.
            share = round(reached, 4) if reached <= 1 else None
        row: dict[str, Any] = {
            "step": report.step,
            "loss": report.loss,
            self.spec.unit: self.trainer.counted,
            "elapsed_s": round(self._elapsed_s(), 3),
            "lr": report.lr_factor * self.spec.peak_rate(self.settings),
            "grad_norm": report.grad_norm,
            f"{self.spec.unit}_per_s": round(rate, 1),
            "mfu": share,
        }
        if report.skipped:
            row["skipped"] = report.skipped
        return row | report.metrics

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _probe(self, step: int, line: LiveLine) -> str | None:
        """Looks at the model; returns why the run must stop, or None."""
        self.trainer.model.eval()
        for probe in self.spec.probes:
            seen = probe.measure(self.trainer.model, self.trainer.dtype)
            row = RowFile(self.settings.out / probe.file).append({"step": step} | seen)
            self.loggers.write(row)
            if probe.describe:
                line.say(f"{self.spec.label} step {step}: {probe.describe(seen)}")
        return self._alarm(read_rows(self.rows.path))

    def _alarm(self, rows: list[dict[str, Any]]) -> str | None:
        """Why a run of these rows must stop, or None."""
        said = (probe.alarm(rows) for probe in self.spec.probes if probe.alarm)
        return next((alarm for alarm in said if alarm), None)

    def _best(self) -> int | None:
        """The step of the best saved checkpoint without alarm, where the spec says what is best."""
        column = self.spec.best
        if column is None:
            return None
        saved = {_step_of(path) for path in checkpoint.steps(self.settings.out)}
        rows = [row for row in read_rows(self.rows.path) if row.get(column) is not None]
        known = [
            row
            for n, row in enumerate(rows, 1)
            if row["step"] in saved and not self._alarm(rows[:n])
        ]
        return max(known, key=lambda row: row[column])["step"] if known else None

    def _best_told(self) -> str:
        best = self._best()
        if best is None:
            return "no checkpoint before it was looked at; set --eval-every lower"
        path = self.settings.out / "checkpoints" / checkpoint.step_name(best)
        return f"the best checkpoint is {path}"

    def _save_what_is_not(self) -> None:
        """Saves before the process ends, unless the last step has just been saved."""
        if self.trainer.step % self.save_every:
            self._save()

    def _save(self) -> None:
        self.rows.sync()
        step = self.trainer.step
        tensors, values = self.trainer.state()
        checkpoint.save(
            self.settings.out / "checkpoints" / checkpoint.step_name(step),
            self.trainer.model,
            tokenizer_json=self.spec.tokenizer_json,
            train=checkpoint.TrainState(tensors, values | {"elapsed_s": self._elapsed_s()}),
            lineage=self._lineage(step),
            fingerprint=step == self.trainer.steps,
        )
        if self.settings.keep_checkpoints:
            best = self._best()
            for old in checkpoint.steps(self.settings.out)[: -self.settings.keep_checkpoints]:
                if _step_of(old) != best:
                    shutil.rmtree(old)

    def _lineage(self, step: int) -> dict[str, Any]:
        settings = plain(self.settings)
        # A published model does not tell where it was made, nor how that was watched.
        for name in ("data", "out", "init", "loggers", "profile"):
            settings.pop(name, None)
        chosen = self.settings.chosen
        return {"step": step, "data": chosen.data, "parent": chosen.parent, "settings": settings}

    def _clear_later_than(self, step: int) -> None:
        checkpoint.remove_partial(self.settings.out)
        for name in {"metrics.jsonl", *(probe.file for probe in self.spec.probes)}:
            RowFile(self.settings.out / name).cut_after(step)
        for newer in checkpoint.steps(self.settings.out):
            if _step_of(newer) > step:  # damaged: latest() passed over it
                _set_aside(newer)


def _settled(
    settings: TrainSettings, spec: TrainSpec, shape: BatchShape, device: torch.device
) -> TrainSettings:
    """The run's full settings: recalled where it exists, else measured and written."""
    given = replace(
        settings.chosen, data=spec.data_hash, parent=spec.parent_hash, reward=spec.reward_hash
    )
    known = run_directory.recall(
        settings,
        given,
        parent_fixed=spec.parent_fixed,
        cut_changes=lambda stored: _cut_changes(stored, shape, spec),
    )
    if known:
        return known
    run_directory.check_new(settings, given)
    if settings.minutes != given.minutes:
        given = replace(given, steps=None, eval_every=None)
    steps = settings.steps or given.steps
    if settings.epochs:
        a_step = shape.sequences * shape.ramp.mean
        steps = max(1, round(settings.epochs * spec.sequences_per_epoch / a_step))
    settings = replace(settings, chosen=replace(given, steps=steps, minutes=settings.minutes))

    whole = replace(shape, ramp=Ramp())

    def timed(dtype: torch.dtype) -> Trainer:
        return make_trainer(settings, spec, whole, device, lambda m: initialise(m, seed=0), dtype)

    with Console(stderr=True).status("timing a few steps") as status:
        chosen = choose(
            settings,
            timed,
            spec.probes,
            device,
            step_tokens=shape.sequences * shape.sequence_length,
            say=status.update,
        )
    settings = replace(settings, chosen=chosen)
    run_directory.write_settings(settings)
    return settings


def _wrong_in_state(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, (RuntimeError, ValueError)):
        return str(error).partition("\n")[0][:200]
    return "a value has another type"


def _cut_changes(stored: TrainSettings, shape: BatchShape, spec: TrainSpec) -> str | None:
    """Why this run's microbatches give another result than the stored settings', or None.

    Losses are summed and divided by one count, so that k microbatches are one batch; but not where
    random numbers are drawn, or something is estimated, for each.
    """
    if spec.config.dropout:
        return "dropout draws other random numbers then"
    if spec.items_per_step is None or spec.shape is not None:
        return "its loss is estimated for each microbatch"
    before = batch_shape(stored, shape.sequence_length, world().size)
    if spec.items_per_step(before) != spec.items_per_step(shape):
        return "its steps would have another number of pairs"
    return None


def _set_aside(damaged: Path) -> None:
    """Renames a damaged checkpoint out of the way of the one that will take its name."""
    aside = damaged.with_name(f"damaged-{damaged.name}")
    shutil.rmtree(aside, ignore_errors=True)
    damaged.rename(aside)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a run saves before it dies of them."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught:  # asked twice: at once
            _die_of(number)
        caught.append(number)

    old = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _die_of(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
