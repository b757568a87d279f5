"""The JSON bodies of responses. The routes build them, and /openapi.json documents them.

They are TypedDicts: plain dicts when the server runs, checked by the type checker, and read by
FastAPI for the documentation.
"""

from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic needs these before Python 3.12
)

from pydantic import TypeAdapter
from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


# --- errors


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": description}
    for status, description in {
        400: "invalid request",
        401: "missing or wrong key",
        404: "no such model",
        408: "the body did not arrive in time",
        413: "the body is too large",
        415: "the body is not declared as plain JSON",
        429: "overloaded: try again after Retry-After seconds",
        503: "the server is shutting down, or the model failed",
    }.items()
}


# --- completions and chat


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ResponseHead(TypedDict):
    """What a response and each chunk of a stream begin with."""

    id: str
    created: int
    model: str


class ChunkHead(ResponseHead):
    usage: NotRequired[Usage | None]
    """null in every chunk but the last, if the request asked for the usage"""


class CompletionLogProbs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogProbs | None
    finish_reason: FinishReason | None


class Completion(ResponseHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(ChunkHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TopToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogProbs(TypedDict):
    content: list[ChatToken]
    refusal: None


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason | None


class ChatCompletion(ResponseHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(ChunkHead):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


# --- models, tokens, scores


class SamplingSettings(TypedDict):
    temperature: float
    top_p: float
    top_k: int


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """the base model's name, if this is an adapter"""
    max_model_len: int
    sampling: SamplingSettings
    takes_conversations: bool


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class LoadedModel(TypedDict):
    model: str
    replaced: str
    removed_adapters: list[str]
    """adapters of the replaced model"""


class LoadedAdapter(TypedDict):
    model: str
    parent: str


class RemovedAdapter(TypedDict):
    removed: str


class Tokenized(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    eos_token: str | None
    eos_token_id: int | None
    bos_token: None
    pad_token: str | None
    stop_token_ids: list[int]
    chat_template: None


class Score(TypedDict):
    index: int
    score: float
    log_probs: list[float]


class Scores(TypedDict):
    object: Literal["list"]
    model: str
    kind: Literal["log_prob"]
    data: list[Score]


class LegacyCompletion(TypedDict):
    completion: str


class LegacyError(TypedDict):
    error: str


# --- /openapi.json


def responses(model: type) -> dict[int | str, dict[str, Any]]:
    """The responses of an endpoint: `model`, or an error."""
    return {200: {"model": model}, **ERRORS}


def streamed_responses(model: type, chunk: type) -> dict[int | str, dict[str, Any]]:
    """The responses of an endpoint that returns `model`, or a stream of `chunk` if asked to."""
    references = [{"$ref": _REFERENCE.format(model=name)} for name in (chunk.__name__, "Error")]
    content = {"contentMediaType": "application/json", "contentSchema": {"anyOf": references}}
    data = {"anyOf": [{"const": "[DONE]"}, {"type": "string", **content}]}
    events = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"model": model, "content": {"text/event-stream": {"schema": events}}}, **ERRORS}


def chunk_schemas() -> dict[str, Any]:
    """JSON schemas of the chunks, by name. FastAPI documents one model per status only."""
    schemas: dict[str, Any] = {}
    for chunk in (CompletionChunk, ChatCompletionChunk):
        schema = TypeAdapter(chunk).json_schema(ref_template=_REFERENCE, mode="serialization")
        schemas |= schema.pop("$defs")
        schemas[chunk.__name__] = schema
    return schemas


_REFERENCE = "#/components/schemas/{model}"
