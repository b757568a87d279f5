"""The notebooks of examples/ run from a fresh folder, and git keeps them without outputs."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import openpalm

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TIMEOUT_S = 300


def cells(path: Path) -> list[Any]:
    return nbformat.read(path, as_version=4).cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path: Path):
    nbformat.validate(nbformat.read(path, as_version=4))
    code = [cell for cell in cells(path) if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder where the demo ran, and the text that each cell printed on standard output."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(ROOT / "examples" / "colab_demo.ipynb", as_version=4)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    NotebookClient(
        notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(folder)}}
    ).execute()
    printed = {
        cell.id: "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    return folder, printed


def completions(text: str, prompt: str) -> list[str]:
    return re.findall(rf"--- completion \d+\n{prompt}\x1b\[1m(.*?)\x1b\[0m", text, re.DOTALL)


def test_the_demo_prints_what_the_model_says(ran: tuple[Path, dict[str, str]]):
    folder, printed = ran
    model = openpalm.load(folder / "runs" / "demo")
    sampled = completions(printed["infer"], "In a valley")
    expected = openpalm.generate(
        model, ["In a valley"] * 3, max_new_tokens=64, temperature=1.0, top_p=0.9, seed=0
    )
    assert sampled == expected
    assert len(set(sampled)) > 1, "the completions are drawn, not the likeliest"
    greedy = completions(printed["greedy"], "The unicorns")
    assert greedy == openpalm.generate(model, ["The unicorns"], max_new_tokens=64, temperature=0)
    assert f"{model.config.parameters:,} parameters" in printed["model"]


def test_the_model_has_learnt_its_text(ran: tuple[Path, dict[str, str]]):
    (greedy,) = completions(ran[1]["greedy"], "The unicorns")
    assert greedy.startswith(" spoke perfect English")
