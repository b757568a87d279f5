"""`openpalm eval` reproduces the run's own validation figures."""

import json
import shutil

import pytest
from command_line import rows


def test_eval_is_the_validation_row_of_the_run(said, work, run):
    status, output, errors = said("eval", run, "--data", work / "data", "--json")
    assert (status, errors) == (0, [])
    found = json.loads(output)
    logged = [row for row in rows(run / "metrics.jsonl") if "val_loss" in row][-1]
    assert found["nats_per_token"] == pytest.approx(logged["val_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(logged["val_bits_per_byte"], rel=1e-6)
    assert (found["split"], found["sequence_length"]) == ("val", 48)


def test_the_line_says_what_json_says(said, work, run):
    found = json.loads(said("eval", run, "--data", work / "data", "--json")[1])
    line = said("eval", run, "--data", work / "data")[1]
    assert f"{found['nats_per_token']:.4f} nats per token" in line
    assert f"{found['bits_per_byte']:.4f} bits per byte" in line


def test_the_training_split(said, work, run):
    train = json.loads(said("eval", run, "--data", work / "data", "--split", "train", "--json")[1])
    val = json.loads(said("eval", run, "--data", work / "data", "--json")[1])
    assert train["bytes"] > 5 * val["bytes"]
    assert train["bits_per_byte"] != val["bits_per_byte"]


def test_a_longer_window_gives_a_lower_figure(said, work, run):
    def bits(length):
        words = ["eval", run, "--data", work / "data", "--sequence-length", length, "--json"]
        return json.loads(said(*words)[1])["bits_per_byte"]

    assert bits(1) > bits(48)


@pytest.mark.parametrize("length", [0, -1])
def test_a_window_needs_tokens(said, work, run, length):
    status, _, errors = said("eval", run, "--data", work / "data", "--sequence-length", length)
    assert status == 2
    assert f"--sequence-length {length}: must be 1 or more" in errors[0]


def test_data_of_another_tokenizer(said, work, run, tmp_path):
    said("data", "prepare", work / "text.txt", "--out", tmp_path / "bpe", "--tokenizer", "bpe:300")
    status, _, errors = said("eval", run, "--data", tmp_path / "bpe")
    assert (status, len(errors)) == (2, 1)
    assert "its vocabulary has 265 ids, this tokenizer 300; prepare the data with" in errors[0]
    said("data", "prepare", work / "text.txt", "--out", tmp_path / "b", "--tokenizer", "bpe:265")
    status, _, errors = said("eval", run, "--data", tmp_path / "b")
    assert (status, len(errors)) == (2, 1)
    assert "another tokenizer than this one; prepare the data with" in errors[0]
    status, output, errors = said("eval", run, "--data", tmp_path / "b", "--force", "--json")
    assert (status, len(errors)) == (0, 1)
    assert errors[0].endswith("used anyway (--force)")
    assert json.loads(output)["nats_per_token"] > 0


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(said, work, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, output, errors = said("eval", copy, "--data", work / "data", "--json")
    assert status == 0
    assert json.loads(output)["tokens"] > 0
    assert len(errors) == 1
    assert f"passing over a damaged checkpoint: {newest}" in errors[0]


@pytest.mark.parametrize("words", [("--dtype", "bfloat16"), ("--quantize", "int8")])
def test_fewer_bits_cost_little_and_something(said, work, run, words):
    exact = json.loads(said("eval", run, "--data", work / "data", "--json")[1])
    found = json.loads(said("eval", run, "--data", work / "data", "--json", *words)[1])
    assert found["weights"] == words[1]
    assert found["nats_per_token"] != exact["nats_per_token"]
    assert found["nats_per_token"] == pytest.approx(exact["nats_per_token"], rel=0.01)
