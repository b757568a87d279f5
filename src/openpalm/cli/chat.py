"""`openpalm chat`: chat with a fine-tuned model in the terminal."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openpalm.base.settings import check_field, parse
from openpalm.cli.model_options import GenerationOptions

if TYPE_CHECKING:
    from openpalm.data.text.conversation import Message
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.generate.defaults import SamplingDefaults
    from openpalm.generate.engine import Engine

HELP = """/reset       start a new conversation
/save FILE   append this conversation to a .jsonl file that `openpalm sft` reads
/exit        quit (also Ctrl-D); Ctrl-C stops a reply"""


@dataclass(frozen=True)
class ChatSettings(GenerationOptions):
    """The model and its system message."""

    path: str
    """run, checkpoint or hub name"""
    system: str | None = None
    """system message at the start of the conversation"""
    max_new_tokens: int = 512
    """maximum number of tokens in a reply"""

    def __post_init__(self) -> None:
        check_field(self, "max_new_tokens", lambda v: v >= 1, "1 or more")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ChatSettings,
        argv,
        verb="chat",
        about="Chats with a fine-tuned model. Type /help for commands.",
        examples=[
            "openpalm chat runs/quickstart/sft --temperature 0",
            'openpalm chat runs/chat --system "Answer in one sentence."',
        ],
        positional=["path"],
    )
    from openpalm.cli.common import serving_model

    conversation = _Conversation(*serving_model(settings.path, settings, slots=1), settings)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        print("/help for help")
    while (line := _read()) is not None:
        if line == "/exit":
            return
        if line.startswith("/"):
            print(conversation.command(*line.split(maxsplit=1)))
        elif line:
            conversation.reply(line)


def _read() -> str | None:
    """The next line, None at the end of the input; Ctrl-C at the prompt clears the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()


class _Conversation:
    """The messages so far; the engine caches the keys and values of their tokens."""

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
        """Runs a command line that starts with a slash; returns the text to print."""
        if name == "/reset":
            self.reset()
            return "a new conversation"
        if name == "/save" and argument:
            return self._save(Path(argument))
        return HELP

    def reply(self, text: str) -> None:
        """Streams the reply; Ctrl-C stops it and keeps the part that was printed."""
        from openpalm.data.text.conversation import Message, render, stop_ids
        from openpalm.generate.request import Request
        from openpalm.generate.sampling import Sampling, completion_seed
        from openpalm.generate.streaming import Completion, stream

        self.messages.append(Message("user", text))
        how, settings = self.how, self.settings
        ids = render(self.tokenizer, self.messages, add_generation_prompt=True).ids
        # Not seed + turn: the next seed's conversation would repeat these draws a turn later.
        seed = completion_seed(settings.seed, len(self.messages))
        sampling = Sampling(how.temperature, how.top_k, how.top_p, seed)
        request = Request(ids, settings.max_new_tokens, sampling, stop_ids(self.tokenizer))
        reply = Completion("", [], "")
        pieces = stream(self.engine, self.tokenizer, request, (), reply)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        finally:
            pieces.close()
        print()
        self.messages.append(Message("assistant", reply.text))

    def _save(self, path: Path) -> str:
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"{path}: cannot be written ({error.strerror}); try another file"
        return f"saved to {path}"
