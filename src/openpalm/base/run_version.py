"""The version of OpenPaLM that wrote a run or a checkpoint, for messages about other versions."""

from importlib import import_module
from pathlib import Path

from openpalm.base.json_file import read_json
from openpalm.errors import CheckpointError, StorageError


def this_version() -> str:
    # By name: the package refers to the public API above this room, for type checkers.
    return import_module("openpalm").__version__


def version_of_run(run: Path) -> str | None:
    """The version that a run directory names, or None.

    run.json names it; 0.1.0 wrote no run.json, but every version writes it into the manifests of
    its checkpoints.
    """
    manifests = sorted((run / "checkpoints").glob("step-*/manifest.json"), reverse=True)
    return next(filter(None, map(version_in, (run / "run.json", *manifests))), None)


def version_in(file: Path) -> str | None:
    """The version that a run.json or a checkpoint's manifest.json names.

    None for a file that cannot be read: whoever needs its content reports that.
    """
    try:
        content = read_json(file, "")
    except (CheckpointError, StorageError):
        return None
    versions = content.get("versions")
    version = (versions if isinstance(versions, dict) else content).get("openpalm")
    return version if isinstance(version, str) else None
