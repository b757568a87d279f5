"""`openpalm eval` reproduces the run's own validation figures."""

import gzip
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


def test_a_text_that_unpacks_to_far_more_is_refused(said, run, tmp_path, monkeypatch):
    monkeypatch.setattr("openpalm.cli.eval._MAX_TEXT_BYTES", 1000)
    with gzip.open(tmp_path / "t.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((json.dumps({"text": "a" * 500}) + "\n") * 3)
    status, _, errors = said("eval", run, "--text", tmp_path / "t.jsonl.gz")
    assert (status, len(errors)) == (2, 1)
    assert "more than 1,000 bytes of text; prepare it" in errors[0]


def test_bits_per_byte_of_a_text_file(said, run, tmp_path):
    text = "Chapter 7. The quick brown fox — né. " * 5
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    status, output, errors = said("eval", run, "--text", tmp_path / "t.txt", "--json")
    assert (status, errors) == (0, [])
    found = json.loads(output)
    assert (found["bytes"], found["tokens"]) == (len(text.encode()), len(text.encode()))
    line = said("eval", run, "--text", tmp_path / "t.txt", "--overlap", 24)[1]
    assert "windows of 48 that overlap by 24" in line
    # The rows of a file, each after an end of text: the same text twice has the same figure.
    rows_file = tmp_path / "t.jsonl"
    rows_file.write_text((json.dumps({"body": text}) + "\n") * 2, encoding="utf-8")
    words = ["eval", run, "--text", rows_file, "--text-field", "body", "--json"]
    twice = json.loads(said(*words)[1])
    assert twice["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert twice["tokens"] == 2 * found["tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --data, --text and --tasks"),
        (["--data", "d", "--tasks", "piqa"], "give one of --data, --text and --tasks"),
        (["--data", "d", "--limit", 3], "--limit: is an option of --tasks; leave it out"),
        (["--text", "t", "--split", "train"], "--split: is an option of --data; leave it out"),
        (["--tasks", "piqa", "--overlap", 3], "--overlap: is an option of --text; leave it out"),
        (["--tasks", "piqa", "--sequence-length", 3], "--tasks uses the model's context"),
        (["--tasks", "piqa", "--limit", 0], "--limit 0: must be 1 or more"),
        (["--text", "t", "--batch-size", 0], "--batch-size 0: must be 1 or more"),
        (["--data", "d", "--tokenizer", "t"], "--tokenizer: the data has its own"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file or folder"),
    ],
)
def test_a_wrong_request_is_one_line(said, run, words, message):
    status, _, errors = said("eval", run, *words)
    assert (status, len(errors)) == (2, 1)
    assert message in errors[0]


def test_an_overlap_must_leave_something_to_predict(said, work, run):
    status, _, errors = said("eval", run, "--text", work / "text.txt", "--overlap", 48)
    assert (status, len(errors)) == (2, 1)
    assert "--overlap 48: must be below the 48 tokens of a window" in errors[0]


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "{run}", "--tasks", "piqa"],
        [*("train", "--init", "{base}", "--data", "{data}", "--out", "{out}"), "--steps", "1"],
    ],
)
def test_a_missing_library_is_one_line(said, work, tmp_path, monkeypatch, words):
    monkeypatch.setattr("openpalm.evaluate.harness.find_spec", lambda name: None)
    known = {
        "run": work / "run",
        "base": work / "base",
        "data": work / "data",
        "out": tmp_path / "r",
    }
    words = [word.format(**known) for word in words]
    words += ["--eval-tasks", "piqa"] if words[0] == "train" else []
    status, _, errors = said(*words)
    assert (status, len(errors)) == (2, 1)
    assert "lm-eval is not installed; pip install 'openpalm[eval]'" in errors[0]


def test_options_of_the_probe_need_the_probe(said, work, tmp_path):
    words = ["train", "--init", work / "base", "--data", work / "data", "--out", tmp_path / "run"]
    status, _, errors = said(*words, "--steps", 1, "--eval-tasks-every", 5)
    assert (status, len(errors)) == (2, 1)
    assert "--eval-tasks-every 5: needs --eval-tasks" in errors[0]
