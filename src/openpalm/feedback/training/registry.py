"""The models that a project knows: adding them, naming them, finding their checkpoints."""

from pathlib import Path
from typing import Any

from openpalm.base.json_file import read_json
from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.models import ModelVersion, Project, TrainRun, User

POLICY, REWARD = ModelVersion.Kind.POLICY, ModelVersion.Kind.REWARD


def register(
    project: Project,
    path: str | Path,
    *,
    name: str,
    kind: str = POLICY,
    parent: ModelVersion | None = None,
    run: TrainRun | None = None,
) -> ModelVersion:
    """The project's model of this checkpoint; added if it is new. Raises DataError."""
    directory = checkpoint_directory(Path(path))
    digest = checkpoint_hash(directory)
    known = ModelVersion.objects.filter(project=project, checkpoint=digest, kind=kind)
    while not known.exists():
        # The table has each checkpoint and each name once, whoever adds it first.
        new = ModelVersion(
            project=project,
            name=free_name(project, name),
            kind=kind,
            path=str(directory),
            checkpoint=digest,
            parent=parent,
            run=run,
        )
        ModelVersion.objects.bulk_create([new], ignore_conflicts=True)
    return known.get()


def add_by_path(
    project: Project, user: User, path: str, *, name: str, kind: str = POLICY
) -> ModelVersion:
    """Registers a checkpoint on the server's disk. Raises DataError.

    Only an administrator of the site: a path could name a checkpoint of a project of others.
    """
    if not user.is_superuser:
        raise DataError("only an administrator of the site adds a model by its path")
    model = register(project, path, name=name, kind=kind)
    audit.record(
        "model.registered", user=user, project=project, target=model, path=model.path, kind=kind
    )
    return model


def free_name(project: Project, name: str) -> str:
    """`name`, or `name-2`, `name-3` ... if the project has a model of that name."""
    name = name[:100] or "model"
    taken = set(
        ModelVersion.objects.filter(project=project, name__startswith=name).values_list(
            "name", flat=True
        )
    )
    number, found = 2, name
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found


def checkpoint_directory(path: Path) -> Path:
    """The checkpoint that `path`, a run or a checkpoint, stands for: of a run the newest.

    Raises DataError if there is none. A manifest is written last, so it marks a whole checkpoint.
    """
    if (path / "manifest.json").is_file():
        return path.absolute()
    found = sorted(path.glob("checkpoints/step-*/manifest.json"))
    if not found:
        raise DataError(f"{path}: holds no checkpoint; give a run or a checkpoint directory")
    return found[-1].parent.absolute()


def checkpoint_hash(directory: Path) -> str:
    """Raises DataError if the manifest cannot be read."""
    manifest: Any = read_json(directory / "manifest.json", "choose another checkpoint")
    digest = manifest.get("sha256")
    if not isinstance(digest, str):
        raise DataError(f"{directory}/manifest.json: has no sha256; choose another checkpoint")
    return digest


def ancestors(model: ModelVersion) -> list[ModelVersion]:
    """The model and what it was trained from, the newest first."""
    known = ModelVersion.objects.filter(project=model.project_id).in_bulk()
    found: list[ModelVersion] = []
    current: ModelVersion | None = model
    while current is not None and current not in found:
        found.append(current)
        current = known.get(current.parent_id or 0)
    return found
