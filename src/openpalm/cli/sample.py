"""`openpalm sample`: a trained model continues a prompt."""

import json
import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openpalm.base.settings import parse
from openpalm.cli.model_options import GenerationOptions
from openpalm.errors import SettingsError, count_of

if TYPE_CHECKING:
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.generate.defaults import SamplingDefaults
    from openpalm.generate.engine import Request


@dataclass(frozen=True)
class SampleSettings(GenerationOptions):
    """What to continue, with which model, how."""

    path: str
    """run, checkpoint or hub name"""
    prompt: str | None = None
    """text to continue"""
    max_new_tokens: int | None = None
    """tokens to add at most; not set is 128"""
    stop: list[str] | str | None = None
    """text that ends the answer and is not part of it; several as a JSON list"""
    chat: bool = False
    """put the prompt to a fine-tuned model as a user's message"""
    stream: bool = False
    """print text as it comes"""
    json: bool = False
    """print one JSON object: prompt, text, tokens, finish"""
    model: str | None = None
    """hub name in place of PATH, as the original program spells it"""
    seq_len: int | None = None
    """tokens of prompt and answer together, in place of --max-new-tokens"""
    filter_thres: float | None = None
    """share of the vocabulary to drop, in place of --top-k: k = ceil((1 - T) V)"""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
        if self.max_new_tokens is not None and self.seq_len is not None:
            raise SettingsError("give --max-new-tokens or --seq_len, not both")
        if self.filter_thres is not None and not 0 <= self.filter_thres < 1:
            raise SettingsError(f"--filter_thres {self.filter_thres}: must be in [0, 1)")
        if self.filter_thres is not None and self.top_k:
            raise SettingsError("give --top-k or --filter_thres, not both")
        if self.model is None and self.prompt is None:
            raise SettingsError("missing prompt; say `openpalm sample PATH PROMPT`")
        if self.model is not None and self.prompt is not None:
            raise SettingsError(f"give {self.path} or --model {self.model}, not both")

    @property
    def source(self) -> str:
        return self.model or self.path

    @property
    def text(self) -> str:
        """The prompt; with --model it is the only word beside the options."""
        return self.path if self.prompt is None else self.prompt


def run(argv: Sequence[str]) -> None:
    settings = parse(
        SampleSettings,
        argv,
        verb="sample",
        about="Continues PROMPT with the model at PATH.",
        examples=[
            'openpalm sample runs/tiny "The following example"',
            'openpalm sample runs/tiny "Return the" --temperature 0 --max-new-tokens 40 --json',
            'openpalm sample runs/quickstart/sft --chat "What does shutil.copytree do?" --stream',
            'openpalm sample --model palm_410m_8k_v0 "Once upon a time" --seq_len 256',
        ],
        positional=["path", "prompt"],
    )
    from rich.console import Console

    from openpalm.cli.common import serving_model
    from openpalm.generate.streaming import Completion, stream

    engine, tokenizer, defaults = serving_model(settings.source, settings)
    request = _request(settings, tokenizer, engine.model.config.vocab_size, defaults)
    stops = [settings.stop] if isinstance(settings.stop, str) else settings.stop or []
    answer = Completion("", [], "")
    live = settings.stream and not settings.json
    shown = "" if settings.chat else settings.text
    pieces = stream(engine, tokenizer, request, stops, answer)
    if live:
        print(shown, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    else:
        with Console(stderr=True).status("generating"):
            deque(pieces, maxlen=0)  # to its end: `answer` is filled on the way
    if settings.json:
        fields = {"text": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        print(json.dumps({"prompt": settings.text} | fields))
    else:
        print("" if live else shown + answer.text, file=sys.stdout)


def _request(
    settings: SampleSettings, tokenizer: "Tokenizer", vocab_size: int, defaults: "SamplingDefaults"
) -> "Request":
    from openpalm.data.text.conversation import Message, render, stop_ids
    from openpalm.generate.engine import Request
    from openpalm.generate.sampling import Sampling
    from openpalm.generate.streaming import document_ends, prompt_ids

    if settings.chat:
        ids = render(tokenizer, [Message("user", settings.text)], add_generation_prompt=True).ids
        stops = stop_ids(tokenizer)
    else:
        ids = prompt_ids(tokenizer, settings.text)
        stops = document_ends(tokenizer)
    new_tokens = settings.max_new_tokens or 128
    if settings.seq_len is not None:
        new_tokens = settings.seq_len - len(ids)
        if new_tokens < 1:
            raise SettingsError(
                f"--seq_len {settings.seq_len}: the prompt alone has "
                f"{count_of(len(ids), 'token')}; shorten it, or give a larger --seq_len"
            )
    top_k = settings.top_k
    if settings.filter_thres is not None:
        top_k = math.ceil((1 - settings.filter_thres) * vocab_size)
    own = defaults.override(settings.temperature, settings.top_p, top_k)
    how = Sampling(own.temperature, own.top_k, own.top_p, settings.seed)
    return Request(ids, new_tokens, how, stops)
