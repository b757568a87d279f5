"""The run directory: its lock, its settings (config.yaml) and its run info (run.json).

Decides whether a command may resume the run in the directory, and refuses it otherwise.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from openpalm import __version__
from openpalm.base.console import shown
from openpalm.base.files import lock, write_atomically
from openpalm.base.json_file import read_json
from openpalm.base.run_version import version_of_run
from openpalm.base.settings import build, plain, spell
from openpalm.base.yaml_file import read_yaml, to_yaml
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.errors import CheckpointError, SettingsError, count_of
from openpalm.train.batch_shape import Ramp
from openpalm.train.config import PretrainSettings, ProfileSettings, TrainSettings
from openpalm.train.optimization.schedule import learning_rate_factor

REWARD_FAILED = "reward_failed"
"""Written if a reward failed; holds the corrected reward's hash once the run continues."""
SETTINGS_FILE, INFO_FILE = "config.yaml", "run.json"
RESTORE = "restore it from a copy, or choose another --out"
HASHES = ("data", "parent", "reward")

MAY_CHANGE = (
    *("out", "data", "init"),  # data and parent are compared by their hashes
    *("loggers", "wandb_project", "wandb_name", "profile", "memory", "compile", "device"),
    "parallel",
    *("save_every", "eval_every", "max_skipped_steps", "force", "noise_scale"),
    *("keep_checkpoints", "keep_every", "keep_best"),
)
"""Settings that do not change what a run computes: a resumed run may have others."""

CutChanges = Callable[[TrainSettings, int], str | None]
"""The reason why a step is now cut to another result than with a run's settings and processes, or
None."""


def _same(stored: TrainSettings, processes: int) -> None:
    """The cut of a run that gives the same result for every cut."""


@dataclass(frozen=True)
class RunInfo:
    """What a run measured, chose and read before its first step: the content of run.json."""

    openpalm: str
    """version that began the run"""
    steps: int
    """optimizer steps of the whole run"""
    dtype: Literal["float32", "bfloat16", "float16"]
    """--dtype, or the faster one on this machine where that is auto"""
    peak_flops: float | None = None
    """measured rate of a matrix multiplication in FLOP/s, from which mfu is computed"""
    minutes: float | None = None
    """the --minutes that `steps` fit"""
    eval_every: int | None = None
    """steps between evaluations that take little of --minutes"""
    data: str | None = None
    """hash of the data"""
    parent: str | None = None
    """hash of the checkpoint that --init started from"""
    reward: str | None = None
    """hash of the files that --reward and --gold-reward name"""
    processes: int = 1
    """processes that read different rows when the run began; others change some results"""

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "minutes", "peak_flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f"{name} {value}: must be above 0 and finite")


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
    hashes: dict[str, str | None],
    *,
    parent_fixed: bool = False,
    cut_changes: CutChanges = _same,
    processes: int = 1,
    processes_change: CutChanges = _same,
) -> RunInfo | None:
    """The info of the run in `asked.out`, with `asked.steps`; None if there is no run.

    `hashes` are those of the data, parent and reward as they are now. The parent run may have
    trained further since this run began, unless `parent_fixed`. Raises SettingsError if the run
    was made with other settings that change its result, or if its files were edited.
    """
    if not (asked.out / SETTINGS_FILE).exists():
        return None
    stored, info = _read_settings(asked.out / SETTINGS_FILE, type(asked)), read_info(asked.out)
    _refuse_edited(asked.out / INFO_FILE, info, stored)
    _refuse_differences(stored, info, asked, hashes, parent_fixed, cut_changes)
    reason = processes_change(stored, info.processes) if info.processes != processes else None
    if reason is not None:
        raise SettingsError(
            f"--out {asked.out}: that run began with its data on {info.processes} processes, now "
            f"{processes}, and {reason}; start as many or choose another --out"
        )
    return replace(info, steps=asked.steps or info.steps)


def repeated_run(settings: TrainSettings, hashes: dict[str, str | None]) -> RunInfo | None:
    """The info of the run that --config RUN/config.yaml repeats; None if it repeats none.

    Warns if the data, the parent or the reward are not those of that run.
    """
    file = settings.config_file
    if file is None or file.name != SETTINGS_FILE or not (file.parent / INFO_FILE).exists():
        return None
    info = read_info(file.parent, "restore it from a copy, or move it away to measure again")
    for name, option in zip(HASHES, ("--data", "--init", "--reward"), strict=True):
        if getattr(info, name) != hashes[name]:
            print(f"warning: {option} is not what {file.parent} used", file=sys.stderr)
    return info


def check_new(out: Path) -> None:
    """Raises SettingsError if `out` holds anything: a new run needs a directory of its own.

    run.json alone is a run that was killed before its first step, so it may be overwritten.
    """
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    strangers = [name for name in names if name != INFO_FILE]
    if strangers:
        raise SettingsError(f"--out {out}: holds {strangers[0]} but no run; choose a new directory")


def write(settings: TrainSettings, info: RunInfo) -> None:
    """Writes run.json and config.yaml if they changed.

    config.yaml is last: once it exists, the directory holds a run. A repeated run should not be
    profiled again, so it leaves `profile` out.
    """
    config = to_yaml(replace(settings, profile=ProfileSettings()))
    texts = {INFO_FILE: json.dumps(plain(info), indent=1) + "\n", SETTINGS_FILE: config}
    for name, text in texts.items():
        file = settings.out / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomically(file, text)


def read_info(out: Path, remedy: str = RESTORE) -> RunInfo:
    """The content of run.json. Raises SettingsError with `remedy` if no run wrote it."""
    file = out / INFO_FILE
    try:
        return build(RunInfo, read_json(file, remedy))
    except (CheckpointError, SettingsError) as error:
        reason = str(error).removeprefix(f"{file}: ").removesuffix(f"; {remedy}")
        raise SettingsError(f"{file}: {reason}; {remedy}") from None


def finished_by_other_version(out: Path) -> Path | None:
    """The last checkpoint of a finished run that another version made; None for our own runs.

    Raises SettingsError, naming that version, if the run is not finished.
    """
    if not (out / SETTINGS_FILE).exists() or (version := _version(out)) == __version__:
        return None
    newest = checkpoint.latest(out, say=lambda line: None)
    if newest is not None and step_of(newest) == _planned_steps(out):
        print(
            f"warning: {out} was written by OpenPaLM {shown(str(version))}; its settings were not "
            "compared with this command's",
            file=sys.stderr,
        )
        return newest
    if version is None:
        raise SettingsError(
            f"--out {out}: has no {INFO_FILE}, and no readable checkpoint says which version made "
            f"this run; {RESTORE}"
        )
    raise SettingsError(
        f"--out {out}: was written by OpenPaLM {shown(version)} and cannot be resumed by "
        f"{__version__}; resume it with that version, or start from its weights with --init {out} "
        "and another --out"
    )


def step_of(directory: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(directory.name.removeprefix("step-"))


def _version(out: Path) -> str | None:
    """The version that made the run: from run.json, else from its newest readable checkpoint."""
    damaged = (out / INFO_FILE).exists()  # if it names no version: `recall` says so
    return version_of_run(out) or (__version__ if damaged else None)


def _planned_steps(out: Path) -> object:
    """Steps of a run of another version, which may have kept them in config.yaml."""
    if (out / INFO_FILE).exists():
        return read_json(out / INFO_FILE, "").get("steps")
    chosen = read_yaml(out / SETTINGS_FILE).get("chosen")
    return chosen.get("steps") if isinstance(chosen, dict) else None


def _read_settings(file: Path, kind: type[TrainSettings]) -> TrainSettings:
    """The settings of a run. Raises SettingsError naming the file if they are not valid."""
    values = read_yaml(file)
    try:
        return build(kind, values)
    except SettingsError as error:
        raise SettingsError(f"{file}: not as the run wrote it: {error}; {RESTORE}") from None


def _refuse_edited(file: Path, info: RunInfo, stored: TrainSettings) -> None:
    """Raises SettingsError if run.json is not what the run wrote there.

    The newest checkpoint has a copy. Settings that were given must agree, too; --steps need not:
    a run that is made longer writes run.json before config.yaml, and may be killed in between.
    """
    given = {"dtype": stored.dtype, "minutes": stored.minutes}
    known = _info_at_checkpoint(file.parent)
    if known:  # what it lacks had its default: an earlier version did not write it
        known = {f.name: f.default for f in fields(info) if f.default is not MISSING} | known
    known |= {name: value for name, value in given.items() if value not in (None, "auto")}
    for name in sorted(known.keys() - ({"steps"} if stored.steps else set())):
        was, now = known[name], getattr(info, name, None)
        if was != now:
            raise SettingsError(
                f"{file}: {name} is {now}, the run's own was {was}; set it back "
                "(the run itself writes this file), or choose another --out"
            )


def _info_at_checkpoint(out: Path) -> dict[str, Any]:
    """The copy of run.json in the newest readable checkpoint; empty if there is none."""
    for newest in reversed(checkpoint.steps(out)):
        try:
            lineage = read_manifest(newest).get("lineage") or {}
            return dict(lineage["run"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue  # damaged, or not written by a run: its content is checked elsewhere
    return {}


def reward_failed(out: Path) -> None:
    """Notes that the run ended because its reward failed, so that the reward may be corrected."""
    (out / REWARD_FAILED).write_text("", encoding="utf-8")


def _refuse_another_reward(out: Path, was: str | None, now: str | None) -> None:
    """Raises SettingsError if the reward changed; one that failed may be corrected once."""
    if was == now:
        return
    failed = out / REWARD_FAILED
    corrected = failed.read_text(encoding="utf-8") if failed.exists() else None
    if corrected == "":
        failed.write_text(now or "", encoding="utf-8")
        print("the reward has changed since it failed; the run continues with it", file=sys.stderr)
    elif corrected is None or corrected != now:
        raise SettingsError(
            f"--out {out}: the files of --reward or --gold-reward have changed since that run "
            f"began ({was}, now {now}); restore them, or choose another --out"
        )


def _refuse_differences(
    stored: TrainSettings,
    info: RunInfo,
    asked: TrainSettings,
    hashes: dict[str, str | None],
    parent_fixed: bool,
    cut_changes: CutChanges,
) -> None:
    """Raises SettingsError for the first setting that differs and changes the result."""
    _refuse_another_reward(asked.out, info.reward, hashes["reward"])
    old, new = _comparable(stored), _comparable(asked)
    old |= {"data": info.data, "init": info.parent}
    new |= {"data": hashes["data"], "init": hashes["parent"]}
    if stored.init == asked.init and not parent_fixed and checkpoint.steps(asked.out):
        new["init"] = old["init"]  # the parent run may have trained further since
    if stored.microbatch_tokens != asked.microbatch_tokens:
        _refuse_another_cut(stored, asked, cut_changes(stored, info.processes))
        del old["microbatch_tokens"], new["microbatch_tokens"]
    longer = bool(stored.steps and asked.steps and stored.steps != asked.steps)
    if longer:
        del old["steps"], new["steps"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = _first_difference(old.get(name), new.get(name))
            length = name in ("steps", "minutes", "epochs")
            remedy = f", or train on from it with --init {asked.out}" if length else ""
            raise SettingsError(
                f"--out {asked.out}: that run was made with another {spell(name)} "
                f"({was}, now {now}); choose another --out{remedy}"
            )
    if longer:
        _refuse_another_schedule(stored, asked)


def _comparable(settings: TrainSettings) -> dict[str, Any]:
    """The settings that change a run's result, as plain values."""
    ignored = {*MAY_CHANGE}
    if isinstance(settings, PretrainSettings):
        ignored.add("sample_prompts")
    return {name: value for name, value in plain(settings).items() if name not in ignored}


def _refuse_another_cut(stored: TrainSettings, asked: TrainSettings, reason: str | None) -> None:
    """Raises SettingsError if there is a `reason` why another --microbatch-tokens is refused."""
    if reason is not None:
        raise SettingsError(
            f"--out {asked.out}: that run was made with another --microbatch-tokens "
            f"({stored.microbatch_tokens}, now {asked.microbatch_tokens}), and {reason}; "
            "give that again or choose another --out"
        )


def _refuse_another_schedule(stored: TrainSettings, asked: TrainSettings) -> None:
    """Raises SettingsError unless the steps taken so far are also those of the longer run.

    The shape of a schedule depends on the number of steps. Only where the learning rate and the
    batch have their full size under both numbers are the steps the same.
    """
    was, now = stored.steps, asked.steps
    assert was is not None
    assert now is not None
    taken = max(map(step_of, checkpoint.steps(asked.out)), default=0)
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


def _first_difference(old: Any, new: Any) -> tuple[str, str]:
    """Both values as text; of two groups of settings, the first that differs with its name."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
        return f"{key} {old.get(key, 'not set')}", str(new.get(key, "not set"))
    was, now = ("not set" if value is None else str(value) for value in (old, new))
    return was, now
