"""Turns a request's body into engine requests, the same for completions and chat."""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import OpenPalmError, count_of
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling, completion_seed
from openpalm.generate.streaming import document_ends, prompt_ids
from openpalm.serve.api.error_responses import ApiError, is_failure
from openpalm.serve.api.request_fields import ChatMessage, ConversationEnd, GenerationFields
from openpalm.serve.worker import ServedModel, Worker, error_line

LONG_TEXT = 20_000
"""Characters above which a text is encoded in another thread, to keep the event loop responsive."""


def find_model(worker: Worker, name: str | None) -> ServedModel:
    """The model or adapter that the request names; without a name the model. Raises ApiError."""
    if name is None:
        return worker.current
    found = next((served for served in worker.models if served.name == name), None)
    if found is None:
        served = ", ".join(repr(served.name) for served in worker.models)[:1000]
        raise ApiError(
            404,
            f"the model {name[:200]!r} is not served here; this server has {served}",
            param="model",
            code="model_not_found",
        )
    return found


async def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each prompt; an empty prompt begins a new document. Raises ApiError."""

    def encode() -> list[list[int]]:
        with tokenizer_errors():
            return [prompt_ids(tokenizer, text) for text in texts]

    if sum(map(len, texts)) > LONG_TEXT:
        return await asyncio.to_thread(encode)
    return encode()


async def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], body: ConversationEnd
) -> list[int]:
    """The token ids of a conversation, up to where the model continues. Raises ApiError.

    They end with the beginning of the assistant's next turn; with continue_final_message with the
    text of the last message; with add_generation_prompt false with the last turn's end.
    """
    turns = [Message("system" if m.role == "developer" else m.role, m.text) for m in messages]
    continued = bool(body.continue_final_message)
    if continued and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message: cannot be combined with add_generation_prompt",
            param="continue_final_message",
        )
    if continued and (not turns or turns[-1].role != "assistant"):
        raise ApiError(
            400,
            "continue_final_message: the last message must be an assistant message",
            param="continue_final_message",
        )

    def encode() -> list[int]:
        with tokenizer_errors():
            if continued:
                # The turn is opened and not closed, so the model continues inside it.
                opened = render(tokenizer, turns[:-1], add_generation_prompt=True).ids
                return opened + tokenizer.encode(turns[-1].content)
            add_generation_prompt = body.add_generation_prompt is not False
            return render(tokenizer, turns, add_generation_prompt=add_generation_prompt).ids

    if sum(len(turn.content) for turn in turns) > LONG_TEXT:
        return await asyncio.to_thread(encode)
    return encode()


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Raises ApiError for any failure of the model's tokenizer, panics included."""
    try:
        yield
    except OpenPalmError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        message = f"the model's tokenizer fails at this text ({error_line(error)})"
        raise ApiError(400, message) from None


def engine_requests(
    body: GenerationFields,
    served: ServedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | None,
    top_log_probs: int = 0,
    score_prompt: bool = False,
    chat: bool = False,
) -> list[Request]:
    """n requests for each prompt, grouped by prompt. Raises ApiError, SettingsError.

    Without `max_new_tokens` a completion may fill the rest of the context.
    """
    choices = body.n or 1
    settings = sampling(body, served)
    stops = frozenset() if body.ignore_eos else end_ids(served.tokenizer, chat=chat)
    requests = []
    for prompt in prompts:
        new_tokens = _new_tokens(served, prompt, max_new_tokens)
        for choice in range(choices):
            own = replace(settings, seed=completion_seed(settings.seed, choice))
            # The prompt is scored once: the other choices copy its cache instead of computing it.
            # A choice without new tokens has no use for a cache, so it is scored too.
            scored = score_prompt and (choice == 0 or new_tokens == 0)
            requests.append(Request(prompt, new_tokens, own, stops, top_log_probs, scored))
    return requests


def sampling(body: GenerationFields, served: ServedModel) -> Sampling:
    """The body's settings, else the model's defaults. Without a seed a random one is drawn."""
    defaults = served.defaults.override(body.temperature, body.top_p, body.top_k)
    return Sampling(
        temperature=defaults.temperature,
        top_k=max(0, defaults.top_k),
        top_p=defaults.top_p,
        min_p=body.min_p or 0.0,
        seed=random_seed() if body.seed is None else body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}, served),
    )


def token_limit(body: GenerationFields) -> int | None:
    """max_completion_tokens, or max_tokens, its older name; None without both. Raises ApiError."""
    new, old = body.max_completion_tokens, body.max_tokens
    if None not in (new, old) and new != old:
        raise ApiError(
            400,
            f"max_tokens {old} and max_completion_tokens {new}: give one of them",
            param="max_completion_tokens",
        )
    return old if new is None else new


def random_seed() -> int:
    return secrets.randbits(63)


def stop_strings(body: GenerationFields) -> list[str]:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [stop for stop in stops if stop]


def include_usage(body: GenerationFields) -> bool:
    """Whether a stream ends with its usage. Raises ApiError for stream_options without stream."""
    if body.stream_options is None:
        return False
    if not body.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options")
    return bool(body.stream_options.include_usage)


def end_ids(tokenizer: Tokenizer, *, chat: bool) -> frozenset[int]:
    """The token ids that end a completion."""
    return stop_ids(tokenizer) if chat else document_ends(tokenizer)


def check_fits(served: ServedModel, ids: Sequence[int]) -> None:
    """Raises ApiError or SettingsError for ids that the model cannot read."""
    served.engine.check(ids)
    if len(ids) > served.context:
        raise ApiError(
            400,
            f"{len(ids)} tokens do not fit the model's context of {served.context}",
            code="context_length_exceeded",
        )


def _new_tokens(served: ServedModel, prompt: list[int], requested: int | None) -> int:
    """The number of tokens to generate. Raises ApiError if they do not fit the context."""
    served.engine.check(prompt)
    left = served.context - len(prompt)
    if left < (1 if requested is None else requested):
        new = "" if requested is None else f" and {count_of(requested, 'token')} to generate"
        raise ApiError(
            400,
            f"the prompt's {count_of(len(prompt), 'token')}{new} do not fit the model's context "
            f"of {served.context}; shorten the prompt"
            + (" or lower max_tokens" if requested is not None and left > 0 else ""),
            param="prompt",
            code="context_length_exceeded",
        )
    return left if requested is None else requested


def _logit_bias(given: dict[str, float], served: ServedModel) -> dict[int, float]:
    vocab_size = served.engine.model.config.vocab_size
    bias: dict[int, float] = {}
    for key, value in given.items():
        # isdigit() accepts digits of other scripts, and int() is slow for very long numbers.
        valid = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size
        if not valid:
            raise ApiError(
                400,
                f"logit_bias: {key[:40]!r} is not a token id of this model (0 to {vocab_size - 1})",
                param="logit_bias",
            )
        bias[int(key)] = value
    return bias
