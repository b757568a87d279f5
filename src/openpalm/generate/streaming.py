"""Text around the engine: prompts to token ids, generated tokens to streamed text, stop strings."""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from openpalm.data.text.stream_decoder import StreamDecoder
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request, Token
from openpalm.generate.sampling import Sampling

FinishReason = Literal["stop", "length"]


@dataclass
class Completion:
    """The generated continuation of a prompt."""

    text: str
    tokens: list[int]
    finish: str


class StopStrings:
    """Passes text through up to the first stop string; holds back text that may begin one.

    If several stop strings match, the one that is complete first counts, however the text is cut
    into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Returns the text that no stop string can begin in any more."""
        self.held += text
        starts = [(self.held.find(stop), len(stop)) for stop in self.stops]
        found = [(start + length, start) for start, length in starts if start >= 0]
        if found:
            self.stopped = True
            passed, self.held = self.held[: min(found)[1]], ""
            return passed
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        passed, self.held = self.held[:cut], self.held[cut:]
        return passed

    def flush(self) -> str:
        passed, self.held = self.held, ""
        return passed

    def _overlap(self, stop: str) -> int:
        """Length of the longest suffix of the held text that is a prefix of `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a completion, with the tokens that it consists of."""

    text: str
    tokens: list[tuple[Token, int]]
    """each with the character of the completion where its text begins"""
    finish: FinishReason | None = None
    """the reason if the completion ends here"""


class CompletionText:
    """Turns the tokens of one completion into text, as soon as it is certain.

    The joined deltas are the completion's text, without its end marker and without a stop string.
    No delta ends inside a character. A token comes with the delta in which its text begins.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], stops: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer)
        self._stop_strings = StopStrings(stops)
        self._stop_ids = stop_ids
        self._held: deque[tuple[Token, int]] = deque()
        # In characters. Decoded text is returned once no stop string can begin in it.
        self._decoded = self._returned = 0

    def push(self, token: Token) -> TextDelta:
        """Returns the text that the next token makes certain. A finish must be the last call."""
        assert token.finish != "error"
        is_end_marker = token.id in self._stop_ids
        if not is_end_marker:
            self._held.append((token, self._decoded))
        text = self._pass("" if is_end_marker else self._decoder.push(token.id))
        if token.finish and not self._stop_strings.stopped:
            # Nothing can follow: half a character and the beginning of a stop string are text now.
            text += self._pass(self._decoder.flush()) + self._stop_strings.flush()
        stopped = self._stop_strings.stopped
        finish = "stop" if stopped else token.finish
        self._returned += len(text)
        # Tokens of the stop string itself stay held; they are not part of the text.
        return TextDelta(text, self._release(everything=bool(finish) and not stopped), finish)

    def _pass(self, text: str) -> str:
        self._decoded += len(text)
        return "" if self._stop_strings.stopped else self._stop_strings.push(text)

    def _release(self, *, everything: bool) -> list[tuple[Token, int]]:
        released = []
        while self._held and (everything or self._held[0][1] < self._returned):
            released.append(self._held.popleft())
        return released


def stream(
    engine: Engine, tokenizer: Tokenizer, request: Request, stops: Sequence[str], into: Completion
) -> Generator[str, None, None]:
    """Yields the completion's text as it becomes certain, and fills `into` meanwhile.

    The joined texts are the completion's, without its end marker and without a stop string.
    """
    completion = CompletionText(tokenizer, request.stop_ids, stops)
    for token in engine.generate([request]):
        delta = completion.push(token)
        into.tokens.append(token.id)
        into.finish = delta.finish or ""
        into.text += delta.text
        if delta.text:
            yield delta.text
        if delta.finish:
            return


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Returns the completion of every prompt, without the prompt."""
    stops = document_ends(tokenizer)
    requests = [
        Request(prompt_ids(tokenizer, prompt), max_new_tokens, sampling, stops)
        for prompt in prompts
    ]
    return [tokenizer.decode(ids) for ids in engine.completions(requests)]


def document_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The end-of-text id, which ends a completed document, if the vocabulary has one."""
    return frozenset() if tokenizer.end_of_text is None else frozenset({tokenizer.end_of_text})


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's token ids. An empty prompt is an end-of-text: a new document begins after it."""
    ids = tokenizer.encode(prompt)
    if ids or tokenizer.end_of_text is None:
        return ids
    return [tokenizer.end_of_text]
