"""The program: no arguments, --version, --help, errors, pipes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import program

import openpalm
from openpalm.cli.main import VERBS, main

CONSOLE_SCRIPT = Path(sys.executable).with_name("openpalm")


def test_no_arguments_show_the_verbs_and_are_a_wrong_request():
    done = program()
    assert done.returncode == 2
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    assert "examples:" in done.stdout


def test_the_console_script_is_the_module():
    if not CONSOLE_SCRIPT.exists():
        pytest.skip("openpalm is not installed beside this Python")
    for words in ([], ["--version"], ["sample", "--help"], ["nonsense"]):
        # Without `env` a child gets what readline put into the C environment: COLUMNS.
        how = {"capture_output": True, "text": True, "env": dict(os.environ)}
        script = subprocess.run([CONSOLE_SCRIPT, *words], **how)
        module = program(*words)
        assert (script.returncode, script.stdout, script.stderr) == (
            module.returncode,
            module.stdout,
            module.stderr,
        )


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_is_no_error(said, word):
    status, output, errors = said(word)
    assert (status, errors) == (0, [])
    assert output.startswith("usage: openpalm VERB")


def test_version(said):
    assert said("--version") == (0, f"openpalm {openpalm.__version__}\n", [])


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("trian", "did you mean train?"),
        ("best_of_n", "did you mean best-of-n?"),
        ("Chat", "did you mean chat?"),
        ("prepare", "did you mean data prepare?"),
        ("zzz", "see `openpalm --help`"),
    ],
)
def test_unknown_verb(said, given, hint):
    status, output, errors = said(given)
    assert (status, output) == (2, "")
    assert errors == [f"openpalm: error: unknown verb {given}; {hint}"]


@pytest.mark.parametrize("verb", [*VERBS, "data prepare", "data inspect"])
def test_every_help_shows_options_and_examples(said, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, output, errors = said(*verb.split(), "--help")
    assert (status, errors) == (0, [])
    assert output.startswith(f"usage: openpalm {verb}")
    if verb != "data":
        examples = output.partition("examples:\n")[2].splitlines()
        assert any(line.startswith(f"  openpalm {verb}") for line in examples)
    assert all(len(line) <= 100 for line in output.splitlines())
    for leak in ("null", "Optional[", "<class", "typing.", "CONFIG"):
        assert leak not in output


HEAVY = {
    *("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "matplotlib", "rich"),
    *("fastapi", "uvicorn", "datasets", "pyarrow", "sympy", "yaml"),
}
MODULES = 180
"""of the standard library and ours, that all helps together may import; torch brings 1,500"""


def test_every_help_imports_little():
    """What makes a help answer at once, on any machine and under any load."""
    verbs = [*(verb for verb in VERBS if verb != "data"), "data prepare", "data build"]
    lines = [[*verb.split(), "--help"] for verb in (*verbs, "data inspect", "")]
    script = (
        "import sys\nfrom openpalm.cli.main import main\n"
        f"assert [main(line) for line in {lines}] == [0] * {len(lines)}\n"
        "print('\\n', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    assert "openpalm.model" not in modules  # it makes every preset
    assert len(modules) < MODULES


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "data"])
def test_an_unknown_option_is_one_line(said, verb):
    status, output, errors = said(verb, "--no-such-option", "3")
    assert (status, output) == (2, "")
    assert len(errors) == 1
    assert errors[0].startswith("openpalm: error: unknown option --no-such-option; ")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["models", "--json"]])
def test_a_closed_pipe_is_silent(words):
    """As `| head -1` leaves it: whatever is written finds no reader."""
    process = subprocess.Popen(
        [sys.executable, "-m", "openpalm", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert errors == b""


def test_piped_to_head():
    line = '"$0" -m openpalm models --json | head -1'
    done = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", ["--help", "train --help", "models", "models --json"])
@pytest.mark.parametrize("buffering", ["", "1"])
def test_output_to_a_full_disk_fails_in_one_line(words, buffering):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "openpalm", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONUNBUFFERED": buffering, "PATH": "/usr/bin:/bin"},
        )
    assert done.returncode == 1
    assert done.stderr.startswith("openpalm: error: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_bug_of_ours_is_one_line_and_says_how_to_see_more(said, monkeypatch):
    def broken(argv):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("openpalm.cli.models.run", broken)
    status, _, errors = said("models")
    assert status == 1
    assert errors == [
        "openpalm: error: ZeroDivisionError: division by zero "
        "(set OPENPALM_TRACEBACK=1 to see where)"
    ]
    monkeypatch.setenv("OPENPALM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["models"])


def test_an_interrupt_is_one_line(said, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("openpalm.cli.models.run", interrupted)
    assert said("models") == (130, "", ["openpalm: error: interrupted"])


@pytest.mark.parametrize("verb", ["train", "data", "judge", "best-of-n"])
def test_an_interrupt_of_what_continues_says_so(said, monkeypatch, verb):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"openpalm.cli.{VERBS[verb][0]}.run", interrupted)
    wanted = "openpalm: error: interrupted; run the same command again to continue"
    assert said(verb) == (130, "", [wanted])


@pytest.mark.parametrize(
    ("verb", "data"),
    [
        ("train", "directory that `openpalm data prepare` wrote"),
        ("sft", "conversations: a .jsonl of messages"),
        ("dpo", "pairs: a .jsonl of prompt, chosen and rejected"),
        ("reward", "bradley-terry: pairs"),
        ("ppo", "prompts: a .jsonl with a prompt"),
        ("grpo", "prompts: a .jsonl with a prompt"),
    ],
)
def test_the_help_of_a_training_verb_says_what_applies(said, monkeypatch, verb, data):
    monkeypatch.setenv("COLUMNS", "1000")
    help_text = said(verb, "--help")[1]
    (line,) = [line for line in help_text.splitlines() if line.startswith("  --data ")]
    assert data in line
    assert "with --init a check only: the checkpoint decides" in help_text
    assert "with --init the checkpoint decides all but xpos_base and dropout" in help_text
    assert "used only with --lora.rank above 0" in help_text


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("ppo", "estimator k1"),
        ("ppo", "(log r)^2 / 2 of a completion (k2) or r - 1 - log r of each token (k3)"),
        ("ppo", "a Gaussian around the return"),
        ("reward", "a Gaussian around the rating"),
        ("sample", "adapter_model.safetensors"),
        ("quickstart", "the other 18 % is not enforced: data and tokenizer"),
    ],
)
def test_help_explains_its_terms(said, monkeypatch, verb, words):
    monkeypatch.setenv("COLUMNS", "1000")
    assert words in said(verb, "--help")[1]


def test_a_verb_of_one_process_is_not_started_on_several(monkeypatch, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, errors = said("serve", "runs/one")
    assert status == 2
    assert errors == [
        "openpalm: error: WORLD_SIZE (2): serve runs in one process; start it without torchrun"
    ]


def test_a_rank_without_a_number_of_processes_silences_nothing(monkeypatch, said):
    """A shell may have it from another program."""
    monkeypatch.setenv("RANK", "3")
    status, output, _ = said("models")
    assert status == 0
    assert "palm-tiny" in output
    status, _, errors = said("sample")
    assert status == 2
    assert len(errors) == 1
    assert errors[0].startswith("openpalm: error: ")
