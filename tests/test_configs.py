"""Every recipe of configs/ trains: as its file says, but for a model and batches made small."""

import gzip
import json
import re
from pathlib import Path

import pytest
from command_line import write_base
from train_samples import write_dataset

from openpalm.base.settings import build, parse, plain
from openpalm.base.yaml_file import read_yaml
from openpalm.cli.main import main
from openpalm.data.rows import tasks
from openpalm.errors import SettingsError
from openpalm.train.config import PretrainSettings
from openpalm.train.sizing import measure

CONFIGS = Path(__file__).parent.parent / "configs"
MIXTURE = CONFIGS / "flan-mixture.yaml"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path != MIXTURE)
SMALL = {
    "arch.dim": 32,
    "arch.depth": 2,
    "arch.heads": 2,
    "arch.head_dim": 16,
    "arch.ff_dim": 64,
    "sequence_length": 32,
    "batch_tokens": 256,
    "microbatch_tokens": 64,
    "dtype": "float32",
}
STEPS = 3
LENGTHS = ("steps", "minutes", "epochs")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "plain")


def shrunk(recipe: Path, folder: Path) -> Path:
    """The recipe's copy that runs a few steps, whatever it says about its length."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.partition(":")[0] not in LENGTHS]
    copy = folder / recipe.name
    copy.write_text("\n".join([*lines, f"steps: {STEPS}", ""]), encoding="utf-8")
    return copy


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "matmul_flops", lambda *_: 1e9)
    out = tmp_path / "run"
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    words = [f"--config={shrunk(recipe, tmp_path)}", f"--data={data}", f"--out={out}", *small]
    assert main(["train", *words]) == 0
    assert (out / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").is_file()
    check_as_in_the_file(plain(build(PretrainSettings, read_yaml(out / "config.yaml"))), recipe)


def check_as_in_the_file(used: dict, recipe: Path) -> None:
    """Nothing but what was made small differs from the recipe."""

    def flat(values: dict, prefix: str = "") -> dict:
        parts = [
            flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
            for k, v in values.items()
        ]
        return {name: value for part in parts for name, value in part.items()}

    asked, got = flat(read_yaml(recipe)), flat(used)
    kept = asked.keys() - {*SMALL, *LENGTHS}
    assert {name: got.get(name) for name in kept} == {name: asked[name] for name in kept}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_command_line_wins_over_a_recipe(recipe: Path):
    words = ["--optim.lr", "0.5", "--data", "d", f"--config={recipe}", "--out", "o"]
    asked = parse(PretrainSettings, words, verb="train", about="", examples=[])
    assert asked.optim.lr == 0.5
    assert (asked.data, asked.out) == (Path("d"), Path("o"))
    with pytest.raises(SettingsError, match="--data, --out"):
        parse(PretrainSettings, [f"--config={recipe}"], verb="train", about="", examples=[])


def test_a_setting_that_is_lost_is_found(tmp_path: Path):
    recipe = RECIPES[0]
    settings = build(PretrainSettings, {"data": "d", "out": "o"} | read_yaml(recipe))
    check_as_in_the_file(plain(settings), recipe)
    used = plain(settings)
    used["optim"]["lr"] = 0.5
    with pytest.raises(AssertionError):
        check_as_in_the_file(used, recipe)


def test_every_recipe_is_checked():
    assert {path.stem for path in RECIPES} >= {
        *("enwik8", "laptop", "nanopalm-213m", "palm-paper"),
        *("palm-150m", "palm-410m", "palm-1b", "palm-2.1b"),
    }


ROWS = {
    "flan": {"inputs": "Is {} even? OPTIONS: yes, no", "targets": "yes", "task": "parity"},
    "databricks": {
        "instruction": "Name a number after {}.",
        "context": "",
        "response": "One more than {}.",
        "category": "brainstorming",
    },
}


def stand_in(address: str, folder: Path) -> Path:
    """A few rows in the format of the file at this address of the Hub, under its name."""
    kind = address.removeprefix("hf://datasets/").split("/")[1]
    file = folder / Path(address).name
    if kind == "oasst1":
        rows = [oasst_tree(i) for i in range(4)]
    else:
        form = ROWS["flan" if kind == "flan" else "databricks"]
        rows = [{key: text.format(i) for key, text in form.items()} for i in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def oasst_tree(number: int) -> dict:
    answer = {"text": "It is one.", "role": "assistant", "message_id": f"a{number}", "replies": []}
    question = {"text": f"What is {number}?", "role": "prompter", "message_id": f"q{number}"}
    return {"message_tree_id": f"q{number}", "prompt": question | {"replies": [answer]}}


def test_the_mixture_of_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Every task is read in its published format and drawn by its weight; no file is fetched."""
    monkeypatch.setattr(tasks, "fetch_dataset_file", lambda address: stand_in(address, tmp_path))
    base = write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)  # the package's own file is found
    words = ["--data", "configs/flan-mixture.yaml", "--out", "run", "--steps", "2"]
    more = ["--batch-tokens", "192", "--dtype", "float32", "--pack"]
    assert main(["sft", "--init", str(base), *words, *more]) == 0
    said = capsys.readouterr().err
    mixture = read_yaml(MIXTURE)["tasks"]
    assert len(mixture) >= 12
    whole = sum(task["weight"] for task in mixture)
    for task in mixture:
        share = 4 * len(mixture) * task["weight"] / whole
        found = re.search(rf"{re.escape(task['data'])}: (\d+) draws an epoch of 4 examples", said)
        assert found is not None, task["data"]
        assert abs(int(found[1]) - share) < 1
    assert "left out" not in said
