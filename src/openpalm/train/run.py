"""Runs a training: starts it, resumes it after an interruption, finishes it once.

    RUN/config.yaml        the settings, as they were given
    RUN/run.json           what the run measured and chose before step 1, and hashes of its data
    RUN/metrics.jsonl      a row per step, and rows of evaluations
    RUN/samples.jsonl      texts sampled during training
    RUN/profile/           with --profile.steps; tensorboard/ and wandb/ with --loggers
    RUN/skipped/           batches of steps that were skipped (skipped_batches.py)
    RUN/checkpoints/       step-NNNNNNNN directories

A step writes its row, then the rows of the probes, then the checkpoint: the rows up to a
checkpoint are always there.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openpalm.base.device import keep_freed_memory, pick_device
from openpalm.base.files import wait_until_seen
from openpalm.base.settings import plain
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.contents import TrainState, collect
from openpalm.checkpoint.saver import Saver
from openpalm.errors import OpenPalmError, StorageError, TrainingError, WorkError, count_of
from openpalm.parallel.agreement import check_directory, refuse_differences
from openpalm.parallel.lost import lost_processes_named
from openpalm.parallel.world import join
from openpalm.train import retention, run_directory
from openpalm.train.batch_shape import BatchShape
from openpalm.train.config import LEAST_STEPS_APART, PROBES_PER_RUN, ProfileSettings, TrainSettings
from openpalm.train.initial_weights import check_trained
from openpalm.train.logging.loggers import Loggers, check_installed
from openpalm.train.logging.metrics import RowFile, TrainingBar, read_rows
from openpalm.train.logging.profile import Profiler
from openpalm.train.microbatches import batch_shape
from openpalm.train.new_run import measured_info
from openpalm.train.optimization.inherited_optimizer import inherit_optimizer
from openpalm.train.probes import Probe
from openpalm.train.restore import restore
from openpalm.train.run_directory import RunInfo, step_of
from openpalm.train.signals import caught_signals, end_by
from openpalm.train.skipped_batches import keep_batches
from openpalm.train.spec import TrainSpec, make_trainer
from openpalm.train.trainer import StepReport, Trainer


@dataclass(frozen=True)
class Outcome:
    """Where a run ended."""

    checkpoint: Path
    step: int
    was_finished: bool
    """True if the run was finished before: nothing was done"""


def run_training(settings: TrainSettings, spec: TrainSpec) -> Outcome:
    """Starts the run in `settings.out`, or resumes it; returns its last checkpoint.

    Raises SettingsError if the directory belongs to other settings, another version or another
    process, TrainingError if the run diverges.
    """
    check_trained(settings, spec.config)
    check_installed(settings)
    spec.check(settings)
    device = pick_device(settings.device)
    here = join(settings.parallel, device)
    if settings.memory.keeps_freed:
        keep_freed_memory()
    length = settings.sequence_length or spec.config.context
    shape = spec.shape or batch_shape(settings, length, here.data_size)
    spec.check_shared(settings, shape)
    shape = replace(shape, rank=here.data_rank)
    with ExitStack() as stack:
        here.on_main(lambda: stack.enter_context(run_directory.locked(settings.out)))
        reached = stack.enter_context(lost_processes_named(here, settings.parallel.timeout_s))
        hashes = {f"hash of the {name}": found for name, found in spec.hashes.items()}
        refuse_differences(here, hashes | {"model": asdict(spec.config)})
        # First, because another version's settings cannot be compared with ours.
        other = here.on_main(lambda: run_directory.finished_by_other_version(settings.out))
        if other is not None:
            return Outcome(other, step_of(other), was_finished=True)
        # A measured choice (dtype, number of steps) is made once: a resumed run must repeat it.
        info = here.on_main(
            lambda: run_directory.recall(
                settings,
                spec.hashes,
                parent_fixed=spec.parent_fixed,
                cut_changes=partial(spec.cut_changes, shape=shape),
                processes=here.data_size,
                processes_change=partial(spec.processes_change, shape=shape),
            )
        )
        # Silent: if the run is not finished, the call below reports damaged checkpoints.
        newest = here.on_main(lambda: checkpoint.latest(settings.out, say=lambda line: None))
        if info is not None and newest is not None and step_of(newest) >= info.steps:
            return Outcome(newest, info.steps, was_finished=True)
        check_directory(here, settings.out)
        info = info or measured_info(settings, spec, shape, device)
        # Only now is the training state read and verified: a finished run may be without it.
        newest = here.on_main(lambda: checkpoint.newest_whole(settings.out, training=True))
        if newest is not None:
            wait_until_seen(newest / "manifest.json")  # another machine may just have renamed it
        dtype = getattr(torch, info.dtype)
        trainer = make_trainer(settings, spec, shape, device, steps=info.steps, dtype=dtype)
        reached.step = lambda: min(trainer.step + 1, trainer.steps)
        if newest is None and settings.keep_optimizer and spec.parent is not None:
            inherit_optimizer(trainer.optimizer, spec.parent, spec.label)
        # After everything that may refuse: config.yaml makes the directory a run.
        here.on_main(lambda: run_directory.write(settings, info))
        session = _Session(settings, spec, info, trainer, shape)
        if newest is not None:
            session.restore(newest)
        return session.run()


class _Session:
    """One process's part of a run: from its step to the last one, or to the next signal."""

    def __init__(
        self,
        settings: TrainSettings,
        spec: TrainSpec,
        info: RunInfo,
        trainer: Trainer,
        shape: BatchShape,
    ):
        self.settings = settings
        self.spec = spec
        self.info = info
        self.trainer = trainer
        self.world = trainer.world
        self.saver = Saver(trainer.world)
        self.left_out: set[str] = set()
        self.shape = shape
        self.rows = RowFile(settings.out / "metrics.jsonl")
        self.started = time.monotonic()
        tenth = max(LEAST_STEPS_APART, trainer.steps // PROBES_PER_RUN)
        self.eval_every = settings.eval_every or info.eval_every or tenth
        self.save_every = settings.save_every or tenth
        tracked = spec.best is not None and (settings.keep_best or spec.best.always)
        self.best_by = spec.best if tracked else None

    def restore(self, newest: Path) -> None:
        """Continues from a checkpoint. Raises CheckpointError if it holds no state of this run."""
        # Time counts over all processes of the run, so that curves over time have no jumps.
        self.started = time.monotonic() - restore(self.trainer, newest)

    def run(self) -> Outcome:
        """Trains to the last step; saves and ends the process after SIGINT or SIGTERM."""
        # Rows of steps after the checkpoint are computed again, to the same numbers.
        self.world.on_main(lambda: self._remove_later_than(self.trainer.step))
        self.world.on_main(self._link_best)
        with ExitStack() as stack:
            line = self._open(stack)
            grace_s = self.settings.parallel.grace_s
            signals = stack.enter_context(caught_signals(self.world, grace_s))
            stack.push(self._finish_saving)
            while self.trainer.step < self.trainer.steps:
                self._step()
                # A signal is looked at between steps only: a checkpoint is of a whole step.
                # The largest of all processes, because a signal may reach only one of them.
                own = [signals[0] if signals else 0, self.saver.failed]
                number, failed = map(int, self.world.maxima(own))
                if failed:
                    self.saver.wait()
                if number and self.trainer.step < self.trainer.steps:
                    self._save_unless_saved()
                    self.saver.wait()
                    more = "run the same command again to continue"
                    line.say(f"stopped after step {self.trainer.step}; {more}")
                    # By the signal itself, so that a shell sees why the process ended.
                    end_by(number)
            self.saver.wait()
        last = self.settings.out / "checkpoints" / checkpoint.step_name(self.trainer.step)
        return Outcome(last, self.trainer.step, was_finished=False)

    def _finish_saving(self, kind: object, error: object, trace: object) -> None:
        """Completes the checkpoint that is being written if the run ends with an error.

        Only one that all processes raise: a process that is lost cannot write its part.
        """
        if isinstance(error, OpenPalmError):
            with suppress(StorageError):  # the first error says why the run ended
                self.saver.wait()

    def _step(self) -> None:
        """Takes one step, then writes its row, evaluates and saves if it is time to."""
        self.profiler.before_step()
        began = time.monotonic()
        try:
            report = self.trainer.train_step()
        # Not saved: its message names the last checkpoint as the good one.
        except TrainingError as error:
            self.saver.wait()
            raise TrainingError(f"{error}{self._keep_skipped()}") from None
        except WorkError:  # the loader made no batch, because a reward failed
            self._save_unless_saved()
            self.saver.wait()
            raise
        self._after_step(report, time.monotonic() - began)

    def _keep_skipped(self) -> str:
        """Keeps the batches of a skipped step; returns what to add to the message about it."""
        trainer = self.trainer
        if not trainer.skipped_batches:
            return ""
        kept = keep_batches(
            self.settings.out, self.world, trainer.step, trainer.skipped_batches, trainer.own_loss
        )
        return f" ({kept})" if kept else ""

    def _open(self, stack: ExitStack) -> TrainingBar:
        """Opens the loggers, the profiler and the line in the terminal; `stack` closes them."""
        quiet = None if self.world.is_main else Console(quiet=True)
        self.line = line = TrainingBar(self.spec.label, self.trainer.steps, quiet)
        # Before the bar is drawn: a logger may ask for a password.
        asked = self.settings if self.world.is_main else replace(self.settings, loggers=None)
        loggers = Loggers(asked, self.trainer.step, line.say)
        self.loggers = stack.enter_context(closing(loggers))
        stack.enter_context(line)
        line.start_at(self.trainer.step)
        line.say(self._first_line())
        traced = self.settings if self.world.is_main else replace(asked, profile=ProfileSettings())
        profiler = Profiler(traced, self.trainer.device, line.say)
        self.profiler = stack.enter_context(closing(profiler))
        return line

    def _first_line(self) -> str:
        if self.trainer.step:
            return f"{self.spec.label}: resuming after step {self.trainer.step}{self._processes()}"
        tokens = self.shape.sequence_length * self.shape.global_sequences
        trained = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        part = "" if self.settings.trains_all else f" ({trained:,} of them trained)"
        return (
            f"{self.spec.label}: {self.spec.config.parameters:,} parameters{part}, "
            f"{count_of(self.trainer.steps, 'step')} "
            f"of {tokens:,} tokens, {self.info.dtype} on {self.trainer.device.type}, "
            f"{self.settings.optim.name} at lr {self.spec.peak_rate(self.settings):.3g}"
            f"{self._processes()}"
        )

    def _processes(self) -> str:
        size = self.world.size
        return "" if size == 1 else f", on {size} processes ({self.world.axes})"

    def _after_step(self, report: StepReport, seconds: float) -> None:
        """Writes the step's row; evaluates and saves if it is time to."""
        self.profiler.after_step()
        # The row comes before the checkpoint that counts it; after a kill the row is cut off again.
        row = self._append(self.rows, self._row(report, seconds))
        self.line.show(row)
        if report.skipped:
            kept = self._keep_skipped()
            self.line.say(f"step {report.step} skipped: {report.skipped}{kept}")
        last, alarm, better = report.step == self.trainer.steps, None, False
        due = [p for p in self.spec.probes if last or self._is_due(p, report.step)]
        if due:
            alarm = self._probe(report.step, due)
            better = self._improves(report.step)
        # An alarm saves too: the step that raised it can be examined.
        if last or alarm or better or self._saves_at(report.step):
            self._save()
        if alarm:
            self.saver.wait()
            raise TrainingError(f"step {report.step}: {alarm}; {self._best_checkpoint()}")

    def _append(self, file: RowFile, row: dict[str, Any]) -> dict[str, Any]:
        """Appends a row to a file of the run, on the main process, and gives it to the loggers."""
        if self.world.is_main:
            row = file.append(row)
            self.loggers.write(row)
        return row

    def _row(self, report: StepReport, seconds: float) -> dict[str, Any]:
        unit, rate = self.spec.unit, report.count / seconds
        row: dict[str, Any] = {
            "step": report.step,
            "loss": report.loss,
            unit: self.trainer.counted,
            "elapsed_s": round(self._elapsed_s(), 3),
            "lr": report.lr_factor * self.spec.peak_rate(self.settings),
            "grad_norm": report.grad_norm,
            f"{unit}_per_s": round(rate, 1),
            "mfu": self._mfu(report, rate),
        }
        if report.skipped:
            row["skipped"] = report.skipped
        return row | report.metrics

    def _mfu(self, report: StepReport, rate: float) -> float | None:
        """Model FLOPs utilisation: the share of the measured peak; None where it is not known."""
        ramped = self.shape.ramp.share(report.step, self.trainer.steps)
        sequences = ramped * self.shape.global_sequences
        # flops_per_token holds if every token has a loss and every weight a gradient.
        whole = report.count == self.shape.sequence_length * sequences
        if not (self.info.peak_flops and self.settings.trains_all and whole):
            return None
        flops = self.spec.config.flops_per_token(self.shape.sequence_length)
        share = rate * flops / (self.info.peak_flops * self.trainer.world.size)
        # Above 1 the peak was measured while the machine was busy, and means nothing.
        return round(share, 4) if share <= 1 else None

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def _is_due(self, probe: Probe, step: int) -> bool:
        return step % (probe.every or self.eval_every) == 0

    def _probe(self, step: int, probes: Sequence[Probe]) -> str | None:
        """Takes measurements; returns the reason why the run must stop, or None."""
        for probe in probes:
            values = probe.taken(self.trainer)
            if values is None:
                self._say_too_large(probe)
                continue
            # Written probe by probe, so that a kill during a slow one keeps the others' rows.
            self._append(RowFile(self.settings.out / probe.file), {"step": step} | values)
            if probe.describe:
                self.line.say(f"{self.spec.label} step {step}: {probe.describe(values)}")
        # From the file: an alarm also looks at rows from before this process resumed.
        return self.world.on_main(lambda: self._alarm(read_rows(self.rows.path)))

    def _say_too_large(self, probe: Probe) -> None:
        """Says, once, that no process can hold the whole model to generate."""
        if probe.file not in self.left_out:
            self.left_out.add(probe.file)
            self.line.say(
                f"{self.spec.label}: {probe.file}: nothing is generated, because the model of "
                f"{self.spec.config.parameters:,} parameters does not fit one process"
            )

    def _alarm(self, rows: list[dict[str, Any]]) -> str | None:
        """The reason why a run with these rows must stop, or None."""
        alarms = (probe.alarm(rows) for probe in self.spec.probes if probe.alarm)
        return next((alarm for alarm in alarms if alarm), None)

    def _best(self, unsaved: int | None = None) -> int | None:
        """The step of the best checkpoint without an alarm; None if none is known.

        `unsaved` is a step that counts as saved.
        """
        if self.best_by is None:
            return None
        steps = retention.saved_steps(self.settings.out)
        if unsaved is not None:
            steps.add(unsaved)
        if not steps:  # a run without checkpoints may be without rows, too
            return None
        return self.best_by.step(read_rows(self.rows.path), steps, self._alarm)

    def _improves(self, step: int) -> bool:
        """Whether --keep-best saves this step, which was just evaluated."""
        if not self.settings.keep_best:
            return False
        return self.world.on_main(lambda: self._best(unsaved=step) == step)

    def _best_checkpoint(self) -> str:
        best = self.world.on_main(self._best)
        if best is None:
            return "no checkpoint before it was evaluated; set --eval-every lower"
        path = self.settings.out / "checkpoints" / checkpoint.step_name(best)
        return f"the best checkpoint is {path}"

    def _saves_at(self, step: int) -> bool:
        """Whether the step is saved, however good it is."""
        return any(step % n == 0 for n in (self.save_every, self.settings.keep_every) if n)

    def _save_unless_saved(self) -> None:
        """Saves before the process ends, unless this step has just been saved."""
        if not self._saves_at(self.trainer.step):
            self._save()

    def _save(self) -> None:
        if self.world.is_main:
            self.rows.sync()  # rows reach the disk before the checkpoint that implies them
        step = self.trainer.step
        tensors, values = self.trainer.state()
        lineage = self._lineage(step)
        contents = collect(
            self.trainer.model,
            tokenizer_json=self.spec.tokenizer_json,
            train=TrainState(tensors, values | {"elapsed_s": self._elapsed_s()}),
            with_fingerprint=step == self.trainer.steps,
            parent=lineage["parent"],
        )
        path = self.settings.out / "checkpoints" / checkpoint.step_name(step)
        self.saver.save(path, contents, lineage, self._prune)

    def _prune(self) -> None:
        """Removes old checkpoints: the new one is complete, so one to resume from remains."""
        retention.prune(self.settings, self._link_best())

    def _link_best(self) -> int | None:
        """Updates the link to the best checkpoint; returns its step."""
        best = self._best()
        retention.link_best(self.settings.out, best if self.settings.keep_best else None)
        return best

    def _lineage(self, step: int) -> dict[str, Any]:
        settings = plain(self.settings)
        # A published model must not reveal the paths and loggers of the machine that made it.
        for name in ("data", "out", "init", "loggers", "profile"):
            settings.pop(name, None)
        lineage = {"step": step, "data": self.info.data, "parent": self.info.parent}
        return lineage | {"settings": settings, "run": plain(self.info)}

    def _remove_later_than(self, step: int) -> None:
        """Removes the rows and checkpoints after `step`, which an interrupted process left."""
        checkpoint.remove_partial(self.settings.out)
        for name in {"metrics.jsonl", *(probe.file for probe in self.spec.probes)}:
            RowFile(self.settings.out / name).cut_after(step)
        for newer in checkpoint.steps(self.settings.out):
            if step_of(newer) > step:  # damaged, or it would have been resumed from
                # Renamed, not deleted: the resumed run will save under its name.
                aside = newer.with_name(f"damaged-{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
