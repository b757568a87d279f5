"""`openpalm score`: the same numbers as the models give one conversation at a time."""

import json

import pytest
import torch
from command_line import ok, rows, write_base

from openpalm.align.pairs.examples import render_completion
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer

TEXTS = ["good", "", "a much longer answer", "x" * 60, "bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, a reward model with two heads, and completions; one is too long for both."""
    folder = tmp_path_factory.mktemp("score")
    base = write_base(folder / "base")
    pairs = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in pairs)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
    words = ["--init", base, "--data", folder / "pairs.jsonl", "--out", folder / "reward"]
    ok("reward", *words, "--steps", 2, "--ensemble-size", 2, "--dtype", "float32")
    given = [{"id": n, "prompt": f"q{n}", "completion": text} for n, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in given)
    (folder / "given.jsonl").write_text(lines, encoding="utf-8")
    return folder


def scored(folder, model):
    ok("score", folder / model, "--data", folder / "given.jsonl", "--out", folder / "out.jsonl")
    return rows(folder / "out.jsonl")


def rendered(folder, row):
    directory = checkpoint.resolve(folder / "base")
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    prompt, answer = Message("user", row["prompt"]), Message("assistant", row["completion"])
    return render_completion(tokenizer, [prompt], [answer])


def test_rewards_of_a_reward_model(folder):
    found = scored(folder, "reward")
    assert [(row["id"], row["completion"]) for row in found] == list(enumerate(TEXTS))
    model = checkpoint.load(checkpoint.resolve(folder / "reward"))
    for row in found:
        example = rendered(folder, row)
        if len(row["completion"]) == 60:
            assert row["reward"] is row["reward_spread"] is None
            continue
        ids = torch.tensor([example.ids])
        lengths = torch.tensor([example.loss_mask.index(True)])
        with torch.no_grad():
            expected = model.value(ids, None, lengths), model.spread(ids, None, lengths)
        assert row["reward"] == pytest.approx(expected[0].item(), abs=1e-5)
        assert row["reward_spread"] == pytest.approx(expected[1].item(), abs=1e-5)


def test_log_probabilities_of_a_language_model(folder):
    found = scored(folder, "base")
    model = checkpoint.load(folder / "base")
    for row in found:
        if len(row["completion"]) == 60:
            assert row["log_prob"] is None
            continue
        example = rendered(folder, row)
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits = model.logits(ids)[0].log_softmax(dim=-1)
        total = sum(
            logits[place - 1, token].item()
            for place, token in enumerate(example.ids)
            if example.loss_mask[place]
        )
        assert row["log_prob"] == pytest.approx(total, abs=1e-4)


def test_a_row_without_a_completion(said, folder, tmp_path):
    (tmp_path / "given.jsonl").write_text('{"prompt": "q"}\n', encoding="utf-8")
    words = ("--data", tmp_path / "given.jsonl", "--out", tmp_path / "o.jsonl")
    status, _, errors = said("score", folder / "base", *words)
    assert status == 2
    assert errors[-1] == 'openpalm: error: --data: a row has no text in the field "completion"'
