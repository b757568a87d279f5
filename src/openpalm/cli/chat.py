"""`openpalm chat`: a conversation with a fine-tuned model in the terminal."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openpalm.base.settings import parse
from openpalm.cli.model_options import GenerationOptions
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.data.text.conversation import Message
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.generate.defaults import SamplingDefaults
    from openpalm.generate.engine import Engine

HELP = """/reset       begin a new conversation
/save FILE   add this one to a .jsonl that `openpalm sft` reads
/exit        leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class ChatSettings(GenerationOptions):
    """With which model to talk, and how it answers."""

    path: str
    """run, checkpoint or hub name"""
    system: str | None = None
    """instructions that begin the conversation"""
    max_new_tokens: int = 512
    """tokens of an answer at most"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingsError(f"--max-new-tokens {self.max_new_tokens}: must be 1 or more")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ChatSettings,
        argv,
        verb="chat",
        about="Talks with a fine-tuned model. /help lists what can be typed beside messages.",
        examples=[
            "openpalm chat runs/quickstart/sft --temperature 0",
            'openpalm chat runs/chat --system "Answer in one sentence."',
        ],
        positional=["path"],
    )
    from openpalm.cli.common import serving_model

    conversation = _Conversation(*serving_model(settings.path, settings), settings)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        print("/help for help")
    while (line := _read()) is not None:
        if line == "/exit":
            return
        if line.startswith("/"):
            print(conversation.command(*line.split(maxsplit=1)))
        elif line:
            conversation.answer(line)


def _read() -> str | None:
    """The next line, None at the end; Ctrl-C at the prompt only clears it."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()


class _Conversation:
    """What was said so far; the engine keeps what it has read of it."""

    def __init__(
        self,
        engine: "Engine",
        tokenizer: "Tokenizer",
        own: "SamplingDefaults",
        settings: ChatSettings,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.how = own.override(settings.temperature, settings.top_p, settings.top_k)
        self.settings = settings
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        from openpalm.data.text.conversation import Message

        system = self.settings.system
        self.messages = [Message("system", system)] if system else []

    def command(self, name: str, argument: str = "") -> str:
        """Does what a line with a slash asks; returns what to say about it."""
        if name == "/reset":
            self.reset()
            return "a new conversation"
        if name == "/save" and argument:
            return self._save(Path(argument))
        return HELP

    def answer(self, text: str) -> None:
        """Streams the answer; Ctrl-C keeps what came so far."""
        from openpalm.data.text.conversation import Message, render, stop_ids
        from openpalm.generate.engine import Request
        from openpalm.generate.sampling import Sampling, completion_seed
        from openpalm.generate.streaming import Completion, stream

        self.messages.append(Message("user", text))
        how, settings = self.how, self.settings
        ids = render(self.tokenizer, self.messages, add_generation_prompt=True).ids
        # Not seed + turn: the next seed's conversation would repeat these draws a turn later.
        seed = completion_seed(settings.seed, len(self.messages))
        sampling = Sampling(how.temperature, how.top_k, how.top_p, seed)
        request = Request(ids, settings.max_new_tokens, sampling, stop_ids(self.tokenizer))
        answer = Completion("", [], "")
        pieces = stream(self.engine, self.tokenizer, request, (), answer)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        finally:
            pieces.close()
        print()
        self.messages.append(Message("assistant", answer.text))

    def _save(self, path: Path) -> str:
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"{path}: cannot be written ({error.strerror}); try another file"
        return f"saved to {path}"
