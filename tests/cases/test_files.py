"""Faults met with files that were damaged, edited or hostile: each stays corrected."""

import errno
import shutil
import socket
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from altered import altered, answers, seal
from command_line import rows

from openpalm.checkpoint.directory import load, resolve, save
from openpalm.cli.common import tokenizer_of
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError

FATAL = "a" * 40 + "b"
"""A text at which the regex of `panicking` gives up."""
BRIEF = ["--max-new-tokens", 2, "--dtype", "float32"]


# --- checkpoints


def test_a_model_of_nan_gets_status_503(work, tmp_path):
    """Logits of NaN were answered with status 500, or without logprobs with NUL bytes as text."""
    broken = Path(shutil.copytree(work / "base", tmp_path / "broken"))
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    safetensors.torch.save_file(nan, broken / "model.safetensors")
    plain = {"prompt": "Return", "max_tokens": 3, "temperature": 0}
    calls = [("POST", "/v1/completions", body) for body in (plain | {"logprobs": 2}, plain)]
    found = answers(seal(broken), calls)
    assert [answer.status_code for answer in found] == [503, 503]
    assert all("finite" in answer.json()["error"]["message"] for answer in found)


def test_a_manifest_with_a_name_too_long_for_a_file(said, call, work, tmp_path):
    """A file name of 300 characters in a manifest was a status 500 of the server, exit 1 here."""
    bad = Path(shutil.copytree(work / "base", tmp_path / "bad"))
    entry = {"bytes": 1, "sha256": "0" * 64}
    seal(bad, lambda body: body["files"].update({"x" * 300: entry}))
    assert call("/admin/models", {"path": str(bad)}).status == 400
    assert call("/v1/models").body["data"][0]["id"] == "base"
    status, _, errors = said("sample", bad, "x", *BRIEF)
    assert (status, len(errors)) == (2, 1)


@pytest.fixture(scope="module")
def panicking(work, tmp_path_factory):
    """A tokenizer with a regex that backtracks until its library panics."""
    regex = {"Regex": "(a+)+$"}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}

    def change(content):
        both = [split, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}

    to = tmp_path_factory.mktemp("panic") / "base"
    return altered(work / "base", to, "tokenizer.json", change)


def test_a_tokenizer_that_panics_is_one_line(said, panicking):
    """The panic of a tokenizer is no Exception, so `sample` ended with its traceback."""
    status, output, errors = said("sample", panicking, FATAL, *BRIEF)
    assert (status in (1, 2), output, len(errors)) == (True, "", 1)
    assert errors[0].startswith("openpalm: error: ")


def test_a_tokenizer_that_panics_is_the_requests_error(panicking):
    """The server answered the panic of a tokenizer with status 500 and no JSON."""
    (found,) = answers(panicking, [("POST", "/tokenize", {"prompt": FATAL})])
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_a_pickle_that_unfolds_is_refused(said, place):
    """A tuple of tuples as the key of a dictionary, in a file of 380 bytes, was hashed for ever.

    27 levels are beyond the bound; without one the test still ends.
    """
    nested = b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 27 + b"}h\0K\1s."
    Path("nested.pt").write_bytes(nested)
    status, _, errors = said("convert", "nested.pt", "out")
    assert (status, len(errors)) == (2, 1)
    assert "nested.pt" in errors[0]
    assert "unfolds to far more objects than it has" in errors[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_eps", float("nan")),
        ("norm_eps", -1.0),
        ("rotary_base", 0.0),
        ("rotary_base", float("nan")),
    ],
)
def test_a_config_of_impossible_numbers_is_refused(work, tmp_path, field, value):
    """A config.json with such a number was loaded; the error came later and named no file."""

    def change(content):
        content["model"][field] = value

    directory = altered(work / "base", tmp_path / "base", "config.json", change)
    with pytest.raises(CheckpointError, match=field):
        load(directory)


def test_a_tokenizer_that_the_manifest_does_not_list_is_not_used(work, tmp_path):
    """A tokenizer.json put into a checkpoint that has none was used as if it were its own."""
    directory = tmp_path / "base"
    save(directory, load(work / "base"))
    Tokenizer.byte().save(directory / "tokenizer.json")
    assert tokenizer_of(resolve(directory)) is None


def test_a_manifest_that_lists_no_files_is_refused(work, tmp_path):
    """With an empty list of files in the manifest nothing was verified, so any weights loaded."""
    directory = Path(shutil.copytree(work / "base", tmp_path / "base"))
    seal(directory, lambda body: body.update(files={}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: does not list"):
        load(directory)


@pytest.mark.parametrize("verb", ["sample", "chat"])
def test_the_tokenizer_of_another_model_is_refused(said, work, tmp_path, verb):
    """--tokenizer with another model's file was taken without a word, and answers were nonsense."""
    other = tmp_path / "other.json"
    Tokenizer.train_bpe(["other words here " * 9], 265).save(other)
    words = ["Return"] if verb == "sample" else []
    status, output, errors = said(
        verb, work / "base", *words, "--tokenizer", other, "--dtype", "float32"
    )
    assert (status, output) == (2, "")
    assert "--tokenizer" in errors[-1]


# --- runs


@pytest.fixture
def unfinished(work, tmp_path):
    """A copy of the run that has four of its eight steps, and the words that continue it."""
    run = Path(shutil.copytree(work / "run", tmp_path / "run"))
    shutil.rmtree(run / "checkpoints/step-00000008")
    words = ["--init", work / "base", "--data", work / "data", "--out", run, "--steps", 8]
    words += ["--batch-tokens", 192, "--dtype", "float32", "--eval-every", 4, "--save-every", 4]
    return run, ["train", *words]


def test_an_unfinished_run_continues(said, unfinished):
    """What the tests below refuse is refused for the fault in them alone."""
    run, words = unfinished
    assert said(*words)[0] == 0
    assert (run / "checkpoints/step-00000008").is_dir()


def test_a_shard_altered_in_its_middle_stops_the_run(said, work, unfinished, tmp_path):
    """A shard of zeros, of the same size and ends, was trained on without a word."""
    run, words = unfinished
    data = Path(shutil.copytree(work / "data", tmp_path / "data"))
    shard = data / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[9000:-9000] = bytes(len(content) - 18000)
    shard.write_bytes(content)
    status, _, errors = said(*words, "--data", data)
    assert status == 2
    assert f"{shard}: was altered" in errors[-1]
    assert not (run / "checkpoints/step-00000008").exists()


@pytest.mark.parametrize(("was", "now"), [('"steps": 8', '"steps": -3'), ("float32", "cow")])
def test_what_a_run_chose_is_not_edited(said, unfinished, was, now):
    """After an edit, -3 steps counted as a finished run, and dtype cow ended in a crash."""
    run, words = unfinished
    file = run / "run.json"
    info = file.read_text(encoding="utf-8")
    assert was in info
    file.write_text(info.replace(was, now), encoding="utf-8")
    status, _, errors = said(*words)
    assert status == 2
    assert f"{file}: " in errors[-1]


def test_a_state_without_its_fields_is_refused(said, unfinished):
    """A train/state.json that lacks its fields ended the run with a KeyError and status 1."""
    run, words = unfinished
    step = run / "checkpoints/step-00000004"
    (step / "train/state.json").write_text("{}", encoding="utf-8")
    seal(step)
    status, _, errors = said(*words)
    assert status == 2
    assert f"{step}/train: its state is not one" in errors[-1]
    assert "KeyError" not in errors[-1]


def test_a_read_error_is_no_damage(said, unfinished, monkeypatch):
    """One failed read made a run rename its good checkpoints and begin again at step 1."""
    run, words = unfinished
    opened, failed = Path.open, set()

    def once(path, *more, **named):
        if path.name == "model.safetensors" and path not in failed and run in path.parents:
            failed.add(path)
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *more, **named)

    monkeypatch.setattr(Path, "open", once)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    status, _, errors = said(*words)
    assert failed
    assert status == 1
    assert "Input/output error" in errors[-1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_a_reward_edited_between_two_parts_of_a_run(said, work, tmp_path):
    """The file of --reward was edited while a run stood still; the run used the other reward."""
    prompts, pay, run = (tmp_path / name for name in ("p.jsonl", "pay.py", "run"))
    prompts.write_text("".join(f'{{"prompt": "Q {i}"}}\n' for i in range(12)), encoding="utf-8")
    pay.write_text("def pay(prompt, answer, row):\n    return float(len(answer))\n", "utf-8")
    words = ["grpo", "--init", work / "base", "--data", prompts, "--reward", f"{pay}:pay"]
    words += [
        "--max-new-tokens",
        4,
        "--prompts-per-rollout",
        2,
        "--num-completions",
        2,
        "--steps",
        2,
    ]
    words += ["--save-every", 1, "--dtype", "float32", "--out", run]
    status, _, errors = said(*words)
    assert status == 0, errors
    shutil.rmtree(run / "checkpoints/step-00000002")
    before = rows(run / "metrics.jsonl")
    pay.write_text("def pay(prompt, answer, row):\n    return -1000.0\n", "utf-8")
    status, _, errors = said(*words)
    assert status == 2
    assert "the files of --reward or --gold-reward" in errors[-1]
    assert rows(run / "metrics.jsonl") == before


# --- text and bytes


def test_a_line_of_many_values_takes_little_memory(said, place):
    """A line of {},{},... in a field beside the text took thirty times its size in memory."""
    values = 1_200_000
    row = b'{"text":"hello there","x":[' + b"{}," * values + b"{}]}\n"
    Path("many.jsonl").write_bytes(row)
    tracemalloc.start()
    try:
        words = ["many.jsonl", "--out", "o", "--tokenizer", "byte", "--workers", 1]
        status, _, errors = said("data", "prepare", *words)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status == 2
    assert "many.jsonl:1: " in errors[-1]
    assert peak < 10 * len(row)


def test_an_endless_header_is_cut_off(server):
    """Headers without an end were all read, so four connections held up every other request."""
    host, port = server.url.removeprefix("http://").split(":")
    sent, most = 0, 64 << 20
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
            while sent < most:
                connection.sendall(b"a" * (1 << 20))
                sent += 1 << 20
        except OSError:  # the server has closed it
            pass
    assert sent < most
    assert server.call("/health").status == 200
