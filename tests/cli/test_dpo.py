"""`openpalm dpo`: every loss learns the preference; errors in one line."""

import gzip
import json

import pytest
from command_line import rows, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("dpo") / "base", context=96)


def pair(i, **changes):
    row = {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No idea."}
    return {key: value for key, value in (row | changes).items() if value is not None}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(60)))
    return path


def run(said, base, data, out, *words):
    steps = () if "--epochs" in words else ("--steps", 12)
    return said(
        *("dpo", "--init", base, "--data", data, "--out", out, *steps, "--batch-tokens", 768),
        *("--optim.lr", 0.003, "--dtype", "float32", *words),
    )


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "ipo", "simpo", "orpo"])
def test_every_loss_learns_what_is_preferred(said, base, pairs, tmp_path, loss):
    status, _, errors = run(said, base, pairs, tmp_path / "out", "--loss", loss)
    assert status == 0, errors
    logged = rows(tmp_path / "out" / "metrics.jsonl")
    held_out = [row for row in logged if "val_accuracy" in row]
    assert held_out[-1]["val_accuracy"] == 1
    assert held_out[-1]["val_reward_margin"] > 0
    steps = [row for row in logged if "loss" in row]
    assert steps[-1]["pairs"] == 12 * 4
    assert steps[-1]["loss"] < steps[0]["loss"]
    if loss == "dpo":
        assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize(("loss", "at_first"), [("dpo", 0.6931), ("kto", 0.5)])
def test_dropout_is_off(said, base, pairs, tmp_path, loss, at_first):
    """The policy equals its reference at first; with dropout it would not."""
    words = ("--loss", loss, "--arch.dropout", 0.5, "--steps", 1)
    assert run(said, base, pairs, tmp_path / "out", *words)[0] == 0
    logged = [row for row in rows(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert logged[0]["loss"] == pytest.approx(at_first, abs=1e-4)
    assert logged[0]["reward_margin"] == pytest.approx(0, abs=1e-5)


@pytest.fixture
def thumbs(tmp_path):
    path = tmp_path / "thumbs.jsonl"
    rows = [
        {"prompt": f"Question {i}?", "completion": answer, "label": good}
        for i in range(60)
        for answer, good in ((f"Yes, {i}.", True), ("No idea.", False))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["thumbs", "pairs"])
def test_kto_learns_what_is_good(said, base, tmp_path, form, request):
    """Of labelled completions, and of pairs: one desirable and one undesirable completion each."""
    data = request.getfixturevalue(form)
    status, _, errors = run(said, base, data, tmp_path / "out", "--loss", "kto", "--beta", 0.5)
    assert status == 0, errors
    logged = rows(tmp_path / "out" / "metrics.jsonl")
    held_out = [row for row in logged if "val_accuracy" in row]
    assert held_out[-1]["val_accuracy"] == 1
    assert held_out[-1]["val_reward_margin"] > 0
    steps = [row for row in logged if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-3)
    assert steps[-1]["loss"] < 0.45
    assert steps[-1]["completions"] == 12 * 8


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"completion": 7}, 'field "completion" is 7'),
        ({"prompt": 7}, 'field "prompt" is 7'),
        ({"label": "yes"}, "thumbs.jsonl:121"),
        ({"completion": None}, "thumbs.jsonl:121"),
    ],
)
def test_a_bad_label_is_named(said, base, thumbs, tmp_path, row, says):
    good = {"prompt": "Why?", "completion": "So.", "label": True}
    with thumbs.open("a") as file:
        file.write(json.dumps(good | row) + "\n")
    status, _, errors = run(said, base, thumbs, tmp_path / "out", "--loss", "kto")
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (True, "all desirable; without undesirable ones"),
        (False, "all undesirable; without desirable ones"),
    ],
)
def test_labels_of_one_kind_alone_are_pointed_out(said, base, thumbs, tmp_path, label, says):
    """The run completes nevertheless."""
    lines = [json.loads(line) for line in thumbs.read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps(row) + "\n" for row in lines if row["label"] is label]
    thumbs.write_text("".join(kept), encoding="utf-8")
    words = ("--loss", "kto", "--steps", 2)
    status, _, errors = run(said, base, thumbs, tmp_path / "out", *words)
    assert status == 0, errors
    assert any(
        line.startswith("dpo: 60 labelled completions, ") and says in line for line in errors
    )
    losses = [row["loss"] for row in rows(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(0.5, abs=1e-3)
    assert len(losses) == 2


def test_completions_of_one_prompt_are_refused(said, base, tmp_path):
    path = tmp_path / "one.jsonl"
    row = {"prompt": "Why?", "completion": "So.", "label": True}
    path.write_text(f"{json.dumps(row)}\n" * 3)
    status, _, errors = run(said, base, path, tmp_path / "out", "--loss", "kto")
    assert status == 2
    assert "give at least two prompts" in errors[-1]


def test_the_same_command_again_does_nothing_and_another_beta_is_refused(
    said, base, pairs, tmp_path
):
    assert run(said, base, pairs, tmp_path / "out")[0] == 0
    status, output, _ = run(said, base, pairs, tmp_path / "out")
    assert (status, "nothing to do" in output) == (0, True)
    status, _, errors = run(said, base, pairs, tmp_path / "out", "--beta", 0.5)
    assert status == 2
    assert "another --beta (not set, now 0.5)" in errors[-1]


def test_a_reference_that_moved_is_refused(said, base, pairs, tmp_path):
    """--init names a run that was continued: the reference would change on resume."""
    parent = tmp_path / "parent"
    (parent / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        write_base(parent / "checkpoints" / f"step-{step:08}", context=96, clear=step == 2)
        status, _, errors = run(said, parent, pairs, tmp_path / "out")
        assert status == (0 if step == 1 else 2)
    assert "another --init" in errors[-1]


def test_pairs_that_do_not_fit_are_left_out_and_told(said, base, pairs, tmp_path):
    with pairs.open("a") as file:
        file.write(json.dumps(pair(99, chosen="long " * 40)) + "\n")
    status, _, errors = run(said, base, pairs, tmp_path / "out")
    assert status == 0
    assert "1 left out: longer than 97 tokens, see --sequence-length (line 61)" in "\n".join(errors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rejected": None}, 'pairs.jsonl:61: field "rejected" is missing'),
        ({"prompt": 7}, 'field "prompt" is 7'),
        ({"context": ["Mine."]}, 'field "context" is a list; it must be a text'),
        (
            {"messages": [{"role": "user", "content": "Other."}]},
            "field 'messages' would not reach the model, which is given chosen,",
        ),
        ({"chosen": 5}, "chosen"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_begun(said, base, pairs, tmp_path, change, says):
    with pairs.open("a") as file:
        file.write(json.dumps(pair(1, **change)) + "\n")
    status, _, errors = run(said, base, pairs, tmp_path / "out")
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_rows_that_teach_nothing_are_left_out_and_told(said, base, pairs, tmp_path, loss):
    with pairs.open("a") as file:
        for change in ({"rejected": "Yes, 1."}, {"chosen": " "}, {"prompt": ""}, {"id": 7}):
            file.write(json.dumps(pair(1) | change) + "\n")
    status, _, errors = run(said, base, pairs, tmp_path / "out", "--loss", loss)
    assert status == 0
    told = [line.partition("pairs.jsonl: ")[2] for line in errors if "pairs.jsonl: " in line]
    assert told == [
        "1 left out: equal completions (line 61)",
        "1 left out: empty completion (line 62)",
        "1 left out: empty prompt (line 63)",
        "1 row carries fields that are not used: 'id' (1)",
    ]


def test_prompts_beyond_the_context(said, base, tmp_path):
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(pair(1, prompt="why " * 99)).encode()))
    status, _, errors = run(said, base, path, tmp_path / "out")
    assert status == 2
    assert "no pair can be used: longer than 97 tokens, see --sequence-len" in errors[-1]


def test_init_is_needed(said, pairs, tmp_path):
    status, _, errors = said(
        *("dpo", "--model", "palm-tiny", "--data", pairs, "--out", tmp_path / "o", "--steps", 1)
    )
    assert status == 2
    assert "--init is missing: name the run or checkpoint" in errors[-1]
