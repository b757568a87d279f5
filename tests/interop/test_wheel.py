"""The wheel, built by pip and used away from the source folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import write_base

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "openpalm"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # pip may leave files in the folder that it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "configs"):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    words = ["wheel", str(source), "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, env=environment)
    return next(folder.glob("openpalm-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and nothing else of this project."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_every_file_of_the_package_is_in_it(wheel: Path):
    files = {
        Path("openpalm", path.relative_to(PACKAGE)).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {f"openpalm/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert any(name.endswith(".html") for name in files)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith("openpalm-")}
    assert packed == files | recipes


def run(installed: Path, folder: Path, code: str) -> str:
    """Runs Python code in `folder`, with the installed package."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PROGRAM = """
import sys, openpalm
from pathlib import Path
from openpalm.cli.main import main
assert Path(openpalm.__file__).is_relative_to({installed!r}), openpalm.__file__
sys.exit(main({words!r}))
"""


def test_the_recipes_are_found(installed: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("one two three four five six. " * 200, encoding="utf-8")
    prepare = ["data", "prepare", "text.txt", "--out", "data", "--tokenizer", "byte"]
    small = ["--minutes", "null", "--steps", "1", "--arch.dim", "16", "--arch.ff-dim", "32"]
    small += ["--arch.heads", "2", "--arch.head-dim", "8", "--arch.depth", "1", "--device", "cpu"]
    recipe = ["train", "--config", "configs/tinyshakespeare.yaml", "--data", "data", "--out", "run"]
    for words in (prepare, [*recipe, *small, "--batch-tokens", "256"]):
        run(installed, tmp_path, PROGRAM.format(installed=str(installed), words=words))
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").is_file()


def test_it_samples(installed: Path, tmp_path: Path):
    base = write_base(tmp_path / "base")
    words = ["sample", str(base), "The", "--max-new-tokens", "3"]
    assert run(installed, tmp_path, PROGRAM.format(installed=str(installed), words=words))
