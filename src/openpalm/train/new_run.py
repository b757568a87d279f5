"""What a new run measures and chooses before its first step."""

from dataclasses import replace

import torch
from rich.console import Console

from openpalm import __version__
from openpalm.model.transformer import initialise
from openpalm.parallel.world import world
from openpalm.train import run_directory
from openpalm.train.batch_shape import BatchShape, Ramp
from openpalm.train.config import TrainSettings
from openpalm.train.optimization.inherited_optimizer import check_optimizer
from openpalm.train.run_directory import RunInfo
from openpalm.train.sizing.measure import measure
from openpalm.train.spec import TrainSpec, make_trainer
from openpalm.train.trainer import Trainer

_STEPS_WHILE_MEASURING = 10**6


def measured_info(
    settings: TrainSettings, spec: TrainSpec, shape: BatchShape, device: torch.device
) -> RunInfo:
    """The info of a new run. A run that is repeated with --config keeps its dtype and steps."""
    here = world()
    here.on_main(lambda: run_directory.check_new(settings.out))
    if settings.keep_optimizer and spec.parent is not None:
        check_optimizer(spec.parent, settings.optim)
    repeated = run_directory.repeated_run(settings, spec.hashes)
    steps, eval_every = settings.steps, None
    if settings.epochs:
        sequences = shape.global_sequences * shape.ramp.mean
        steps = max(1, round(settings.epochs * spec.sequences_per_epoch / sequences))
    if repeated is not None and settings.minutes and settings.minutes == repeated.minutes:
        steps, eval_every = repeated.steps, repeated.eval_every
    timed = settings
    if repeated is not None and settings.dtype == "auto":
        timed = replace(settings, dtype=repeated.dtype)
    # Without the ramp: its first steps are smaller and would measure too fast.
    whole = replace(shape, ramp=Ramp())

    def make_scratch_trainer(dtype: torch.dtype) -> Trainer:
        return make_trainer(
            settings,
            spec,
            whole,
            device,
            steps=_STEPS_WHILE_MEASURING,
            dtype=dtype,
            # Time does not depend on the values of weights, so no checkpoint is read for it.
            fill=lambda model: initialise(model, seed=0),
        )

    with Console(stderr=True, quiet=not here.is_main).status("timing a few steps") as status:
        measured = measure(
            timed,
            make_scratch_trainer,
            spec.probes,
            device,
            step_tokens=shape.global_sequences * shape.sequence_length,
            steps_known=steps is not None,
            say=status.update,
        )
    measured = here.broadcast(measured)
    steps = steps or measured.steps
    assert steps is not None
    return RunInfo(
        openpalm=__version__,
        steps=steps,
        dtype=measured.dtype,
        peak_flops=measured.peak_flops,
        minutes=settings.minutes,
        eval_every=eval_every or measured.eval_every,
        processes=shape.processes,
        **spec.hashes,
    )
