"""`openpalm VERB ...`: finds the verb's file, and turns every error into one line and a status.

Imports nothing heavy: a verb's module is imported when it is called, and imports torch only
after its settings were read, so that every --help answers at once.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from openpalm.errors import OpenPalmError

# verb -> (module with `run(argv)`, what it does)
VERBS = {
    "quickstart": ("quickstart", "the whole line in minutes on this machine, no download"),
    "data": ("data", "prepare text as token shards, join parts of them, inspect them"),
    "train": ("train", "train a model from scratch, or on from a checkpoint"),
    "sft": ("sft", "supervised fine-tuning on conversations"),
    "dpo": ("dpo", "train on preferences: dpo, cdpo, ipo, simpo, orpo, kto"),
    "reward": ("reward", "train a reward model on pairs or ratings of completions"),
    "merge-lora": ("merge_lora", "fold a low-rank adapter into the weights"),
    "ppo": ("ppo", "train a checkpoint on its own answers by a reward, with a critic"),
    "grpo": ("grpo", "the same without a critic, in groups: grpo, dr-grpo, dapo, rloo"),
    "best-of-n": ("best_of_n", "sample n completions of each prompt and keep the best"),
    "judge": ("judge", "AI feedback: compare completions by the principles of a constitution"),
    "doctor": ("doctor", "check model, data and reward before an alignment run"),
    "sample": ("sample", "continue a prompt with a trained model"),
    "chat": ("chat", "talk with a fine-tuned model"),
    "serve": ("serve", "answer over HTTP: the OpenAI API, and a page to chat"),
    "eval": ("eval", "loss and bits per byte of a checkpoint on prepared data"),
    "convert": ("convert", "read and write checkpoints of other projects"),
    "models": ("models", "list the model sizes: parameters, memory, FLOPs a token"),
    "report": ("report", "draw a run as one HTML page"),
}

DATA_VERBS = ("prepare", "build", "inspect")
CONTINUES = {"train", "sft", "dpo", "reward", "ppo", "grpo", "data", "best-of-n", "judge"}
"""verbs that keep what they have done, for the same command to continue"""

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
    _write_anything()
    try:
        status = _without_verb(argv)
        if status is None:
            try:  # the verb is called from here: no frame stands between main and its code
                import_module(f"openpalm.cli.{VERBS[argv[0]][0]}").run(argv[1:])
                status = 0
            except BrokenPipeError:
                raise
            except (Exception, KeyboardInterrupt) as error:
                status = _explain(error, argv[0])
        sys.stdout.flush()
        return status
    except OSError as error:
        # Standard output refused; keep the interpreter from trying again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader (head, less) that has seen enough is no failure.
        return 0 if isinstance(error, BrokenPipeError) else _unexpected(error)


def _write_anything() -> None:
    """A character that the terminal's encoding lacks is written as an escape, never an error."""
    for stream in (sys.stdout, sys.stderr):
        # Something else may stand in for the streams, as a notebook's do.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _without_verb(argv: Sequence[str]) -> int | None:
    """Answers --help, --version and what is no verb; None if there is a verb to run."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {verb:<12}{about}" for verb, (_, about) in VERBS.items())
        print(USAGE.format(verbs=listing))
        return 0 if argv else 2
    if argv[0] == "--version":
        from openpalm import __version__

        print(f"openpalm {__version__}")
        return 0
    if argv[0] not in VERBS:
        return _complain(f"unknown verb {argv[0]}; {_meant(argv[0])}", 2)
    return None


def _explain(error: BaseException, verb: str) -> int:
    """Prints the help that was asked for, or the error as one line; returns the exit status."""
    from openpalm.base.settings import HelpRequested

    if isinstance(error, HelpRequested):
        print(error)
        return 0
    if isinstance(error, OpenPalmError):
        return _complain(str(error), error.exit_status)
    if isinstance(error, KeyboardInterrupt):
        more = "; run the same command again to continue" if verb in CONTINUES else ""
        return _complain(f"interrupted{more}", 128 + signal.SIGINT)
    return _unexpected(error)


def _meant(verb: str) -> str:
    near = get_close_matches(verb.lower().replace("_", "-"), [*VERBS, *DATA_VERBS], n=1)
    if not near:
        return "see `openpalm --help`"
    return f"did you mean {'data ' * (near[0] in DATA_VERBS)}{near[0]}?"


def _unexpected(error: BaseException) -> int:
    """What nobody foresaw: the operating system refusing, or a bug of ours."""
    if os.environ.get("OPENPALM_TRACEBACK"):
        raise error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" at {error.filename}" if error.filename else ""
        return _complain(f"the disk is full{where}; free some space and repeat the command", 1)
    if isinstance(error, OSError):
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return _complain(f"{reason} (set OPENPALM_TRACEBACK=1 to see where)", 1)


def _complain(message: str, status: int) -> int:
    print(f"openpalm: error: {' '.join(message.split())}", file=sys.stderr)
    return status
