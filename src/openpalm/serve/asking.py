"""From a caller's request to the engine's, the same for completions and chat."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace

from openpalm.data.conversation import Message, render, stop_ids
from openpalm.data.tokenizer import Tokenizer
from openpalm.generate.engine import Request
from openpalm.generate.sampling import Sampling
from openpalm.generate.text import document_ends, prompt_ids
from openpalm.serve.problems import ApiError
from openpalm.serve.schema import ChatMessage, Generation
from openpalm.serve.worker import Served, Worker

LONG_TEXT = 20_000
"""Characters above which a text is encoded beside the event loop, which must not stand still."""


def pick_model(worker: Worker, name: str | None) -> Served:
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
        return [prompt_ids(tokenizer, text) for text in texts]

    if sum(map(len, texts)) > LONG_TEXT:
        return await asyncio.to_thread(work)
    return work()


async def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], *, answer_next: bool = True
) -> list[int]:
    """The ids of a conversation, where the assistant's answer begins."""
    turns = [Message("system" if m.role == "developer" else m.role, m.text) for m in messages]

    def work() -> list[int]:
        return render(tokenizer, turns, answer_next=answer_next).ids

    if sum(len(turn.content) for turn in turns) > LONG_TEXT:
        return await asyncio.to_thread(work)
    return work()


def requests(
    body: Generation,
    served: Served,
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
            own = replace(how, seed=_as_int64(how.seed + choice))
            # The prompt is scored once; the other choices copy what was read of it.
            scored = score_prompt and choice == 0
            found.append(Request(prompt, room, own, stops, top_log_probs, scored))
    return found


def sampling(body: Generation, served: Served) -> Sampling:
    """The settings of a body; a seed is drawn where none is given."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=drawn_seed() if body.seed is None else body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_bias(body.logit_bias or {}, served),
    )


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


def check_fits(served: Served, ids: Sequence[int]) -> None:
    """Raises ApiError or SettingsError for ids that the model cannot read."""
    served.engine.check(ids)
    if len(ids) > served.context:
        raise ApiError(
            400,
            f"{len(ids)} tokens do not fit the model's context of {served.context}",
            code="context_length_exceeded",
        )


def _room(served: Served, prompt: list[int], wanted: int | None) -> int:
    served.engine.check(prompt)
    left = served.context - len(prompt)
    if left < (wanted or 1):
        asked = "" if wanted is None else f" and {wanted} tokens to generate"
        raise ApiError(
            400,
            f"the prompt's {len(prompt)} tokens{asked} do not fit the model's context of "
            f"{served.context}; shorten the prompt"
            + (" or lower max_tokens" if wanted is not None and left > 0 else ""),
            param="prompt",
            code="context_length_exceeded",
        )
    return left if wanted is None else wanted


def _bias(given: dict[str, float], served: Served) -> dict[int, float]:
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


def _as_int64(number: int) -> int:
    """Wraps around, so that every seed has successors."""
    return (number + 2**63) % 2**64 - 2**63
