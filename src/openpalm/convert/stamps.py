"""Notices that files change while they are read: what was read is then a mixture of two models."""

from pathlib import Path

from openpalm.errors import CheckpointError

Stamps = tuple[tuple[str, int, int], ...]

_READ = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".json")
_PLACES = ("*", "shard_*/*", "step_*/shard_*/*")
_GROWING = "meta.json"
"""A training run of mesh-transformer-jax lists its new steps in it."""


def stamps(path: Path) -> Stamps:
    """Name, size and time of change of the files that a conversion of `path` may read."""
    found = [path] if path.is_file() else [p for place in _PLACES for p in path.glob(place)]
    files = sorted(p for p in found if p.suffix in _READ and p.name != _GROWING and p.is_file())
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


def refuse_changed(path: Path, before: Stamps) -> None:
    """Raises CheckpointError if one of the files is another now; new ones may have come."""
    if changed := sorted(set(before) - set(stamps(path))):
        raise CheckpointError(
            f"{changed[0][0]}: changed while it was read; repeat the command when it is complete"
        )
