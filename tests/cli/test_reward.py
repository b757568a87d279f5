"""`openpalm reward`: pairs or ratings in, a reward model out, and what is refused."""

import json
import shutil

import pytest
import torch
from command_line import rows, write_base

import openpalm
from openpalm.align.pairs.examples import render_completion
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model import lora
from openpalm.model.reward import RewardModel

LOSSES = ["regression", "binned", "hl-gauss", "ordinal"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("reward") / "base", context=64)


def pair(i, **changes):
    row = {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No idea."}
    return {key: value for key, value in (row | changes).items() if value is not None}


def rating(i, **changes):
    value = 1 + i % 4
    row = {"prompt": f"Question {i}?", "response": "x" * (2 * value), "rating": value}
    return {key: value for key, value in (row | changes).items() if value is not None}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", map(pair, range(60)))


@pytest.fixture
def ratings(tmp_path):
    return write(tmp_path / "ratings.jsonl", map(rating, range(80)))


def run(said, base, data, out, *words):
    steps = () if {"--epochs", "--steps"} & {*words} else ("--steps", 16)
    return said(
        *("reward", "--init", base, "--data", data, "--out", out, *steps, "--batch-tokens", 512),
        *("--optim.lr", 0.003, "--dtype", "float32", *words),
    )


def held_out(out):
    return [row for row in rows(out / "metrics.jsonl") if "val_loss" in row]


@torch.no_grad()
def reward_of(path, answer):
    """The reward of one answer, as a caller from Python gets it."""
    model = openpalm.load(path)
    assert isinstance(model, RewardModel)
    record = render_completion(
        Tokenizer.byte(), [Message("user", "Question 7?")], [Message("assistant", answer)]
    )
    return model.value(torch.tensor([record.ids])).item()


def test_pairs_teach_what_is_preferred(said, base, pairs, tmp_path):
    status, _, errors = run(said, base, pairs, tmp_path / "out", "--ensemble-size", 2)
    assert status == 0, errors
    (row,) = held_out(tmp_path / "out")
    assert row["val_accuracy"] == row["val_agreement"] == 1
    assert row["val_calibration_error"] < 0.3
    assert row["val_spread"] > 0
    steps = [row for row in rows(tmp_path / "out" / "metrics.jsonl") if "grad_norm" in row]
    assert steps[-1]["pairs"] == 16 * 4
    assert steps[-1]["loss"] < 0.3 < steps[0]["loss"]
    assert reward_of(tmp_path / "out", "Yes, 7.") > reward_of(tmp_path / "out", "No idea.")
    assert "agreement 1.000" in "".join(errors)


@pytest.mark.parametrize("loss", LOSSES)
def test_ratings_teach_numbers(said, base, ratings, tmp_path, loss):
    words = ["--loss", loss, "--steps", 40]
    status, _, errors = run(said, base, ratings, tmp_path / "out", *words)
    assert status == 0, errors
    row = held_out(tmp_path / "out")[-1]
    assert row["val_spearman"] > 0.9
    assert row["val_squared_error"] < 0.7  # guessing the mean: 1.25
    assert reward_of(tmp_path / "out", "x" * 8) > reward_of(tmp_path / "out", "x" * 2) + 1


def test_mean_state_and_marks_can_be_chosen(said, base, pairs, tmp_path):
    words = [
        "--pooling",
        "mean",
        "--segment-embeddings",
        "true",
        "--centring-coef",
        0.01,
        "--margin-scale",
        1,
    ]
    assert run(said, base, pairs, tmp_path / "out", *words)[0] == 0
    model = openpalm.load(tmp_path / "out")
    assert isinstance(model, RewardModel)
    assert model.reward.read == "mean"
    assert model.marks is not None
    assert model.marks.abs().max() > 0, "they learn"


def test_ties_are_in_the_agreement(said, base, tmp_path):
    """With the rewards of answers that differ in nothing, a tie is told from a difference."""

    def record(i, payload, texts):
        return {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "candidates": [{"text": text} for text in texts],
            "kind": "compare",
            "payload": payload,
            "author": "ann",
            "author_kind": "person",
            "created": "2026-01-31T12:00:00Z",
        }

    found = [
        record(i, {"better": 0, "worse": 1, "strength": 1}, ("Yes.", "No idea.")) for i in range(40)
    ]
    found += [record(40 + i, {"tie": [0, 1]}, ("Yes.", "Yes.")) for i in range(40)]
    data = write(tmp_path / "records.jsonl", found)
    status, _, errors = run(said, base, data, tmp_path / "out")
    assert status == 0
    assert any(
        line.endswith("40 left out: tie (lines 41, 42, 43, 44, 45, 46, 47, 48 and 32 more)")
        for line in errors
    )
    row = held_out(tmp_path / "out")[-1]
    assert row["val_accuracy"] == row["val_agreement"] == 1
    found[-1]["candidates"][1]["text"] = "No idea."  # a tie that the rewards do not see
    data = write(tmp_path / "other.jsonl", found)
    assert run(said, base, data, tmp_path / "other")[0] == 0
    row = held_out(tmp_path / "other")[-1]
    assert (row["val_accuracy"], row["val_agreement"]) == (1, 0.75)


def test_resumed_is_uninterrupted(said, base, ratings, tmp_path):
    words = ["--loss", "ordinal", "--ensemble-size", 2, "--save-every", 4, "--keep-checkpoints", 0]
    out = tmp_path / "out"
    assert run(said, base, ratings, out, *words)[0] == 0
    whole = rows(out / "metrics.jsonl")
    kept = openpalm.load(out).state_dict()
    for step in (12, 16):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08}")
    assert run(said, base, ratings, out, *words)[0] == 0
    again = openpalm.load(out).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    losses = [
        [row["loss"] for row in rs if "loss" in row] for rs in (whole, rows(out / "metrics.jsonl"))
    ]
    assert losses[0] == losses[1]
    status, output, _ = run(said, base, ratings, out, *words)
    assert (status, "nothing to do" in output) == (0, True)
    status, _, errors = run(said, base, ratings, out, *words[:2], "--ensemble-size", 3, *words[4:])
    assert status == 2
    assert "another --ensemble-size (2, now 3)" in errors[-1]


def test_an_adapter_learns_with_the_head(said, base, pairs, tmp_path):
    assert run(said, base, pairs, tmp_path / "out", "--lora.rank", 2)[0] == 0
    model, before = openpalm.load(tmp_path / "out"), openpalm.load(base).state_dict()
    assert lora.is_attached(model)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert held_out(tmp_path / "out")[-1]["val_accuracy"] == 1


def test_training_goes_on_from_a_reward_model(said, base, ratings, tmp_path):
    first = ["--loss", "binned", "--pooling", "mean", "--ensemble-size", 2]
    assert run(said, base, ratings, tmp_path / "first", *first)[0] == 0
    words = ["--loss", "hl-gauss", "--steps", 1, "--optim.lr", 1e-9]
    assert run(said, tmp_path / "first", ratings, tmp_path / "next", *words)[0] == 0
    old, new = openpalm.load(tmp_path / "first"), openpalm.load(tmp_path / "next")
    assert isinstance(old, RewardModel)
    assert isinstance(new, RewardModel)
    assert new.reward == old.reward
    assert torch.allclose(new.reward_head, old.reward_head, atol=1e-6)
    status, _, errors = run(said, tmp_path / "first", ratings, tmp_path / "x", "--loss", "ordinal")
    assert status == 2
    assert "trains ordinal heads, but --init has a binned head" in errors[-1]


def test_verbs_that_need_a_language_model_say_so(said, base, pairs, work, tmp_path):
    reward = tmp_path / "reward"
    assert run(said, base, pairs, reward)[0] == 0
    train = ["--init", reward, "--out", tmp_path / "x", "--steps", 1, "--data"]
    for words in (
        ["sample", reward, "hi"],
        ["chat", reward],
        ["serve", reward, "--port", 0],
        ["eval", reward, "--data", work / "data"],
        ["train", *train, work / "data"],
        ["sft", *train, pairs],
        ["dpo", *train, pairs],
    ):
        status, _, errors = said(*words)
        assert (status, len(errors)) == (2, 1), words
        assert "is a reward model, which scores completions and generates none" in errors[0]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "change", "says"),
    [
        ((), {"rejected": None}, 'pairs.jsonl:61: field "rejected" is missing'),
        (("--ensemble-size", 0), {}, "--ensemble-size 0: must be 1 to 64"),
        (("--loss", "mse"), {}, "--loss"),
        (
            ("--loss", "regression"),
            {},
            "this row is prompt, chosen, rejected, which `openpalm dpo` reads",
        ),
    ],
)
def test_pairs_that_cannot_be_used(said, base, pairs, tmp_path, words, change, says):
    with pairs.open("a") as file:
        file.write(json.dumps(pair(1, **change)) + "\n")
    status, _, errors = run(said, base, pairs, tmp_path / "out", *words)
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "change", "says"),
    [
        ((), {"rating": True}, 'ratings.jsonl:81: field "rating" is True'),
        ((), {"rating": 2.5}, "rating 2.5 is none of the 4 values from 1 to 4"),
        (("--axis", "wit"), {}, "--axis 'wit'"),
    ],
)
def test_ratings_that_cannot_be_used(said, base, ratings, tmp_path, words, change, says):
    with ratings.open("a") as file:
        file.write(json.dumps(rating(1, **change)) + "\n")
    status, _, errors = run(said, base, ratings, tmp_path / "out", "--loss", "ordinal", *words)
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


def test_answers_that_do_not_fit_are_left_out_and_told(said, base, ratings, tmp_path):
    with ratings.open("a") as file:
        file.write(json.dumps(rating(1, response="long " * 40)) + "\n")
    words = ["--loss", "regression", "--steps", 1]
    status, _, errors = run(said, base, ratings, tmp_path / "out", *words)
    assert status == 0
    assert "1 left out: longer than 64 tokens, see --sequence-length (line 81)" in "\n".join(errors)
