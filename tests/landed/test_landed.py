"""Files of earlier versions are read as they were written, and give the same results.

make.py made the files in data/, once. Tensors, configs, token ids and rows must agree to the bit
everywhere. The last bits of a computed result differ between processors: results must agree to the
bit where processor and torch are the stored ones, elsewhere within a small tolerance.
"""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import rows
from landed_cases import (
    CRITICS,
    DATA,
    RENAMED_FIELDS,
    RENAMED_TENSORS,
    REPEATED,
    RESUMABLE,
    RUNS,
    arithmetic,
    conversation,
    critic_values,
    judged,
    log_probs,
    one_thread,
    outputs,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.adapter import load_adapter
from openpalm.checkpoint.manifest import read_manifest
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.rows.preferences import Preference
from openpalm.errors import SettingsError
from openpalm.model import lora
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer
from openpalm.report.runs import read_runs

CLOSE = 1e-5
LOSS_CLOSE = 1e-4
REFUSED = r"written by OpenPaLM '0\.1\.0' and cannot be resumed by \d.*--init"
NEWEST = "step-00000003"
MODELS = ["palm", "grouped", "gpt-j", "nanopalm", "raw-head", "encoder", "bfloat16"]
WRITERS = [name for name in RUNS if not name.startswith("reward")]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def checkpoint_of(name: str) -> Path:
    """What a user names: a checkpoint, or a run that holds one."""
    path = DATA / name / "checkpoint"
    return path if path.exists() else checkpoint.resolve(DATA / name / "run")


def expected(name: str) -> dict[str, Tensor]:
    return load_file(DATA / name / "expected.safetensors")


def metadata(name: str) -> dict[str, str]:
    with safe_open(DATA / name / "expected.safetensors", "pt") as file:
        return file.metadata()


def check(name: str, found: dict[str, Tensor]) -> None:
    """The results against the stored ones of the same names."""
    exact = metadata(name)["arithmetic"] == arithmetic()
    stored = expected(name)
    assert found
    for key, tensor in found.items():
        if exact or not tensor.is_floating_point():
            assert torch.equal(tensor, stored[key]), key
            continue
        assert tensor.shape == stored[key].shape, key
        largest = stored[key].abs().max()
        assert (tensor - stored[key]).abs().max() <= CLOSE * largest, key


def same_fields(config: Any, stored: dict[str, Any]) -> None:
    """Every stored field; one that was added since changes no result, or `check` sees it."""
    now = json.loads(json.dumps(asdict(config)))
    assert {name: now[RENAMED_FIELDS.get(name, name)] for name in stored} == stored


def same_weights(model: Transformer, directory: Path) -> None:
    stored = load_file(directory / "model.safetensors")
    now = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert {RENAMED_TENSORS.get(name, name) for name in stored} == now.keys()
    for name, tensor in stored.items():
        assert torch.equal(now[RENAMED_TENSORS.get(name, name)], tensor.to(model.embedding.dtype))


@pytest.mark.parametrize("name", [*MODELS, *RUNS])
def test_weights_and_config_are_as_stored(name: str):
    directory = checkpoint_of(name)
    model = openpalm.load(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    same_weights(model, directory)
    same_fields(model.config, config["model"])
    assert isinstance(model, RewardModel) == ("reward" in config)
    if isinstance(model, RewardModel):
        same_fields(model.reward, config["reward"])
    assert lora.is_attached(model) == ("lora" in config)
    if "lora" in config:
        same_fields(lora.config_of(model), config["lora"])


@pytest.mark.parametrize("name", [*MODELS, *RUNS])
def test_models_compute_what_they_did(name: str):
    path = DATA / name / ("checkpoint" if name in MODELS else "run")
    check(name, outputs(openpalm.load(path), expected(name)["ids"]))


def test_bfloat16_weights_stay_bfloat16():
    directory = checkpoint_of("bfloat16")
    assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {
        torch.bfloat16
    }
    same_weights(openpalm.load(directory, dtype="bfloat16"), directory)


@pytest.mark.parametrize("name", WRITERS)
def test_the_tokenizer_and_template_of_a_run_give_the_same_ids(name: str):
    inputs, targets = conversation(checkpoint_of(name))
    check(name, {"chat_inputs": inputs, "chat_targets": targets})


@pytest.mark.parametrize("name", WRITERS)
def test_answers_are_as_likely_as_they_were(name: str):
    check(name, log_probs(openpalm.load(checkpoint_of(name)), checkpoint_of(name)))


def test_an_adapter_directory_fits_the_checkpoint_it_was_trained_on():
    base, adapted = checkpoint_of("train"), checkpoint_of("lora")
    model = openpalm.load(base)
    load_adapter(model, adapted / "adapter", bases=[read_manifest(base)["sha256"]])
    same_weights(model, adapted)
    found = outputs(model, expected("lora")["ids"])
    check("lora", found)
    lora.merge(model)
    merged = outputs(model, expected("lora")["ids"])
    assert torch.allclose(merged["logits"], found["logits"], atol=1e-5)
    assert not torch.equal(merged["logits"], openpalm.load(base).logits(expected("lora")["ids"]))


@pytest.mark.parametrize("name", CRITICS)
def test_a_critic_reads_the_values_that_it_did(name: str):
    check(name, critic_values(name, checkpoint_of(name), expected(name)["ids"]))


@pytest.mark.parametrize("name", RESUMABLE)
def test_the_state_of_training_is_refused_by_its_version(name: str):
    """0.1.0 kept it in another form; the tests above read its models."""
    with pytest.raises(SettingsError, match=REFUSED):
        checkpoint.load_train_state(checkpoint_of(name))


def interrupted(name: str, out: Path) -> Path:
    """A copy of a stored run, as if it had stopped before its last step."""
    shutil.copytree(DATA / name / "run", out)
    (out / "checkpoints" / "step-00000003").rename(out / "checkpoints" / "step-00000002")
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(said: Any, name: str, out: Path) -> str:
    """The one line that the command of a stored run ends with; nothing in the run changes."""
    before = files_of(out)
    status, _, errors = said(*RUNS[name], "--out", out)
    assert (status, len(errors)) == (2, 1), errors
    assert files_of(out) == before
    return errors[0]


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_run_is_not_continued_by_this_version(name: str, said, monkeypatch, tmp_path: Path):
    """Neither from its checkpoint, nor from scratch as if that were damaged."""
    monkeypatch.chdir(DATA)
    out = interrupted(name, tmp_path / "run")
    assert re.search(REFUSED, refused(said, name, out))
    newest = shutil.copytree(out / "checkpoints" / "step-00000002", out / "checkpoints" / NEWEST)
    (newest / "model.safetensors").write_bytes(b"torn")
    assert re.search(REFUSED, refused(said, name, out))


@pytest.mark.parametrize("field", ["max_skipped", "  recompute"])
def test_a_run_with_settings_that_are_gone_is_not_continued(
    field: str, said, monkeypatch, tmp_path: Path
):
    """The version is named where a checkpoint has it; without one nothing begins either."""
    monkeypatch.chdir(DATA)
    out = interrupted("train", tmp_path / "run")
    text = (out / "config.yaml").read_text(encoding="utf-8")
    assert f"\n{field}:" in text
    text = text.replace(f"\n{field}:", f"\n{field}_of_old:")
    (out / "config.yaml").write_text(text, encoding="utf-8")
    assert re.search(REFUSED, refused(said, "train", out))
    shutil.rmtree(out / "checkpoints")
    line = refused(said, "train", out)
    assert "says which version made this run" in line


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_finished_run_stays_finished(name: str, said, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(DATA)
    out = shutil.copytree(DATA / name / "run", tmp_path / "run")
    before = files_of(out)
    status, _, errors = said(*RUNS[name], "--out", out)
    assert (status, files_of(out) == before) == (0, True), errors


@pytest.mark.parametrize("name", ["tokens", "tokens-bpe"])
def test_a_prepared_dataset_gives_the_same_ids(name: str):
    dataset = open_dataset(DATA / name / "dataset")
    ids = {split: dataset.tokens(split)[:].astype("int32") for split in ("train", "val")}
    check(name, {split: torch.from_numpy(found) for split, found in ids.items()})
    text = "".join(dataset.tokenizer().decode(ids[split].tolist()) for split in ids)
    assert text == (DATA / "tokens" / "text.txt").read_text(encoding="utf-8")


def test_preference_records_give_the_same_rows():
    path = DATA / "preferences" / "records.jsonl"
    stored = (DATA / "preferences" / "expected.json").read_text(encoding="utf-8")
    assert judged(path) == json.loads(stored)
    for number, row in enumerate(rows(path)):
        assert Preference.from_json(row, f"row {number}").to_json() == row


@pytest.mark.parametrize("name", RUNS)
def test_a_run_directory_shows_its_losses(name: str):
    (run,) = read_runs([DATA / name / "run"])
    steps = [row for row in rows(DATA / name / "run" / "metrics.jsonl") if "grad_norm" in row]
    assert run.curve("loss", "steps") == ([1, 2, 3], [row["loss"] for row in steps])
    assert run.settings["steps"] == "3"


@pytest.mark.parametrize("name", REPEATED)
def test_training_takes_the_same_steps(name: str, said, monkeypatch, tmp_path: Path):
    """From the same seed, and on the same processor to the same weights, bit for bit."""
    monkeypatch.chdir(DATA)  # where the stored commands were run
    status, _, errors = said(*RUNS[name], "--out", tmp_path / "run")
    assert status == 0, errors
    before, now = (_steps(folder / "run") for folder in (DATA / name, tmp_path))
    assert len(now) == len(before) == 3
    if metadata(name)["arithmetic"] != arithmetic():
        assert now == pytest.approx(before, rel=LOSS_CLOSE)
        return
    assert now == before
    same_weights(openpalm.load(tmp_path / "run"), checkpoint_of(name))


def _steps(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run / "metrics.jsonl") if "grad_norm" in row]
