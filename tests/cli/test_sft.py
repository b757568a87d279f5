"""`openpalm sft`: what it reads, packed or not, one task or several; resumed and refused."""

import json

import pytest
from command_line import rows, write_base

COLOURS = {"red": "hot", "blue": "cold", "green": "calm", "grey": "dull"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("sft") / "base", context=96)


def write(path, *given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def run(said, base, data, out, *words):
    steps = () if {"--epochs", "--steps"} & {*words} else ("--steps", 150)
    return said(
        *("sft", "--init", base, "--data", data, "--out", out, *steps, "--batch-tokens", 192),
        *("--optim.lr", 0.01, "--dtype", "float32", *words),
    )


def losses(out):
    return [row["loss"] for row in rows(out / "metrics.jsonl") if "loss" in row]


FORMS = {
    "alpaca": lambda q, a: {"instruction": "Feel.", "input": q, "output": a},
    "completion": lambda q, a: {"prompt": q, "completion": a},
    "sharegpt": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_learnt(said, base, tmp_path, form):
    data = write(tmp_path / "data.jsonl", *(FORMS[form](q, a) for q, a in COLOURS.items()))
    status, _, errors = run(said, base, data, tmp_path / "out")
    assert status == 0, errors
    found = losses(tmp_path / "out")
    assert sum(found[-5:]) / 5 < 0.2 < 5 < found[0]


@pytest.fixture
def colours(tmp_path):
    made = [FORMS["completion"](f"{i} {q}", a) for i in range(20) for q, a in COLOURS.items()]
    return write(tmp_path / "colours.jsonl", *made)


def test_packed_takes_more_conversations_a_step(said, base, colours, tmp_path):
    for name, words in {"apart": (), "packed": ("--pack",)}.items():
        status, _, errors = run(said, base, colours, tmp_path / name, "--epochs", 2, *words)
        assert status == 0, errors
    apart, packed = (rows(tmp_path / name / "metrics.jsonl") for name in ("apart", "packed"))
    assert max(row["step"] for row in packed) * 3 < max(row["step"] for row in apart)
    tokens = [max(row.get("tokens", 0) for row in found) for found in (apart, packed)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.1)


def test_a_packed_run_goes_on_where_it_stopped(said, base, colours, tmp_path):
    """The losses of a run that began again from its checkpoint are those of one that did not."""
    words = ("--pack", "--steps", 12, "--save-every", 5, "--keep-checkpoints", 0)
    for name in ("whole", "killed"):
        assert run(said, base, colours, tmp_path / name, *words)[0] == 0
    checkpoints = tmp_path / "killed" / "checkpoints"
    for step in (10, 12):
        (checkpoints / f"step-{step:08}").rename(tmp_path / f"gone-{step}")
    assert run(said, base, colours, tmp_path / "killed", *words)[0] == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    status, _, errors = run(said, base, colours, tmp_path / "killed", "--steps", 12)
    assert (status, "another --" in errors[-1]) == (2, True)


MIXTURE = """
tasks:
  - data: colours.jsonl
    weight: 1
    templates: [{prompt: "Feel {prompt}", answer: "{completion}!"}]
  - {data: words.jsonl, weight: 3}
"""


@pytest.mark.parametrize("pack", [(), ("--pack",)])
def test_a_mixture(said, base, colours, tmp_path, pack):
    write(tmp_path / "words.jsonl", *({"question": f"{q}?", "answer": 7} for q in COLOURS))
    data = tmp_path / "mixture.yaml"
    data.write_text(MIXTURE)
    out = tmp_path / "out"
    status, _, errors = run(said, base, data, out, "--steps", 30, *pack)
    assert status == 0, errors
    assert "colours.jsonl: 20 draws an epoch of 76 examples" in "\n".join(errors)
    assert any("val_loss" in row for row in rows(out / "metrics.jsonl"))
    found = losses(out)
    assert found[-1] < found[0] / 3
    write(tmp_path / "words.jsonl", {"question": "new?", "answer": 7})
    status, _, errors = run(said, base, data, out, "--steps", 30, *pack)
    assert (status, "another --data" in errors[-1]) == (2, True)


def test_what_is_not_used_is_told(said, base, tmp_path):
    good = FORMS["alpaca"]("q", "a")
    data = write(tmp_path / "data.jsonl", good, good | {"output": ""})
    status, _, errors = run(said, base, data, tmp_path / "out", "--steps", 1)
    assert status == 0
    assert "data.jsonl: 1 left out: empty completion (line 2)" in errors[0]


def test_prompts_that_fill_the_window_teach_nothing(said, base, tmp_path):
    long = FORMS["completion"]("why " * 400, "yes")
    data = write(tmp_path / "data.jsonl", long, long)
    status, _, errors = run(said, base, data, tmp_path / "out", "--steps", 1)
    assert (status, len(errors)) == (2, 1)
    assert "no conversation can be used: the prompt fills" in errors[0]
    assert "(2; lines 1, 2)" in errors[0]
    assert not (tmp_path / "out").exists()
    data = write(tmp_path / "data.jsonl", long, FORMS["completion"]("why", "yes"))
    status, _, errors = run(said, base, data, tmp_path / "out", "--steps", 1)
    assert status == 0
    assert "1 left out: the prompt fills" in errors[0]
    [row] = losses(tmp_path / "out")
    assert row > 0


def test_plain_continuation(said, base, tmp_path):
    data = write(tmp_path / "data.jsonl", *(FORMS["completion"](q, a) for q, a in COLOURS.items()))
    words = ("--template", "none")
    assert run(said, base, data, tmp_path / "out", *words)[0] == 0
    status, output, _ = said("sample", tmp_path / "out", "green", "--temperature", 0)
    assert (status, output) == (0, "greencalm\n")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "data.jsonl:1: this row is prompt, ch"),
        ({"prompt": "q", "completion": "a", "label": True}, "`openpalm dpo --loss kto` reads"),
        ({"instruction": "q", "output": 7}, 'data.jsonl:1: field "output" is 7'),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "no conversation can be used: no assistant",
        ),
    ],
)
def test_a_bad_file_is_refused_and_nothing_is_begun(said, base, tmp_path, row, says):
    data = write(tmp_path / "data.jsonl", row)
    status, _, errors = run(said, base, data, tmp_path / "out")
    assert (status, len(errors)) == (2, 1)
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_bad_template_is_refused(said, base, colours, tmp_path):
    data = tmp_path / "mixture.yaml"
    data.write_text(MIXTURE.replace("{prompt}", "{prompt.__class__}"))
    status, _, errors = run(said, base, data, tmp_path / "out")
    assert (status, len(errors)) == (2, 1)
    assert "tasks[0]: templates[0]: prompt:" in errors[0]
    assert "is not the plain name of a field" in errors[0]
