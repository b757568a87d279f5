"""The answers as /openapi.json describes them. Documentation only: responses are plain dicts."""

from typing import Any, Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": why}
    for status, why in {
        400: "a wrong request",
        401: "no key, or a wrong one",
        404: "no such model",
        408: "a body that did not arrive in time",
        413: "a body too large",
        415: "a body that is not declared as plain JSON",
        429: "overloaded: try again after Retry-After seconds",
        503: "shutting down, or the model failed",
    }.items()
}


def answered(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of an endpoint that answers whole or, where asked, as a stream."""
    events = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "a chunk as JSON, or [DONE]"}},
        "required": ["data"],
    }
    return {200: {"model": model, "content": {"text/event-stream": {"schema": events}}}, **ERRORS}


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogProbs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogProbs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogProbs(BaseModel):
    content: list[ChatToken]
    refusal: None


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogProbs | None
    finish_reason: Finish | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class SamplingDefaults(BaseModel):
    temperature: float
    top_p: float
    top_k: int


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    sampling: SamplingDefaults
    takes_conversations: bool


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    prompt: str


class Score(BaseModel):
    index: int
    score: float
    log_probs: list[float]


class Scores(BaseModel):
    object: Literal["list"]
    model: str
    kind: Literal["log_prob"]
    data: list[Score]


class LegacyCompletion(BaseModel):
    completion: str


class LegacyError(BaseModel):
    error: str


class Loaded(BaseModel):
    model: str
    replaced: str
