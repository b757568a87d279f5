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
from typing import NoReturn

from openpalm.errors import OpenPalmError

# verb -> (module with `run(argv)`, what it does)
VERBS = {
    "quickstart": ("quickstart", "the whole line in minutes on this machine, no download"),
    "data": ("data", "prepare text as token shards, join parts of them, inspect them"),
    "train": ("train", "train a model from scratch, or on from a checkpoint"),
    "sft": ("sft", "fine-tune a checkpoint on conversations"),
    "dpo": ("dpo", "train a checkpoint on pairs or verdicts: dpo, ipo, simpo, orpo, kto"),
    "reward": ("reward", "train a reward model on pairs of answers or on ratings"),
    "merge-lora": ("merge_lora", "fold a low-rank adapter into the weights"),
    "ppo": ("ppo", "train a checkpoint on its own answers by a reward, with a critic"),
    "grpo": ("grpo", "the same without a critic, in groups: grpo, dr-grpo, dapo, rloo"),
    "best-of-n": ("best_of_n", "draw n answers to each prompt and keep the best"),
    "judge": ("judge", "compare answers by written principles, as preference records"),
    "doctor": ("doctor", "check a model, its data and rewards before an alignment run"),
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


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns its exit status: 0 done, 1 failed, 2 a wrong request."""
    _write_anything()
    try:
        status = _main(argv)
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


def _main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {verb:<12}{about}" for verb, (_, about) in VERBS.items())
        print(USAGE.format(verbs=listing))
        return 0 if argv else 2
    if argv[0] == "--version":
        from openpalm import __version__

        print(f"openpalm {__version__}")
        return 0
    return _guarded(argv[0], argv[1:])


def _guarded(verb: str, argv: Sequence[str]) -> int:
    from openpalm.base.settings import HelpRequested

    try:
        if verb not in VERBS:
            return _complain(f"unknown verb {verb}; {_meant(verb)}", 2)
        import_module(f"openpalm.cli.{VERBS[verb][0]}").run(argv)
        return 0
    except HelpRequested as text:
        print(text)
        return 0
    except OpenPalmError as error:
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        more = "; run the same command again to continue" if verb in CONTINUES else ""
        return _complain(f"interrupted{more}", 128 + signal.SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        return _unexpected(error)


def _meant(verb: str) -> str:
    near = get_close_matches(verb.lower().replace("_", "-"), [*VERBS, *DATA_VERBS], n=1)
    if not near:
        return "see `openpalm --help`"
    return f"did you mean {'data ' * (near[0] in DATA_VERBS)}{near[0]}?"


def _unexpected(error: Exception) -> int:
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


def entry() -> NoReturn:
    """The console script."""
    status = main(sys.argv[1:])
    sys.exit(status)
