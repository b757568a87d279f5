"""The public Python API: load, generate, score, train and convert as functions; see docs/python.md.

Importing this module imports no torch: each function imports what it needs when it is called.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from openpalm.base.launcher import adopt_slurm, speaks
from openpalm.base.settings import plain
from openpalm.base.typed import build, home
from openpalm.cli.convert import ConvertSettings
from openpalm.errors import CheckpointError, SettingsError
from openpalm.train.config import PretrainSettings

if TYPE_CHECKING:
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.generate.defaults import SamplingDefaults
    from openpalm.model.transformer import Transformer

SLOTS = 16
"""Sequences in one batch of the engine."""

_directories: "WeakKeyDictionary[Transformer, Path]" = WeakKeyDictionary()
"""The checkpoint directory that each model came from: it holds the model's tokenizer."""


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    allow: Callable[[str], None] | None = None,
) -> "Transformer":
    """The model of a run (its newest checkpoint), a checkpoint or a hub name, in eval mode.

    dtype: float32 or bfloat16. A checkpoint of a reward model gives a RewardModel. `allow`, if
    given, is called with the message when weights are not finite, instead of raising. Raises
    CheckpointError for a path without an intact checkpoint, SettingsError for an unknown dtype.
    """
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import weights_path

    directory = checkpoint.resolve(weights_path(str(path)))
    model = checkpoint.load(directory, device, dtype, allow=allow)
    _directories[model] = directory
    return model


def generate(
    model: "Transformer | str | Path",
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    tokenizer: "Tokenizer | str | Path | None" = None,
) -> list[str]:
    """One completion per prompt, without the prompt; all prompts are generated in one batch.

    model: what `load` returned, or its path. A sampling value that is not given is the
    checkpoint's own, else temperature 0.8, all tokens. tokenizer: the checkpoint's own if not
    given; a path is a tokenizer.json. Raises SettingsError for a wrong value, CheckpointError for
    a reward model or a checkpoint without a tokenizer.
    """
    from openpalm.generate.engine import Engine
    from openpalm.generate.request import Request
    from openpalm.generate.sampling import Sampling, completion_seed
    from openpalm.generate.streaming import document_ends, prompt_ids

    if max_new_tokens < 1:
        raise SettingsError(f"max_new_tokens {max_new_tokens}: must be 1 or more")
    model, tokenizer, defaults = _language_model(model, tokenizer)
    how = defaults.override(temperature, top_p, top_k)
    stops = document_ends(tokenizer)
    requests = [
        # A seed of its own: equal prompts get different completions.
        Request(
            prompt_ids(tokenizer, prompt),
            max_new_tokens,
            Sampling(how.temperature, how.top_k, how.top_p, completion_seed(seed, index)),
            stops,
        )
        for index, prompt in enumerate(_texts(prompts))
    ]
    completions = Engine(model, slots=SLOTS).completions(requests)
    return [tokenizer.decode(ids) for ids in completions]


def score(
    model: "Transformer | str | Path",
    texts: str | Sequence[str],
    *,
    tokenizer: "Tokenizer | str | Path | None" = None,
) -> list[list[float]]:
    """Log-probability in nats of every token of every text, given the tokens before it.

    A text is scored as a document: its first token follows the end-of-text token, as in training.
    For a tokenizer without that token the first token has no score. The other arguments and
    errors are those of `generate`.
    """
    from openpalm.generate.engine import Engine

    model, tokenizer, _ = _language_model(model, tokenizer)
    start = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    sequences = [[*start, *tokenizer.encode(text)] for text in _texts(texts)]
    return [row.tolist() for row in Engine(model, slots=SLOTS).score(sequences)]


def train(settings: PretrainSettings | None = None, /, **options: Any) -> Path:
    """What `openpalm train` does; returns the run directory, for `load` and `generate`.

    Give PretrainSettings, or its fields as keyword arguments: `train(model="palm-tiny",
    data="data/docs", out="runs/tiny", steps=200, optim={"lr": 1e-3})`; with both, the options
    replace fields of the settings. The same call resumes a run that was stopped. Raises
    SettingsError for a wrong option, DataError or CheckpointError for inputs that cannot be
    used, TrainingError when the run diverges. Under torchrun every process must call it; the first
    one prints.
    """
    given = {name: plain(value) for name, value in options.items()}
    if settings is None:
        settings = build(PretrainSettings, given)
    elif options:
        settings = build(PretrainSettings, plain(settings) | given)
    from openpalm.cli.train import pretrain

    with _speaking_once():
        pretrain(settings)
    return settings.out


@contextmanager
def _speaking_once() -> Iterator[None]:
    """Of several processes only the first prints in the block."""
    adopt_slurm()
    with ExitStack() as stack:
        if not speaks():
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def convert(src: str | Path, dst: str | Path, **options: Any) -> Path:
    """What `openpalm convert` does; returns the directory that was written.

    options: from_ (the project), to, era and config, as in `openpalm convert --help`. What was
    read and assumed is printed on standard error. Raises CheckpointError for a file that cannot
    be converted, SettingsError for a wrong option.
    """
    from openpalm.cli.convert import convert as convert_checkpoint

    settings = build(ConvertSettings, {"src": src, "dst": dst, **options})
    convert_checkpoint(settings, lambda line: print(line, file=sys.stderr))
    return settings.dst


def _texts(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def _language_model(
    model: "Transformer | str | Path", tokenizer: "Tokenizer | str | Path | None"
) -> "tuple[Transformer, Tokenizer, SamplingDefaults]":
    """The model, its tokenizer and its sampling defaults."""
    from openpalm.cli.common import tokenizer_of
    from openpalm.generate.defaults import SamplingDefaults, sampling_defaults
    from openpalm.model.reward import RewardModel

    if isinstance(model, str | Path):
        model = load(model)
    if isinstance(model, RewardModel):
        raise CheckpointError(
            "a reward model scores completions and generates no text; take a language model"
        )
    directory = _directories.get(model)
    if isinstance(tokenizer, str | Path):
        tokenizer = tokenizer_of(directory or Path(), Path(home(str(tokenizer))))
    elif tokenizer is None and directory is not None:
        tokenizer = tokenizer_of(directory)
    if tokenizer is None:
        where = directory or "this model did not come from openpalm.load"
        raise CheckpointError(f"{where}: has no tokenizer; give one with tokenizer=")
    return model, tokenizer, sampling_defaults(directory) if directory else SamplingDefaults()
