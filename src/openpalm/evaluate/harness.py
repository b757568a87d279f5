"""A model for lm-evaluation-harness: its three kinds of request, answered by the engine.

`HarnessModel` has the arithmetic and does not need the library; `as_lm` makes of it the class that
the library accepts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from openpalm.data.text.conversation import Message, Role, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, NumbersError, SettingsError, count_of
from openpalm.evaluate.scoring import Advance, Ids, Pair, rolling_windows, score_pairs
from openpalm.generate.engine import NOT_FINITE, Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling, completion_seed
from openpalm.generate.streaming import CompletionText

MAX_NEW_TOKENS = 256
"""Tokens generated if a task names no limit, as in the library."""
_CHAT = "\ufdd0"
"""Begins a rendered conversation; a Unicode noncharacter, which no text of a task contains."""
_MAX_TOKEN_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p")

Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def no_progress(label: str, total: int) -> Iterator[Advance]:
    yield lambda more: None


class HarnessModel:
    """Answers requests of text with a model's engine and tokenizer.

    Requests that do not fit the context lose their beginning, as in the library's own models;
    `notes` counts them by reason. A request is any object with the library's `args`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        progress: Progress = no_progress,
        seed: int = 0,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_length = engine.model.config.context
        self.notes: dict[str, int] = {}
        self._progress = progress
        self._seed = seed

    @property
    def prefix_id(self) -> int:
        """The token before a text that has no context."""
        if self.tokenizer.end_of_text is None:
            raise SettingsError(
                "the tokenizer has no end-of-text token, which the task puts before a text"
            )
        return self.tokenizer.end_of_text

    def encode(self, text: str) -> Ids:
        """The ids of a text, of a conversation of `render_chat`, or of one with a text after it."""
        if not text.startswith(_CHAT):
            return self.tokenizer.encode(text)
        chat, end = json.JSONDecoder().raw_decode(text, len(_CHAT))
        messages = [Message(row["role"], row["content"]) for row in chat["messages"]]
        opened = [] if chat["complete"] else [messages.pop()]
        ids = render(self.tokenizer, messages, add_generation_prompt=True).ids
        for message in opened:
            ids = ids + self.tokenizer.encode(message.content)
        return ids + self.tokenizer.encode(text[end:])

    def render_chat(self, history: Sequence[dict[str, str]], *, complete: bool) -> str:
        """The conversation as a text that `encode` turns into the ids of our chat template.

        If it is not `complete`, its last message is the beginning of the assistant's turn.
        """
        roles: tuple[Role, ...] = ("system", "user", "assistant")
        for message in history:
            if message["role"] not in roles:
                raise DataError(f"role {message['role']!r} in a task: must be one of {roles}")
        return _CHAT + json.dumps({"messages": list(history), "complete": complete})

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding gives.

        The context keeps as many of its last tokens as fit; a continuation that is longer than
        the model's context is scored in windows.
        """
        windows = [self._fitted(pair) for pair in pairs]
        flat = [window for group in windows for window in group]
        with self._progress("scoring", len(flat)) as advance:
            scores = iter(score_pairs(self.engine, flat, advance))
        answers = []
        for group in windows:
            own = [next(scores) for _ in group]
            total = own[0].log_prob if len(own) == 1 else sum(s.log_prob for s in own)
            answers.append((float(total), all(s.is_greedy for s in own)))
        return answers

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of each whole text after an end-of-text token, in windows."""
        windows = [
            rolling_windows(self.encode(text), self.prefix_id, self.max_length) for text in texts
        ]
        with self._progress("scoring", sum(map(len, windows))) as advance:
            flat = [window for group in windows for window in group]
            scores = iter(score_pairs(self.engine, flat, advance))
        return [float(sum(next(scores).log_prob for _ in group)) for group in windows]

    def complete_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The text generated after each context, up to a stop string or the end of a text."""
        made = [self._generation(i, *request) for i, request in enumerate(requests)]
        texts = [""] * len(made)
        # Longest first, so that requests in flight together have about the same length.
        order = sorted(range(len(made)), key=lambda i: -len(made[i][0].ids))
        with self._progress("generating", len(made)) as advance:
            waiting = {self.engine.submit(made[i][0]): i for i in order}
            decoders = [CompletionText(self.tokenizer, r.stop_ids, until) for r, until in made]
            while self.engine.busy:
                for token in self.engine.step():
                    if token.request not in waiting:  # of a request that has just been cancelled
                        continue
                    if token.finish == "error":
                        self.engine.reset()
                        raise NumbersError(NOT_FINITE)
                    i = waiting[token.request]
                    delta = decoders[i].push(token)
                    texts[i] += delta.text
                    if delta.finish:
                        if not token.finish:
                            self.engine.cancel(token.request)
                        del waiting[token.request]
                        advance(1)
        return texts

    def _fitted(self, pair: Pair) -> list[Pair]:
        room = self.max_length + 1 - len(pair.continuation)
        if room < 1:
            self._note("is longer than the model's context and scored in windows")
            return rolling_windows(pair.continuation, pair.context[-1], self.max_length)
        if len(pair.context) > room:
            self._note("does not fit the model's context and lost its beginning")
        return [Pair(pair.context[-room:], pair.continuation)]

    def _generation(
        self, number: int, context: str, settings: dict[str, Any]
    ) -> tuple[Request, list[str]]:
        until, limit, sampling = self._generation_settings(settings)
        if limit >= self.max_length:
            self._note("may generate fewer tokens than its task asks for, to fit the context")
            limit = self.max_length - 1
        ids = self.encode(context) or [self.prefix_id]
        if len(ids) + limit > self.max_length:
            self._note("does not fit the model's context and lost its beginning")
            ids = ids[limit - self.max_length :]
        # The end of a turn also ends a completion of plain text, as in an exported folder.
        sampling = Sampling(**sampling, seed=completion_seed(self._seed, number))
        return Request(ids, limit, sampling, stop_ids(self.tokenizer)), until

    def _generation_settings(
        self, settings: dict[str, Any]
    ) -> tuple[list[str], int, dict[str, Any]]:
        """Stop strings, the most tokens and the sampling settings of a task's generation_kwargs."""
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", [])
        limits = [given.pop(name) for name in _MAX_TOKEN_NAMES if name in given]
        samples = given.pop("do_sample", None)
        sampling = {name: given.pop(name) for name in _SAMPLING_NAMES if name in given}
        # Without a temperature a task is greedy, and with do_sample: false whatever it is.
        sampling["temperature"] = 0.0 if samples is False else sampling.get("temperature", 0.0)
        for name in given:
            self._note(f"has the generation setting {name}, which is not used")
        return (
            [until] if isinstance(until, str) else list(until),
            int(limits[0]) if limits else MAX_NEW_TOKENS,
            sampling,
        )

    def _note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def note_lines(self) -> list[str]:
        """A line for each reason why requests were not answered as the task has them."""
        return [f"{count_of(count, 'request')}: each {what}" for what, count in self.notes.items()]


def check_installed(option: str) -> None:
    """Raises SettingsError if the library is missing."""
    if find_spec("lm_eval") is None:
        raise SettingsError(
            f"{option}: lm-eval is not installed; pip install 'openpalm[eval]', or leave it out"
        )


def as_lm(model: HarnessModel) -> Any:
    """The model as lm-evaluation-harness's own kind of object; imports the library."""
    base: Any = import_module("lm_eval.api.model").TemplateLM

    class OpenPalm(base):
        eot_token_id = property(lambda self: model.prefix_id)

        def tok_encode(self, string: str, *_: Any, **__: Any) -> Ids:
            return model.encode(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, Ids, Ids]], **_: Any
        ) -> list[tuple[float, bool]]:
            return model.log_likelihoods([Pair(before, after) for _, before, after in requests])

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            return model.rolling_log_likelihoods([text for (text,) in (r.args for r in requests)])

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return model.complete_until([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return model.render_chat(chat_history, complete=add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            return model.tokenizer.digest

    return OpenPalm()
