"""Text in front of the engine: prompts to ids, ids to streamed text, stop strings."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from openpalm.data.tokenizer import StreamDecoder, Tokenizer
from openpalm.generate.engine import Engine, Request, Sampling


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


def stream(
    engine: Engine, tokenizer: Tokenizer, request: Request, stops: Sequence[str], into: Completion
) -> Generator[str, None, None]:
    """Pieces of the answer as they become certain; `into` is filled on the way.

    The joined pieces are the answer's text, without its end marker and without a stop string.
    """
    decoder = StreamDecoder(tokenizer)
    gate = StopStrings(stops)

    def certain(piece: str) -> Iterator[str]:
        passed = gate.push(piece)
        if gate.stopped:
            into.finish = "stop"
        if passed:
            into.text += passed
            yield passed

    for token in engine.generate([request]):
        into.tokens.append(token.id)
        into.finish = token.finish or ""
        yield from certain("" if token.id in request.stop_ids else decoder.push(token.id))
        if gate.stopped:
            return
    yield from certain(decoder.flush())
    if rest := gate.flush():
        into.text += rest
        yield rest


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Continues every prompt; the prompts themselves are not repeated."""
    stops = frozenset() if tokenizer.end_of_text is None else frozenset({tokenizer.end_of_text})
    requests = [
        Request(prompt_ids(tokenizer, prompt), max_new_tokens, sampling, stops)
        for prompt in prompts
    ]
    return [tokenizer.decode(ids) for ids in engine.answers(requests)]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens; an empty prompt starts where documents do, after end-of-text."""
    ids = tokenizer.encode(prompt)
    if ids or tokenizer.end_of_text is None:
        return ids
    return [tokenizer.end_of_text]
