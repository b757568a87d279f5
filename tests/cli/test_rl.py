"""`openpalm grpo` and `openpalm ppo`: rewards rise, gamed runs stop, failures lose nothing."""

import json

import pytest
import torch
from command_line import TINY, ok, rows, write_base

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model.config import RewardConfig
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import Transformer, initialise

CLOCK = {"elapsed_s", "completions_per_s", "mfu"}
FUNCTIONS = """
def letters(prompt, answer, row):
    return 10 * sum(c.islower() for c in answer) / 12

def some_letters(prompt, answer, row):
    return 10 - abs(letters(prompt, answer, row) - 4)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("rollouts") / "base")


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl", [f"Q{i}" for i in range(12)])


@pytest.fixture
def pay(tmp_path):
    path = tmp_path / "pay.py"
    path.write_text(FUNCTIONS)
    return path


def write_prompts(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def run(said, base, prompts, out, *words, verb="grpo", reward=None):
    given = () if reward is None else ("--reward", reward)
    steps = () if "--steps" in words else ("--steps", 12)
    return said(
        *(verb, "--init", base, "--data", prompts, "--out", out, "--max-new-tokens", 12),
        *("--optim.lr", 0.03, *given, *steps, *words),
    )


def steps_of(out):
    return [row for row in rows(out / "metrics.jsonl") if "loss" in row]


def untimed(out):
    return [
        {name: value for name, value in row.items() if name not in CLOCK}
        for row in rows(out / "metrics.jsonl")
    ]


def weights(out):
    return dict(checkpoint.load(out).named_parameters())


def one_line(errors):
    """The only line of complaint; notes before a run do not count."""
    complaints = [line for line in errors if line.startswith("openpalm: error:")]
    assert len(complaints) == 1, errors
    assert errors[-1] == complaints[0]
    assert "Traceback" not in "".join(errors)
    assert "OPENPALM_TRACEBACK" not in complaints[0], "an unexpected error"
    return complaints[0].removeprefix("openpalm: error: ")


# --- rewards rise

GROUPS = [
    ("--advantage", "grpo"),
    ("--advantage", "dr-grpo", "--kl", "k2"),
    ("--advantage", "dapo", "--kl", "k3"),
    ("--advantage", "rloo", "--rollout-memory-bytes", 0),
    ("--epochs-per-rollout", 2, "--minibatches", 2, "--rollout-dtype", "bfloat16", "--steps", 32),
]
CRITICS = [
    *[("--critic", kind) for kind in ("shared", "detached", "separate")],
    ("--critic", "separate", "--value-bins", 21, "--value-range", 10),
]


@pytest.mark.parametrize(
    ("verb", "words"),
    [*[("grpo", words) for words in GROUPS], *[("ppo", words) for words in CRITICS]],
    ids=str,
)
def test_every_variant_raises_the_reward(said, base, prompts, pay, tmp_path, verb, words):
    size = ("--prompts-per-rollout", 8, "--num-completions", 8) if verb == "ppo" else ()
    out = tmp_path / "out"
    status, _, errors = run(
        said, base, prompts, out, *size, *words, verb=verb, reward=f"{pay}:letters"
    )
    assert status == 0, errors
    logged = steps_of(out)
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert logged[0]["reward"] < 1.5
    assert logged[-1]["reward"] > 2
    assert logged[-1]["kl"] > 1
    if "--minibatches" not in words and verb == "grpo":
        assert all(row["ratio"] == pytest.approx(1, abs=1e-5) for row in logged)
    model = checkpoint.load(out)
    assert type(model) is Transformer
    assert not any(name.startswith("critic") for name in dict(model.named_parameters()))
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []
    evaluations = [row for row in rows(out / "metrics.jsonl") if "val_reward" in row]
    assert evaluations[-1]["val_reward"] > 2
    shown = rows(out / "samples.jsonl")[-1]["samples"]
    assert {"prompt", "text"} == shown[0].keys()


def test_the_policy_can_be_sampled(said, base, prompts, pay, tmp_path):
    out = tmp_path / "out"
    words = ("--steps", 1, "--prompts-per-rollout", 2)
    assert run(said, base, prompts, out, *words, verb="ppo", reward=f"{pay}:letters")[0] == 0
    status, output, errors = said("sample", out, "Q1", "--max-new-tokens", 3)
    assert status == 0, errors
    assert output
    status, output, _ = run(said, base, prompts, out, *words, verb="ppo", reward=f"{pay}:letters")
    assert (status, "nothing to do" in output) == (0, True)


@pytest.mark.parametrize("verb", ["grpo", "ppo"])
def test_an_adapter_alone_learns(said, base, prompts, pay, tmp_path, verb):
    out = tmp_path / "out"
    words = ("--lora.rank", 4, "--steps", 3)
    status, _, errors = run(said, base, prompts, out, *words, verb=verb, reward=f"{pay}:letters")
    assert status == 0, errors
    before, after = weights(base), weights(out)
    assert all(torch.equal(after[name], before[name]) for name in before)
    learnt = [p for name, p in after.items() if name.endswith(".b")]
    assert learnt
    assert all(p.any() for p in learnt)
    assert steps_of(out)[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps_of(out)[-1]["kl"] > 1e-4


@pytest.mark.parametrize("verb", ["grpo", "ppo"])
def test_dropout_is_off(said, base, prompts, pay, tmp_path, verb):
    """A model that has some learns as one that has none, and keeps it in its config."""
    runs = []
    for dropout in (0.0, 0.5):
        out = tmp_path / f"{dropout}"
        words = (
            "--arch.dropout",
            dropout,
            "--steps",
            3,
            "--epochs-per-rollout",
            2,
            "--kl-coef",
            0.1,
        )
        assert run(said, base, prompts, out, *words, verb=verb, reward=f"{pay}:letters")[0] == 0
        assert checkpoint.load_config(checkpoint.resolve(out)).dropout == dropout
        runs.append((untimed(out), weights(out)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(each, runs[1][1][name]) for name, each in runs[0][1].items())


def test_fewer_prompts_than_a_rollout_takes(said, base, pay, tmp_path):
    prompts = write_prompts(tmp_path / "few.jsonl", ["A", "B", "C"])
    out = tmp_path / "out"
    assert run(said, base, prompts, out, "--steps", 2, reward=f"{pay}:letters")[0] == 0
    assert steps_of(out)[-1]["completions"] == 2 * 8 * 8


def test_a_temperature_leaves_the_ratio_at_one(said, base, prompts, pay, tmp_path):
    out = tmp_path / "out"
    words = ("--temperature", 0.7, "--steps", 2)
    assert run(said, base, prompts, out, *words, reward=f"{pay}:letters")[0] == 0
    for row in steps_of(out):
        assert row["ratio"] == pytest.approx(1, abs=1e-5)


# --- gamed


def check_stopped(status, errors, out, keep):
    """Status 1, and the named checkpoint exists, is whole, and is older than the last step."""
    assert status == 1
    line = one_line(errors)
    named = line.rpartition("the best checkpoint is ")[2]
    assert line.startswith("step ")
    stopped = int(line.split()[1].rstrip(":"))
    best = int(named.rpartition("step-")[2])
    checkpoint.load(named)
    assert best < stopped
    assert len(checkpoint.steps(out)) <= keep + 1
    evaluations = {row["step"]: row for row in rows(out / "metrics.jsonl") if "val_reward" in row}
    return line, evaluations, best, stopped


OFTEN = ("--eval-every", 2, "--save-every", 2, "--keep-checkpoints", 1, "--steps", 40)


def test_a_reward_that_is_gamed_stops_the_run(said, base, prompts, pay, tmp_path):
    """Letters are wanted in up to a third of a completion; the reward counts all of them."""
    out = tmp_path / "out"
    gold = (
        "--gold-reward",
        f"{pay}:some_letters",
        "--early-stopping.gold-drop",
        3,
        "--optim.lr",
        0.015,
    )
    status, _, errors = run(said, base, prompts, out, *OFTEN, *gold, reward=f"{pay}:letters")
    line, evaluations, best, stopped = check_stopped(status, errors, out, keep=1)
    assert "the reward is being gamed" in line
    assert evaluations[best]["val_gold"] == max(row["val_gold"] for row in evaluations.values())
    assert evaluations[stopped]["val_reward"] > evaluations[best]["val_reward"]
    assert best < stopped - 2, "more checkpoints were made than are kept"


def test_a_limit_names_a_checkpoint_within_it(said, base, prompts, pay, tmp_path):
    """The reward is highest beyond the limit: that checkpoint is not the best."""
    out = tmp_path / "out"
    limit = ("--early-stopping.max-kl", 3)
    status, _, errors = run(said, base, prompts, out, *OFTEN, *limit, reward=f"{pay}:letters")
    line, evaluations, best, stopped = check_stopped(status, errors, out, keep=1)
    assert "nats from the reference, beyond --early-stopping.max-kl 3" in line
    assert evaluations[best]["val_kl"] <= 3 < evaluations[stopped]["val_kl"]


def test_a_limit_that_no_checkpoint_is_within(said, base, prompts, pay, tmp_path):
    out = tmp_path / "out"
    status, _, errors = run(
        said, base, prompts, out, *OFTEN, "--early-stopping.max-length", 1, reward=f"{pay}:letters"
    )
    assert status == 1
    assert "tokens per completion, beyond --early-stopping.max-length 1; no checkpoint" in one_line(
        errors
    )


@pytest.mark.parametrize(("verb", "critic"), [("grpo", False), ("ppo", True)])
def test_the_optimizer_of_pretraining_is_kept(said, run, prompts, pay, tmp_path, verb, critic):
    """A critic has no state in the checkpoint of --init and starts new."""
    more = ("--keep-optimizer", "--steps", 1, "--reward", f"{pay}:letters")
    words = ("--init", run, "--data", prompts, "--out", tmp_path / "out", "--max-new-tokens", 12)
    status, _, errors = said(verb, *words, *more)
    assert status == 0, errors
    assert any("such as critic." in line for line in errors) == critic
    state = checkpoint.load_train_state(checkpoint.resolve(tmp_path / "out")).tensors
    counts = {name: float(value) for name, value in state.items() if name.endswith("/step")}
    assert {c for n, c in counts.items() if "/critic." not in n} == {9.0}


# --- failures lose nothing

LATER = """
calls = 0

def letters(prompt, answer, row):
    global calls
    calls += 1
    if calls > 150:
        {body}
    return 10 * sum(c.islower() for c in answer) / 12
"""


UNTIL = ("--steps", 4, "--advantage", "dapo")


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """A run whose reward never failed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts = write_prompts(folder / "prompts.jsonl", [f"Q{i}" for i in range(12)])
    (folder / "pay.py").write_text(LATER.format(body="pass"))
    words = ("--init", base, "--data", prompts, "--reward", f"{folder / 'pay.py'}:letters")
    more = ("--max-new-tokens", 12, "--optim.lr", 0.03, *UNTIL)
    ok("grpo", *words, *more, "--out", folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('level')", "raised KeyError ('level') for the completion"),
        ("return float('nan')", "returned nan, which is no finite number, for the completion"),
        ("return float('inf')", "returned inf, which is no finite number, for the completion"),
        ("return 'many'", "returned 'many', which is no finite number, for the completion"),
        ("return None", "returned None, which is no finite number, for the completion"),
    ],
)
def test_a_reward_that_fails_later_loses_nothing(
    said, base, prompts, pay, undisturbed, tmp_path, body, says
):
    """Saved up to there; corrected, the run ends as if it had never failed."""
    out = tmp_path / "out"
    pay.write_text(LATER.format(body=body))
    status, _, errors = run(said, base, prompts, out, *UNTIL, reward=f"{pay}:letters")
    assert status == 1
    line = one_line(errors)
    assert line.startswith(f"--reward {pay}:letters: {says}")
    assert "run the command again: the run continues" in line
    done = checkpoint.steps(out)[-1].name
    assert done == "step-00000002", "two rollouts of 64 completions were scored"
    pay.write_text(LATER.format(body="pass"))
    status, _, errors = run(said, base, prompts, out, *UNTIL, reward=f"{pay}:letters")
    assert status == 0, errors
    assert untimed(out) == untimed(undisturbed)
    ours, theirs = weights(out), weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_reward_that_fails_at_once(said, base, prompts, pay, tmp_path):
    pay.write_text("def letters(prompt, answer, row):\n    return row['level']\n")
    out = tmp_path / "out"
    status, _, errors = run(said, base, prompts, out, reward=f"{pay}:letters")
    assert status == 1
    assert "raised KeyError ('level')" in one_line(errors)
    pay.write_text(FUNCTIONS)
    assert run(said, base, prompts, out, reward=f"{pay}:letters")[0] == 0


@pytest.mark.parametrize("verb", ["grpo", "ppo"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--reward: missing; give FILE.py:FUNCTION or a reward model's run"),
        (("--reward", "nothing"), "--reward nothing: no such run"),
        (("--reward", "exact", "--gold-reward", "nothing"), "--gold-reward nothing: no such run"),
        (("--reward", "exact", "--gold-reward", "x.py:f"), "--gold-reward x.py:f: no such file"),
        (("--reward", "none*exact"), "--reward none*exact: 'none' is no weight"),
        (
            ("--reward", "exact", "--max-new-tokens", 48),
            "no prompt can be used: longer than 0 tokens, which --max-new-tokens leaves of 48 (12",
        ),
        (("--reward", "exact", "--minibatches", 7), "--minibatches 7: must divide"),
        (("--reward", "exact", "--target-kl", 1, "--kl", "k3"), "--target-kl: adapts --kl"),
        (
            ("--reward", "exact", "--early-stopping.gold-drop", 1),
            "--early-stopping.gold-drop: needs --gold-reward",
        ),
        (
            ("--reward", "exact", "--early-stopping.max-kl", -1),
            "--early-stopping.max-kl -1.0: must be 0 or more",
        ),
    ],
)
def test_a_wrong_request_starts_nothing(said, base, prompts, tmp_path, verb, words, says):
    out = tmp_path / "out"
    status, _, errors = run(said, base, prompts, out, *words, verb=verb)
    assert status == 2
    assert says in one_line(errors)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "prompts.jsonl"),
        ("\n\n", "prompts.jsonl"),
        ('{"text": "no prompt"}\n', "prompts.jsonl:1"),
        (
            '{"prompt": ""}\n',
            "no prompt can be used: empty prompt (1; line 1)",
        ),
        ('{"prompt": "a"}\n{"prompt": 5}\n', "prompts.jsonl:2"),
        ("not json\n", "prompts.jsonl:1"),
    ],
)
def test_data_without_prompts(said, base, prompts, tmp_path, text, says):
    prompts.write_text(text)
    status, _, errors = run(said, base, prompts, tmp_path / "out", reward="exact")
    assert status == 2
    assert says in one_line(errors)
    assert not (tmp_path / "out").exists()


def test_prompts_that_do_not_fit_are_reported(said, base, prompts, pay, tmp_path):
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 20}) + "\n")
    out = tmp_path / "out"
    status, _, errors = run(said, base, prompts, out, "--steps", 1, reward=f"{pay}:letters")
    assert status == 0
    assert (
        "1 left out: longer than 36 tokens, which --max-new-tokens leaves of 48 (line 13)"
        in "\n".join(errors)
    )


def test_prompts_of_which_none_fits(said, base, tmp_path):
    prompts = write_prompts(tmp_path / "long.jsonl", ["long " * 20] * 3)
    status, _, errors = run(said, base, prompts, tmp_path / "out", reward="exact")
    assert status == 2
    assert (
        "longer than 36 tokens, which --max-new-tokens leaves of 48 (3; lines 1, 2, 3)"
        in one_line(errors)
    )


def test_a_reward_model_of_another_tokenizer(said, base, prompts, tmp_path):
    model = RewardModel(TINY, RewardConfig())
    initialise(model, 0)
    initialise_heads(model, 0)
    Tokenizer.train_bpe(["ab ab. " * 99], 265).save(tmp_path / "other.json")
    judge = tmp_path / "judge"
    checkpoint.save(judge, model, tokenizer_json=(tmp_path / "other.json").read_text())
    status, _, errors = run(said, base, prompts, tmp_path / "out", reward=judge)
    assert status == 2
    assert f"--reward {judge}: its tokenizer is not the policy's" in one_line(errors)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_as_the_reward(said, base, prompts, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "Q?", "chosen": "abc", "rejected": "123"}
    pairs.write_text(f"{json.dumps(row)}\n" * 8)
    ok(
        *("reward", "--init", base, "--data", pairs, "--out", tmp_path / "judge", "--steps", 2),
        *("--batch-tokens", 192, "--dtype", "float32"),
    )
    status, _, errors = run(
        said, base, prompts, tmp_path / "out", "--steps", 2, reward=tmp_path / "judge"
    )
    assert status == 0, errors
    assert all(row["reward_std"] > 0 for row in steps_of(tmp_path / "out"))


def test_a_reference_that_moved_is_refused(said, prompts, pay, tmp_path):
    """--init names a run that was trained further: the KL would be to another reference."""
    parent = tmp_path / "parent"
    (parent / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        write_base(parent / "checkpoints" / f"step-{step:08}", clear=step == 2)
        status, _, errors = run(
            said, parent, prompts, tmp_path / "out", "--steps", 2, reward=f"{pay}:letters"
        )
        assert status == (0 if step == 1 else 2)
    assert "another --init" in one_line(errors)
