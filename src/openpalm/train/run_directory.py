"""Locks a run directory and checks that it belongs to these settings."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpalm.base.files import lock, write_atomically
from openpalm.base.settings import build, plain, spell
from openpalm.base.yaml_file import read_yaml, to_yaml
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.errors import CheckpointError, SettingsError, count_of
from openpalm.train.config import Chosen, PretrainSettings, ProfileSettings, Ramp, TrainSettings
from openpalm.train.optimization.parameter_groups import learning_rate_factor

REWARD_FAILED = "reward_failed"
"""Written when a reward failed; holds the corrected one's fingerprint once the run continues."""
SETTINGS_FILE = "config.yaml"

MAY_CHANGE = (
    *("out", "data", "init", "chosen"),  # data and parent are compared by their hashes
    *("loggers", "profile", "memory", "compile", "device"),
    *("save_every", "eval_every", "keep_checkpoints", "max_skipped_steps", "force"),
)
"""Settings that cannot change what a run computes, so that it may continue with others."""

CutChanges = Callable[[TrainSettings], str | None]
"""Why microbatches of another size than these settings' change the result, or None."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second process out of the directory; leaves no file behind."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SettingsError(f"--out {out}: is, or is under, a file; choose a directory") from None
    except PermissionError:
        raise SettingsError(f"--out {out}: may not be written; choose another place") from None
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if not lock(descriptor):
            raise SettingsError(f"--out {out}: another process is training in it")
        yield
    finally:
        os.close(descriptor)


def recall(
    asked: TrainSettings,
    given: Chosen,
    *,
    parent_fixed: bool = False,
    cut_changes: CutChanges = lambda stored: None,
) -> TrainSettings | None:
    """`asked` with what the run in `asked.out` chose before; None if no run is there.

    `given` says what data and parent are there now; the parent may have gone on since the run
    began, unless `parent_fixed`. Raises SettingsError where the run was made with other settings
    that change its result, or what it chose was edited.
    """
    file = asked.out / SETTINGS_FILE
    if not file.exists():
        return None
    try:
        stored = _recall(file, type(asked))
        _refuse_edited(file, stored)
        _refuse_differences(stored, asked, given, parent_fixed, cut_changes)
    except SettingsError:
        refuse_other_version(asked.out)  # its settings may differ for that reason
        raise
    steps = asked.steps or stored.chosen.steps
    return replace(asked, chosen=replace(stored.chosen, steps=steps))


def refuse_other_version(out: Path) -> None:
    """Raises SettingsError where another version made the run and this one cannot continue it."""
    for directory in reversed(checkpoint.steps(out)):
        try:
            checkpoint.refuse_other_version(directory)
        except CheckpointError:
            continue  # damaged: it does not say who wrote it


def check_new(settings: TrainSettings, given: Chosen) -> None:
    """Raises SettingsError where no run can begin in `settings.out` with what was chosen before."""
    for name, what in (("data", "--data"), ("parent", "--init"), ("reward", "--reward")):
        known = getattr(settings.chosen, name)
        if known not in (None, getattr(given, name)):
            raise SettingsError(
                f"{what}: not what --config's run used (chosen.{name} differs); "
                "remove `chosen` from the file to use this one"
            )
    _refuse_strangers(settings.out)


def write_settings(settings: TrainSettings) -> None:
    """Makes the directory this run's; a repeated run is not profiled again."""
    text = to_yaml(replace(settings, profile=ProfileSettings()))
    file = settings.out / SETTINGS_FILE
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        write_atomically(file, text)


def _recall(file: Path, kind: type[TrainSettings]) -> TrainSettings:
    """The settings a run was made with; whatever is wrong with them is about that file."""
    values = read_yaml(file)
    try:
        return build(kind, values)
    except SettingsError as error:
        raise SettingsError(
            f"{file}: is not the settings of a run of this version ({error}); set it back, "
            "continue the run with the version that made it, or choose another --out"
        ) from None


def _refuse_edited(file: Path, stored: TrainSettings) -> None:
    """Raises SettingsError where `chosen` is not what the run wrote there.

    The newest checkpoint keeps a copy; where settings beside it say the same, they must agree.
    """
    beside = {"dtype": stored.dtype, "steps": stored.steps, "minutes": stored.minutes}
    recorded = _chosen_at_checkpoint(file.parent)
    known = recorded | {name: v for name, v in beside.items() if v not in (None, "auto")}
    now = plain(stored.chosen)
    for name in dict.fromkeys(("dtype", "steps", *known, *(now if recorded else ()))):
        was, is_now = known.get(name, "not set"), now.get(name, "not set")
        if name not in now or (was != is_now and (recorded or name in known)):
            raise SettingsError(
                f"{file}: chosen.{name} is {is_now}, the run's own was {was}; set it back "
                "(the run itself writes `chosen`), or choose another --out"
            )


def _chosen_at_checkpoint(out: Path) -> dict[str, Any]:
    for newest in reversed(checkpoint.steps(out)):
        try:
            lineage = read_manifest(newest).get("lineage") or {}
            return dict(lineage["settings"]["chosen"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue  # damaged, or written by something else: what it holds is checked elsewhere
    return {}


def _refuse_another_length(stored: TrainSettings, asked: TrainSettings) -> None:
    """Raises SettingsError unless the steps taken so far are the longer run's own too.

    They are where the learning rate and the batch are at their full size in both schedules: a
    schedule's shape follows from the number of steps.
    """
    was, now = stored.steps, asked.steps
    assert was is not None
    assert now is not None
    taken = max(
        (int(path.name.removeprefix("step-")) for path in checkpoint.steps(asked.out)), default=0
    )
    ramp = Ramp.parse(asked.batch_ramp)

    def full(step: int, steps: int) -> bool:
        rate = learning_rate_factor(step, steps, asked.optim)
        return math.isclose(rate, 1) and ramp.share(step, steps) == 1

    if not taken or (now > was and full(taken, was) and full(taken, now) and full(taken + 1, now)):
        return
    reason = (
        f"its {asked.optim.schedule} schedule is not constant after step {taken}"
        if now > was
        else "a shorter run would have had another schedule"
    )
    raise SettingsError(
        f"--steps {now}: --out {asked.out} is a run of {count_of(was, 'step')}, and {reason}; "
        f"train on from it with --init {asked.out} and another --out, or give --steps {was}"
    )


def reward_failed(out: Path) -> None:
    """Notes that the run ended because its reward failed, so that it may be corrected."""
    (out / REWARD_FAILED).write_text("", encoding="utf-8")


def _refuse_another_reward(stored: TrainSettings, asked: TrainSettings, given: Chosen) -> None:
    """Another reward would give another run; one that failed may be corrected, once a failure."""
    if stored.chosen.reward in (None, given.reward):  # None in runs of older versions
        return
    failed = asked.out / REWARD_FAILED
    corrected = failed.read_text(encoding="utf-8") if failed.exists() else None
    if corrected == "":
        failed.write_text(given.reward or "", encoding="utf-8")
        print("the reward has changed since it failed; the run continues with it", file=sys.stderr)
    elif corrected is None or corrected != given.reward:
        raise SettingsError(
            f"--out {asked.out}: what --reward or --gold names has changed since that run began "
            f"({stored.chosen.reward}, now {given.reward}); restore it, or choose another --out"
        )


def _refuse_differences(
    stored: TrainSettings,
    asked: TrainSettings,
    given: Chosen,
    parent_fixed: bool,
    cut_changes: CutChanges,
) -> None:
    """The same --out with settings that change the result is a mistake, not a wish."""
    _refuse_another_reward(stored, asked, given)
    old, new = plain(stored), plain(asked)
    for side in (old, new):
        for name in MAY_CHANGE:
            side.pop(name, None)
        if isinstance(asked, PretrainSettings):
            side.pop("sample_prompts", None)  # of the samples; elsewhere a number that matters
    old |= {"data": stored.chosen.data, "init": stored.chosen.parent}
    new |= {"data": given.data, "init": given.parent}
    same_name = stored.init == asked.init and not parent_fixed
    if same_name and checkpoint.steps(asked.out):
        new["init"] = old["init"]  # the parent run may have gone on; this one has begun
    if stored.microbatch_tokens != asked.microbatch_tokens:
        reason = cut_changes(stored)
        if reason is not None:
            raise SettingsError(
                f"--out {asked.out}: that run was made with another --microbatch-tokens "
                f"({stored.microbatch_tokens}, now {asked.microbatch_tokens}), and {reason}; "
                "give that again or choose another --out"
            )
        del old["microbatch_tokens"], new["microbatch_tokens"]
    if stored.steps and asked.steps and stored.steps != asked.steps:
        del old["steps"], new["steps"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = _first_difference(old.get(name), new.get(name))
            longer = name in ("steps", "minutes", "epochs")
            remedy = f", or train on from it with --init {asked.out}" if longer else ""
            raise SettingsError(
                f"--out {asked.out}: that run was made with another {spell(name)} "
                f"({was}, now {now}); choose another --out{remedy}"
            )
    if stored.steps and asked.steps and stored.steps != asked.steps:
        _refuse_another_length(stored, asked)


def _first_difference(old: Any, new: Any) -> tuple[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
        return f"{key} {old.get(key, 'not set')}", str(new.get(key, "not set"))
    was, now = ("not set" if value is None else str(value) for value in (old, new))
    return was, now


def _refuse_strangers(out: Path) -> None:
    strangers = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if strangers:
        raise SettingsError(f"--out {out}: holds {strangers[0]} but no run; choose a new directory")
