"""Faults that users met when they gave texts, rows and settings: each stays corrected."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import ok, program, talk
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from openpalm.align.sft import to_example
from openpalm.base.settings import parse
from openpalm.cli.main import main
from openpalm.cli.sample import SampleSettings
from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.text.tokenizer import Tokenizer


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_sft_refuses_prompts_that_fill_the_window(said, work, place):
    """A run on prompts longer than the window trained on nothing and said it was done."""
    turns = [("user", "the cat sat " * 40), ("assistant", "yes.")]
    rows = talk(place / "long.jsonl", *[turns] * 24)
    words = ["--data", rows, "--out", "s", "--steps", 3, "--sequence-length", 48]
    status, _, errors = said("sft", "--init", work / "base", *words, "--dtype", "float32")
    assert status == 2
    assert "no conversation can be used" in errors[-1]
    assert "the prompt fills 48 tokens" in errors[-1]
    assert not Path("s").exists()


def test_a_message_of_weight_0_is_not_learnt(place):
    """A message marked "weight": 0 in OpenAI's format was trained on like any other."""
    answers = [("BAD", 0), ("good", 1)]
    messages = []
    for text, weight in answers:
        messages += [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": text, "weight": weight},
        ]
    tokenizer = Tokenizer.byte()
    conversations = read_demonstrations(lines(place / "w.jsonl", {"messages": messages})).items
    record = to_example(tokenizer, conversations[0])
    learnt = [i for i, counts in zip(record.ids, record.loss_mask, strict=True) if counts]
    assert "good" in tokenizer.decode(learnt)
    assert "BAD" not in tokenizer.decode(learnt)


@pytest.mark.parametrize("text", ["[END]", "# ", "null", "~", "---", "- a", "&x"])
def test_stop_is_a_text_and_not_yaml(text):
    """A --stop text that looks like YAML was parsed as YAML, so it changed or vanished."""
    words = ["run", "hi", "--stop", text]
    found = parse(
        SampleSettings, words, verb="sample", about="", examples=[], positional=["path", "prompt"]
    )
    assert found.stop in (text, [text])


def test_a_tokenizer_that_names_its_end_elsewhere(said, place):
    """Documents were joined with nothing between them where the end token had an unusual name."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    raw.train_from_iterator(["some words"] * 9, trainer)
    raw.save("tokenizer.json")
    Path("tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    lines(place / "r.jsonl", *({"text": f"document {i} has words"} for i in range(60)))
    words = ["r.jsonl", "--out", "o", "--tokenizer", "tokenizer.json"]
    status, _, errors = said("data", "prepare", *words)
    assert status == 0, errors
    ids = np.fromfile("o/train-00000.bin", dtype="<u2")
    end = raw.token_to_id("<|im_end|>")
    assert (ids == end).sum() >= 50, errors


def test_a_folder_without_its_hidden_files(said, place):
    """Editors' hidden folders became training text; the ._ files of macOS stopped the command."""
    (place / "in/.ipynb_checkpoints").mkdir(parents=True)
    Path("in/a.md").write_text("the newest version of this note\n", encoding="utf-8")
    old = Path("in/.ipynb_checkpoints/a-checkpoint.md")
    old.write_text("an old version of this note, thrown away\n", encoding="utf-8")
    Path("in/._a.md").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    status, output, errors = said("data", "prepare", "in", "--out", "o", "--tokenizer", "byte")
    assert status == 0, errors
    assert "read 1 document:" in output


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.json"])
def test_rows_under_another_ending_are_rows(said, place, name):
    """The rows of a .ndjson or .json file were trained on as JSON source text."""
    lines(place / name, *({"text": f"document {i} with words"} for i in range(6)))
    status, output, errors = said("data", "prepare", name, "--out", "o", "--tokenizer", "byte")
    assert status == 0, errors
    assert "read 6 documents" in output


@pytest.fixture(scope="module")
def finished(work, tmp_path_factory):
    """A copy of the run, and the words that made it."""
    run = Path(shutil.copytree(work / "run", tmp_path_factory.mktemp("finished") / "run"))
    words = ["--init", work / "base", "--data", work / "data", "--out", run, "--steps", 8]
    return [*words, "--batch-tokens", 192, "--dtype", "float32"]


@pytest.mark.parametrize(
    "option",
    [
        "--microbatch-tokens 48",
        "--keep-checkpoints 1",
        "--save-every 1",
        "--max-skipped-steps 20",
        "--device cpu",
    ],
)
def test_a_run_resumes_with_options_that_change_no_result(said, finished, option):
    """A run stopped for lack of memory or disk could not resume with options that use less."""
    status, _, errors = said("train", *finished, "--eval-every", 4, *option.split())
    assert status == 0, errors


def test_a_run_resumes_with_another_eval_every(said, finished):
    """How often a run is measured changes no weight, and still the resumed run was refused."""
    status, _, errors = said("train", *finished, "--eval-every", 1)
    assert status == 0, errors


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A dataset of characters that ASCII and Latin-1 lack."""
    folder = tmp_path_factory.mktemp("foreign")
    text = "übung \u2014 text long enough to be cut in two\n" * 9
    (folder / "u.txt").write_text(text, encoding="utf-8")
    ok("data", "prepare", folder / "u.txt", "--out", folder / "d", "--tokenizer", "byte")
    return folder / "d"


def test_a_locale_without_utf8(foreign):
    """Under the POSIX locale `data inspect` ended with a UnicodeEncodeError after all the work."""
    plain = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = program("data", "inspect", foreign, env=plain)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_is_not_utf8(foreign, monkeypatch, encoding):
    """Where standard output was not UTF-8, `data inspect` ended with a UnicodeEncodeError."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    assert main(["data", "inspect", str(foreign)]) == 0
    assert "\\u2014" in written.getvalue().decode(encoding)


def test_a_tilde_in_a_settings_file_is_the_home(said, place, monkeypatch):
    """`out: ~/data` in a settings file made a folder called ~ in the current one."""
    home = place / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    Path("a.txt").write_text("the cat sat on a mat\n" * 50, encoding="utf-8")
    Path("c.yaml").write_text("inputs: [a.txt]\nout: ~/data\ntokenizer: byte\n", encoding="utf-8")
    status, _, errors = said("data", "prepare", "--config", "c.yaml")
    assert status == 0, errors
    assert not Path("~").exists()
    assert (home / "data/manifest.json").exists()


def test_messages_on_numbers_show_nothing_of_the_library(said, place):
    """`--steps 1e3` and `out: 007` were answered with the insides of the settings library."""
    words = ["train", "--model", "palm-tiny", "--data", "d"]
    status, _, errors = said(*words, "--out", "o", "--steps", "1e3")
    assert (status, len(errors)) == (2, 1)
    assert "NoneType" not in errors[0]
    Path("c.yaml").write_text("out: 007\n", encoding="utf-8")
    status, _, errors = said(*words, "--steps", 3, "--config", "c.yaml")
    assert (status, len(errors)) == (2, 1)
    assert "PathLike" not in errors[0]
