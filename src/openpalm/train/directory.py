"""Whose a run's directory is: made for one set of settings, used by one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpalm import checkpoint
from openpalm.errors import SettingsError
from openpalm.settings import build, plain, read_yaml, spell, to_yaml
from openpalm.train.config import Chosen, ProfileSettings, TrainSettings

SETTINGS_FILE = "config.yaml"

MAY_CHANGE = ("out", "data", "init", "chosen", "log", "profile", "memory", "compile")
"""Settings that a run may go on with otherwise; data and parent are compared by their hashes."""


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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"--out {out}: another process is training in it") from None
        yield
    finally:
        os.close(descriptor)


def recall(
    asked: TrainSettings, given: Chosen, *, parent_fixed: bool = False
) -> TrainSettings | None:
    """The settings of the run that `asked.out` holds, with what it chose; None if it holds none.

    `given` says what data and parent are there now; the parent may have gone on since the run
    began, unless `parent_fixed`. Raises SettingsError where the run was made
    with other settings.
    """
    file = asked.out / SETTINGS_FILE
    if not file.exists():
        return None
    stored = _recall(file, type(asked))
    _refuse_differences(stored, asked, given, parent_fixed)
    return replace(asked, chosen=stored.chosen)


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
    settings = replace(settings, profile=ProfileSettings())
    _write_whole(settings.out / SETTINGS_FILE, to_yaml(settings))


def _recall(file: Path, kind: type[TrainSettings]) -> TrainSettings:
    """The settings a run was made with; whatever is wrong with them is about that file."""
    values = read_yaml(file)
    try:
        return build(kind, values)
    except (SettingsError, TypeError, ValueError) as error:
        raise SettingsError(f"{file}: is not the settings of a run ({error})") from None


def _refuse_differences(
    stored: TrainSettings, asked: TrainSettings, given: Chosen, parent_fixed: bool
) -> None:
    """The same --out with other settings is a mistake, not a wish."""
    if stored.chosen.reward not in (None, given.reward):  # None in runs of older versions
        raise SettingsError(
            f"--out {asked.out}: what --reward or --gold names has changed since that run began "
            f"({stored.chosen.reward}, now {given.reward}); restore it, or choose another --out"
        )
    old, new = plain(stored), plain(asked)
    for side in (old, new):
        for name in MAY_CHANGE:
            side.pop(name, None)
    old |= {"data": stored.chosen.data, "init": stored.chosen.parent}
    new |= {"data": given.data, "init": given.parent}
    same_name = stored.init == asked.init and not parent_fixed
    if same_name and checkpoint.steps(asked.out):
        new["init"] = old["init"]  # the parent run may have gone on; this one has begun
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = _first_difference(old.get(name), new.get(name))
            raise SettingsError(
                f"--out {asked.out}: that run was made with another {spell(name)} "
                f"({was}, now {now}); choose another --out"
            )


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


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
