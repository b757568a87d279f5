"""Text in front of the engine: prompts to ids, ids to streamed text, stop strings."""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from openpalm.data.text.stream_decoder import StreamDecoder
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine, Request, Token
from openpalm.generate.sampling import Sampling


@dataclass
class Completion:
    """What a prompt was continued with."""

    text: str
    tokens: list[int]
    finish: str


class StopStrings:
    """Passes text through until a stop string begins; holds back what could become one.

    Of several the one that is complete first counts, however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string."""
        self.held += piece
        starts = [(self.held.find(stop), len(stop)) for stop in self.stops]
        found = [(at + length, at) for at, length in starts if at >= 0]
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
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, with the tokens that it is made of."""

    text: str
    tokens: list[tuple[Token, int]]
    """each with the character of the answer where its text begins"""
    finish: Literal["stop", "length", "error"] | None = None
    """why the answer ends here, or None"""


class AnswerText:
    """Turns the tokens of one answer into text, as far as it is certain.

    The joined pieces are the answer's text, without its end marker and without a stop string; no
    piece holds half a character. Tokens come with the piece their text begins in.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], stops: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer)
        self._gate = StopStrings(stops)
        self._stop_ids = stop_ids
        self._held: deque[tuple[Token, int]] = deque()
        self._decoded = self._given = 0  # characters

    def push(self, token: Token) -> Piece:
        """What the next token makes certain. After a finish there is nothing more to push."""
        ends_by_id = token.id in self._stop_ids
        if not ends_by_id:
            self._held.append((token, self._decoded))
        text = self._certain("" if ends_by_id else self._decoder.push(token.id))
        if token.finish and not self._gate.stopped:
            text += self._certain(self._decoder.flush()) + self._gate.flush()
        finish = "stop" if self._gate.stopped else token.finish
        self._given += len(text)
        return Piece(text, self._released(bool(finish) and not self._gate.stopped), finish)

    def _certain(self, piece: str) -> str:
        self._decoded += len(piece)
        return "" if self._gate.stopped else self._gate.push(piece)

    def _released(self, everything: bool) -> list[tuple[Token, int]]:
        released = []
        while self._held and (everything or self._held[0][1] < self._given):
            released.append(self._held.popleft())
        return released


def stream(
    engine: Engine, tokenizer: Tokenizer, request: Request, stops: Sequence[str], into: Completion
) -> Generator[str, None, None]:
    """Pieces of the answer as they become certain; `into` is filled on the way.

    The joined pieces are the answer's text, without its end marker and without a stop string.
    """
    answer = AnswerText(tokenizer, request.stop_ids, stops)
    for token in engine.generate([request]):
        piece = answer.push(token)
        into.tokens.append(token.id)
        into.finish = piece.finish or ""
        into.text += piece.text
        if piece.text:
            yield piece.text
        if piece.finish:
            return


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Continues every prompt; the prompts themselves are not repeated."""
    stops = document_ends(tokenizer)
    requests = [
        Request(prompt_ids(tokenizer, prompt), max_new_tokens, sampling, stops)
        for prompt in prompts
    ]
    return [tokenizer.decode(ids) for ids in engine.answers(requests)]


def document_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The id that ends a continued document, where the vocabulary has one."""
    return frozenset() if tokenizer.end_of_text is None else frozenset({tokenizer.end_of_text})


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens; an empty prompt starts where documents do, after end-of-text."""
    ids = tokenizer.encode(prompt)
    if ids or tokenizer.end_of_text is None:
        return ids
    return [tokenizer.end_of_text]
