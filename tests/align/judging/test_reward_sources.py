"""Reward sources of every kind, and one-line errors for wrong ones."""

import json
import math
import sys
import types

import pytest
import torch
from command_line import ok, write_base

from openpalm.align.judging.reward_sources import (
    RewardContext,
    RewardPrompt,
    fingerprint,
    last_user_turn,
    load_reward,
)
from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.base.settings import spell
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, SettingsError, WorkError

BYTES = Tokenizer.byte()
ASKED = [RewardPrompt("2 + 2?", {"answer": "4", "level": 3}), RewardPrompt("Sky?", {"answer": 7})]
READER = RewardContext(BYTES, ASKED, stop_ids(BYTES))


def answer(text, prompt=0, ended=True):
    asked = render(BYTES, [Message("user", ASKED[prompt].question)], add_generation_prompt=True).ids
    end = [BYTES.special_id("<|end|>")] if ended else []
    ids = [*BYTES.encode(text), *end]
    return Completion(prompt, asked, ids, [0.0] * len(ids), ended)


ANSWERS = [answer("4"), answer(" 4 ", ended=False), answer("5"), answer("7", prompt=1)]


@pytest.fixture
def write(tmp_path):
    def write(text, name="pay.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_text_has_no_end_marker():
    assert [READER.text(a) for a in ANSWERS] == ["4", " 4 ", "5", "7"]


def test_the_question_is_the_users_last_turn():
    turns = [Message("system", "s"), Message("user", "a"), Message("assistant", "b")]
    assert last_user_turn([*turns, Message("user", "c")]) == "c"
    assert last_user_turn(turns) == "a"
    assert last_user_turn(turns[:1]) == ""


def test_an_exact_match():
    assert load_reward(["exact"], READER)(ANSWERS) == [1, 1, 0, 1]


def test_a_function_is_given_prompt_answer_and_row(write):
    path = write("def f(prompt, answer, row):\n    return len(prompt) + row.get('level', 0)\n")
    assert load_reward([f"{path}:f"], READER)(ANSWERS) == [9, 9, 9, 4]


def test_sources_are_added_with_their_weights(write):
    path = write("def size(prompt, answer, row):\n    return len(answer)\n")
    total = load_reward([f"0.5*{path}:size", "exact", "-2*exact"], READER)
    assert total(ANSWERS) == [0.5 * n - x for n, x in zip((1, 3, 1, 1), (1, 1, 0, 1), strict=True)]


@pytest.mark.parametrize("value", ["True", "1", "__import__('torch').tensor(1.)"])
def test_numbers_of_any_kind(write, value):
    path = write(f"def f(*_):\n    return {value}\n")
    assert load_reward([f"{path}:f"], READER)(ANSWERS[:1]) == [1.0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('x')", "raised KeyError ('x')"),
        ("return 1 / 0", "raised ZeroDivisionError (division by zero)"),
        ("return float('nan')", "returned nan, which is no finite number,"),
        ("return float('inf')", "returned inf, which is no finite number,"),
        ("return None", "returned None, which is no finite number,"),
        ("return '1'", "returned '1', which is no finite number,"),
        ("return [1]", "returned [1], which is no finite number,"),
        ("return __import__('torch').ones(2)", "which is no finite number,"),
        ("return 'x' * 10**6", "returned 'xxx"),
        ("return 1j", "returned 1j"),
    ],
)
def test_a_function_that_fails_is_named(write, body, says):
    path = write(f"def f(prompt, answer, row):\n    {body}\n")
    for option in ("reward", "gold_reward"):
        with pytest.raises(WorkError) as error:
            load_reward([f"{path}:f"], READER, option)(ANSWERS)
        told = str(error.value)
        assert told.startswith(f"{spell(option)} {path}:f: ")
        assert says in told
        assert "for the completion '4'; correct the function and run the command again" in told
        assert len(told) < 600


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "nothing",
            "--reward nothing: no such run; give the run of a reward model, FILE.py:FUNCTION",
        ),
        ("x*exact", "--reward x*exact: 'x' is no weight; write a number, as in 0.5*SOURCE"),
        ("none.py:f", "--reward none.py:f: no such file; check the path"),
    ],
)
def test_a_source_that_is_none(source, says):
    with pytest.raises(SettingsError) as error:
        load_reward([source], READER)
    assert says in str(error.value)


def test_a_gold_source_that_is_none_is_named_by_its_option():
    with pytest.raises(SettingsError, match=r"^--gold-reward nothing: no such run"):
        load_reward(["nothing"], READER, "gold_reward")
    with pytest.raises(SettingsError, match=r"^--gold-reward none.py:f: no such file"):
        load_reward(["none.py:f"], READER, "gold_reward")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def g(*_): return 1", "has no function f; check the name"),
        ("f = 3", "has no function f; check the name"),
        ("def f(:", "cannot be imported (SyntaxError"),
        ("import nothing_of_that_name", "cannot be imported (ModuleNotFoundError"),
        ("1 / 0", "cannot be imported (ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_used(write, text, says):
    path = write(text)
    with pytest.raises(SettingsError) as error:
        load_reward([f"{path}:f"], READER)
    assert says in str(error.value)
    assert str(path) in str(error.value)


# --- reward models


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A run of `openpalm reward` on the byte tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    base = write_base(folder / "base", context=96)
    pairs = folder / "pairs.jsonl"
    rows = [{"prompt": f"Q{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok(
        *("reward", "--init", base, "--data", pairs, "--out", folder / "run", "--steps", 2),
        *("--batch-tokens", 384, "--dtype", "float32", "--optim.lr", 0.01),
    )
    return folder / "run"


def test_a_reward_model_reads_prompt_and_answer_to_its_last_token(judge):
    found = load_reward([str(judge)], READER)(ANSWERS)
    model = checkpoint.load(judge)
    with torch.no_grad():
        for one, value in zip(ANSWERS, found, strict=True):
            ids = torch.tensor([[*one.prompt_ids, *one.ids]])
            prompt = torch.tensor([len(one.prompt_ids)])
            alone = model.value(ids, torch.ones_like(ids, dtype=torch.bool), prompt)
            assert value == pytest.approx(alone.item(), abs=1e-5)
    assert len(set(found)) == len(found)


def test_a_reward_model_of_another_tokenizer_is_refused(judge):
    other = Tokenizer.train_bpe(["ab ab. " * 99], 300)
    reader = RewardContext(other, ASKED, stop_ids(other))
    with pytest.raises(
        CheckpointError, match=r"^--gold-reward .*: its tokenizer is not the policy's"
    ):
        load_reward([str(judge)], reader, "gold_reward")


def test_a_language_model_is_no_reward_model(tmp_path):
    base = write_base(tmp_path / "base")
    with pytest.raises(CheckpointError, match="is no reward model; train one with"):
        load_reward([str(base)], READER)


# --- classifiers of the hub, by a package that is not needed here


class Classifier:
    """Has the interface of transformers' models; its logits grow with the text."""

    def __init__(self, classes):
        self.classes = classes

    def eval(self):
        return self

    def __call__(self, lengths):
        scales = torch.arange(1, self.classes + 1.0)
        return types.SimpleNamespace(logits=lengths[:, None] * scales)


def package(monkeypatch, classes, fails=None):
    class Auto:
        @staticmethod
        def from_pretrained(name, **how):
            if fails:
                raise fails
            assert how.get("use_safetensors", True) is True
            assert how.get("trust_remote_code", False) is False
            return Classifier(classes)

    class Reads(Auto):
        @staticmethod
        def from_pretrained(name, **how):
            Auto.from_pretrained(name, **how)
            return lambda texts, **_: {"lengths": torch.tensor([float(len(t)) for t in texts])}

    made = types.ModuleType("transformers")
    made.AutoTokenizer, made.AutoModelForSequenceClassification = Reads, Auto
    monkeypatch.setitem(sys.modules, "transformers", made)


def test_a_classifier_pays_its_logit_or_its_last_class(monkeypatch):
    package(monkeypatch, 1)
    assert load_reward(["hub:any"], READER)(ANSWERS) == [1, 3, 1, 1]
    package(monkeypatch, 3)
    for one, found in zip(ANSWERS, load_reward(["hub:any"], READER)(ANSWERS), strict=True):
        n = len(READER.text(one))
        chances = [math.exp(n * k) for k in (1, 2, 3)]
        odds = chances[2] / (chances[0] + chances[1])
        assert found == pytest.approx(math.log(odds), rel=1e-4)


def test_a_classifier_that_is_not_there(monkeypatch):
    package(monkeypatch, 1, OSError("no such repository"))
    with pytest.raises(
        SettingsError, match=r"^--gold-reward hub:any: cannot be read \(no such repo"
    ):
        load_reward(["hub:any"], READER, "gold_reward")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingsError, match=r"^--reward hub:any: needs the package transformers"):
        load_reward(["hub:any"], READER)


def test_a_function_gets_its_own_copy_of_the_row(write):
    path = write("def f(prompt, answer, row):\n    return len(str(row.pop('answer')))\n")
    assert load_reward([f"{path}:f"], READER)(ANSWERS) == [1.0] * 4
    assert ASKED[0].row == {"answer": "4", "level": 3}


@pytest.mark.parametrize(
    ("body", "says"), [("raise SystemExit(3)", "raised SystemExit"), ("return 10**400", "finite")]
)
def test_a_function_that_exits_or_overflows_is_an_error_of_it(write, body, says):
    path = write(f"def f(*_):\n    {body}\n")
    with pytest.raises(WorkError, match=says):
        load_reward([f"{path}:f"], READER)(ANSWERS)


@pytest.mark.parametrize("word", ["{}:f", "1e300*{}:f"])
def test_a_reward_that_float32_cannot_square_is_refused(write, word):
    path = write("def f(*_):\n    return 1e30\n")
    with pytest.raises(WorkError, match="must be a number from"):
        load_reward([word.format(path)], READER)(ANSWERS)


def test_the_fingerprint_follows_the_file(write):
    path = write("def f(*_):\n    return 1")
    word = f"0.5*{path}:f"
    before = fingerprint([word, "exact"])
    assert fingerprint([word, "exact"]) == before
    write("def f(*_):\n    return 2")
    assert fingerprint([word, "exact"]) != before
