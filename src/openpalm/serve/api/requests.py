"""From a caller's request to the engine's, the same for completions and chat."""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import OpenPalmError, count_of
from openpalm.generate.engine import Request
from openpalm.generate.sampling import Sampling, completion_seed
from openpalm.generate.streaming import document_ends, prompt_ids
from openpalm.serve.api.error_responses import ApiError, is_failure
from openpalm.serve.api.request_fields import ChatMessage, Conversation, Generation
from openpalm.serve.worker import ServedModel, Worker, reason

LONG_TEXT = 20_000
"""Characters above which a text is encoded beside the event loop, which must not stand still."""


def pick_model(worker: Worker, name: str | None) -> ServedModel:
    """The model of that name, the only one there is. Raises ApiError."""
    served = worker.current
    if name not in (None, served.name):
        raise ApiError(
            404,
            f"the model {name[:200]!r} is not served here; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )
    return served


async def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts; an empty one starts where documents do."""

    def work() -> list[list[int]]:
        with tokenizing():
            return [prompt_ids(tokenizer, text) for text in texts]

    if sum(map(len, texts)) > LONG_TEXT:
        return await asyncio.to_thread(work)
    return work()


async def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], body: Conversation
) -> list[int]:
    """The ids of a conversation, up to where the model goes on. Raises ApiError.

    That is the begin of the assistant's next turn; with continue_final_message the end of what the
    last one says; with add_generation_prompt false the end of the conversation.
    """
    turns = [Message("system" if m.role == "developer" else m.role, m.text) for m in messages]
    continued = bool(body.continue_final_message)
    if continued and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message: not with add_generation_prompt, which begins another turn",
            param="continue_final_message",
        )
    if continued and (not turns or turns[-1].role != "assistant"):
        raise ApiError(
            400,
            "continue_final_message: the last message must be the assistant's, to be continued",
            param="continue_final_message",
        )

    def work() -> list[int]:
        with tokenizing():
            if continued:
                begun = render(tokenizer, turns[:-1], answer_next=True).ids
                return begun + tokenizer.encode(turns[-1].content)
            answer_next = body.add_generation_prompt is not False
            return render(tokenizer, turns, answer_next=answer_next).ids

    if sum(len(turn.content) for turn in turns) > LONG_TEXT:
        return await asyncio.to_thread(work)
    return work()


@contextmanager
def tokenizing() -> Iterator[None]:
    """Raises ApiError for a text or ids that the model's tokenizer fails on, panics included."""
    try:
        yield
    except OpenPalmError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ApiError(400, f"the model's tokenizer fails on this ({reason(error)})") from None


def engine_requests(
    body: Generation,
    served: ServedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | None,
    top_log_probs: int = 0,
    score_prompt: bool = False,
    chat: bool = False,
) -> list[Request]:
    """n requests for each prompt, those of a prompt together. Raises ApiError, SettingsError.

    Without `max_new_tokens` an answer may fill what the context leaves.
    """
    choices = body.n or 1
    how = sampling(body, served)
    stops = frozenset() if body.ignore_eos else ends(served.tokenizer, chat=chat)
    found = []
    for prompt in prompts:
        room = _room(served, prompt, max_new_tokens)
        for choice in range(choices):
            own = replace(how, seed=completion_seed(how.seed, choice))
            # The prompt is scored once; the other choices copy what was read of it. Where nothing
            # is generated they have nothing to copy it for.
            scored = score_prompt and (choice == 0 or room == 0)
            found.append(Request(prompt, room, own, stops, top_log_probs, scored))
    return found


def sampling(body: Generation, served: ServedModel) -> Sampling:
    """The settings of a body, else the model's own; a seed is drawn where none is given."""
    how = served.defaults.given(body.temperature, body.top_p, body.top_k)
    return Sampling(
        temperature=how.temperature,
        top_k=max(0, how.top_k),
        top_p=how.top_p,
        min_p=body.min_p or 0.0,
        seed=drawn_seed() if body.seed is None else body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_bias(body.logit_bias or {}, served),
    )


def token_limit(body: Generation) -> int | None:
    """max_completion_tokens, max_tokens in its older name; None for neither. Raises ApiError."""
    new, old = body.max_completion_tokens, body.max_tokens
    if None not in (new, old) and new != old:
        raise ApiError(
            400,
            f"max_tokens {old} and max_completion_tokens {new}: give one of them",
            param="max_completion_tokens",
        )
    return old if new is None else new


def drawn_seed() -> int:
    """For a caller who gave none."""
    return secrets.randbits(63)


def stop_strings(body: Generation) -> list[str]:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [stop for stop in stops if stop]


def check_stream_options(body: Generation) -> bool:
    """Whether a stream shall end with its usage. Raises ApiError."""
    if body.stream_options is None:
        return False
    if not body.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options")
    return bool(body.stream_options.include_usage)


def ends(tokenizer: Tokenizer, *, chat: bool) -> frozenset[int]:
    """The ids that end an answer by themselves."""
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


def _room(served: ServedModel, prompt: list[int], wanted: int | None) -> int:
    served.engine.check(prompt)
    left = served.context - len(prompt)
    if left < (1 if wanted is None else wanted):
        asked = "" if wanted is None else f" and {count_of(wanted, 'token')} to generate"
        raise ApiError(
            400,
            f"the prompt's {count_of(len(prompt), 'token')}{asked} do not fit the model's context "
            f"of {served.context}; shorten the prompt"
            + (" or lower max_tokens" if wanted is not None and left > 0 else ""),
            param="prompt",
            code="context_length_exceeded",
        )
    return left if wanted is None else wanted


def _bias(given: dict[str, float], served: ServedModel) -> dict[int, float]:
    vocab = served.engine.model.config.vocab_size
    bias: dict[int, float] = {}
    for name, value in given.items():
        valid = name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab
        if not valid:
            raise ApiError(
                400,
                f"logit_bias: {name[:40]!r} is no token id of this model (0 to {vocab - 1})",
                param="logit_bias",
            )
        bias[int(name)] = value
    return bias
