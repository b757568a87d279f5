"""Which checkpoints of a run are kept, and the link to the best one.

    RUN/checkpoints/best -> step-NNNNNNNN

The link is changed after a checkpoint is saved and before older ones are removed, so a process
that is killed in between leaves it on a complete checkpoint.
"""

import shutil
from pathlib import Path

from openpalm.base.files import link_atomically
from openpalm.checkpoint import directory as checkpoint
from openpalm.errors import StorageError
from openpalm.train.config import TrainSettings
from openpalm.train.run_directory import step_of


def saved_steps(run: Path) -> set[int]:
    """The steps of the run's checkpoints."""
    return {step_of(path) for path in checkpoint.steps(run)}


def link_best(run: Path, step: int | None) -> None:
    """Points checkpoints/best to the checkpoint of that step; None removes the link."""
    link = run / "checkpoints" / checkpoint.BEST
    if step is None:
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or link.readlink().name != checkpoint.step_name(step):
        try:
            link_atomically(link, checkpoint.step_name(step))
        except OSError as error:
            raise StorageError(
                f"{link}: cannot be made a link ({error.strerror or error}); choose --out on "
                "another file system, or leave --keep-best out"
            ) from error


def prune(settings: TrainSettings, best: int | None) -> None:
    """Removes all but the newest checkpoints, the best one, and the multiples of --keep-every."""
    if not settings.keep_checkpoints:
        return
    for old in checkpoint.steps(settings.out)[: -settings.keep_checkpoints]:
        step = step_of(old)
        forever = settings.keep_every is not None and step % settings.keep_every == 0
        if step != best and not forever:
            shutil.rmtree(old)
