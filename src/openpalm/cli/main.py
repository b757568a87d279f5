"""The `openpalm` command: runs a verb, prints an error as one line, returns the exit status.

A verb's module is imported when the verb is called, and imports torch only after it has read its
settings, so that --help is quick.
"""

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from openpalm.base.launcher import adopt_slurm, speaks
from openpalm.errors import OpenPalmError

# verb -> (module with `run(argv)`, description)
VERBS = {
    "quickstart": (
        "quickstart",
        "prepare, train, fine-tune and align in minutes, without a download",
    ),
    "data": ("data", "prepare text as token shards or blocks; join, inspect, push a dataset"),
    "train": ("train", "train a model from scratch or from a checkpoint"),
    "sft": ("sft", "fine-tune a checkpoint on conversations"),
    "dpo": ("dpo", "train on preferences offline: dpo, ipo, simpo, orpo, kto"),
    "reward": ("reward", "train a reward model on pairs of completions or on ratings"),
    "score": ("score", "score completions: rewards, or log-probabilities"),
    "merge-lora": ("merge_lora", "merge a LoRA adapter into the weights"),
    "ppo": ("ppo", "train on rewards of sampled completions, with a critic"),
    "grpo": ("grpo", "the same with groups in place of a critic: grpo, dr-grpo, dapo, rloo"),
    "best-of-n": ("best_of_n", "sample n completions of each prompt and keep the best"),
    "judge": ("judge", "compare completions by written principles, write preferences"),
    "doctor": ("doctor", "check a model, its data and rewards before an alignment run"),
    "sample": ("sample", "continue a prompt with a trained model"),
    "chat": ("chat", "chat with a fine-tuned model in the terminal"),
    "serve": ("serve", "serve a model over HTTP: the OpenAI API and a chat page"),
    "feedback": ("feedback", "collect human feedback in the browser, train on it, promote models"),
    "simulate-labelers": (
        "simulate_labelers",
        "judge items of a feedback project as labelers of known taste and noise",
    ),
    "eval": ("eval", "measure a model: loss, bits per byte of a text, lm-evaluation-harness tasks"),
    "convert": ("convert", "read and write checkpoints of other projects"),
    "push": ("push", "upload a model to the Hugging Face Hub"),
    "copy": ("copy", "copy a checkpoint, run or dataset to or from s3://, gs://, hf://"),
    "plan": ("plan", "memory, step time, days and cost of a training on many GPUs, by layout"),
    "models": ("models", "list the model sizes: parameters, memory, FLOPs per token"),
    "report": ("report", "show runs as one HTML page or as curves in the terminal"),
}

_OTHERS_WAIT_S = 3.0
DATA_VERBS = ("prepare", "build", "blocks", "inspect", "push")
CONTINUES = {"train", "sft", "dpo", "reward", "ppo", "grpo", "data", "best-of-n", "judge"}
"""verbs that save progress, so that the same command continues after an interruption"""

PARALLEL = {"train", "sft", "dpo", "reward", "ppo", "grpo"}
"""verbs that torchrun or srun may start on several processes"""

USAGE = """usage: openpalm VERB [options]

Train a PaLM-style language model from text, align it, serve it.

verbs:
{verbs}

`openpalm VERB --help` shows a verb's options and examples; `openpalm --version` the version.

examples:
  openpalm quickstart
  openpalm data prepare builtin:python-docs --out data/docs --tokenizer bpe:4096
  openpalm train --model palm-tiny --data data/docs --out runs/tiny --steps 200
  openpalm sample runs/tiny "The following example"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, by default the process's own; returns its exit status.

    0: done. 1: the work failed. 2: the request was wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    _escape_unencodable()
    if argv and argv[0] in PARALLEL:  # srun may start several runs of other verbs
        adopt_slurm()
    if not speaks():
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        status = _without_verb(argv)
        if status is None:
            try:
                import_module(f"openpalm.cli.{VERBS[argv[0]][0]}").run(argv[1:])
                status = 0
            except BrokenPipeError:
                raise
            except (Exception, KeyboardInterrupt) as error:
                status = _explain(error, argv[0])
        sys.stdout.flush()
        return status
    except OSError as error:
        # Writing to standard output failed: the interpreter must not flush it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A closed pipe (head, less) is not a failure.
        return 0 if isinstance(error, BrokenPipeError) else _unexpected(error)


def _escape_unencodable() -> None:
    """Makes the streams write characters outside the terminal's encoding as escapes."""
    for stream in (sys.stdout, sys.stderr):
        # A notebook replaces the streams by objects of its own.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _without_verb(argv: Sequence[str]) -> int | None:
    """Handles --help, --version and an unknown verb; None if there is a verb to run."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {verb:<19}{about}" for verb, (_, about) in VERBS.items())
        print(USAGE.format(verbs=listing))
        return 0 if argv else 2
    if argv[0] == "--version":
        from openpalm import __version__

        print(f"openpalm {__version__}")
        return 0
    if argv[0] not in VERBS:
        return _print_error(f"unknown verb {argv[0]}; {_suggestion(argv[0])}", 2)
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and argv[0] not in PARALLEL and "--help" not in argv:
        return _print_error(
            f"WORLD_SIZE ({processes}): {argv[0]} runs in one process; start it without torchrun", 2
        )
    return None


def _explain(error: BaseException, verb: str) -> int:
    """Prints a requested --help, or the error as one line; returns the exit status."""
    from openpalm.base.settings import HelpRequested

    if isinstance(error, HelpRequested):
        print(error)
        return 0
    if isinstance(error, OpenPalmError):
        return _print_error(str(error), error.exit_status)
    if isinstance(error, KeyboardInterrupt):
        if not speaks():  # all processes are, and the first one says so
            return 128 + signal.SIGINT
        more = "; run the same command again to continue" if verb in CONTINUES else ""
        return _print_error(f"interrupted{more}", 128 + signal.SIGINT)
    return _unexpected(error)


def _suggestion(verb: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(verb.lower().replace("_", "-"), [*VERBS, *DATA_VERBS], n=1)
    if not near:
        return "see `openpalm --help`"
    return f"did you mean {'data ' * (near[0] in DATA_VERBS)}{near[0]}?"


def _unexpected(error: BaseException) -> int:
    """An error without a message of its own: from the operating system, or a bug."""
    if os.environ.get("OPENPALM_TRACEBACK"):
        raise error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" at {error.filename}" if error.filename else ""
        return _print_error(
            f"the disk is full{where}; free some space and run the command again", 1
        )
    if isinstance(error, OSError):
        return _print_error(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return _print_error(f"{reason} (set OPENPALM_TRACEBACK=1 to see where)", 1)


def _print_error(message: str, status: int) -> int:
    line = " ".join(message.split())
    if speaks():
        print(f"openpalm: error: {line}", file=sys.stderr)
        return status
    # Most errors are the same on every process, and the first one's line is enough: torchrun ends
    # the others while they wait. An error of this process alone is printed.
    time.sleep(_OTHERS_WAIT_S)
    print(f"openpalm: error on process {os.environ['RANK']}: {line}", file=sys.__stderr__)
    return status
