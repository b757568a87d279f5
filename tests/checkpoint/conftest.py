"""A checkpoint that tests may read, and a copy of it that a test may change."""

import shutil
from pathlib import Path

import pytest
from checkpoints import save

from openpalm.checkpoint import directory as checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pristine") / "step-00000012")


@pytest.fixture
def copied(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


@pytest.fixture
def a_run(pristine: Path, tmp_path: Path) -> Path:
    for step in (2, 10, 9, 100_000_000):
        shutil.copytree(pristine, tmp_path / "run" / "checkpoints" / checkpoint.step_name(step))
    return tmp_path / "run"
