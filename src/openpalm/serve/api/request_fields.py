"""What callers may ask, field by field: OpenAI's names, the bounds of this server.

Unknown fields are accepted and ignored; null is the same as not given; numbers are not strings.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

MAX_CHOICES = 128
MAX_STOPS = 16
"""OpenAI takes 4; lm-evaluation-harness sends more for some tasks."""
MAX_PROMPTS = 1024
MAX_TOP_LOG_PROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class Body(BaseModel):
    """Any request's body."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


def _no_tools(value: object) -> object:
    """Lets through what asks for no tool: nothing, an empty list, a choice of none or auto."""
    if value not in (None, [], "none", "auto"):
        raise ValueError("not supported: this model calls no tools")
    return value


_TOOLS = ("tools", "functions", "tool_choice", "function_call")


class StreamOptions(Body):
    include_usage: bool | None = None


class Generation(Body):
    """What completions and chat have in common."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=300, description="token id, as a string: what is added to its logit"),
        ]
        | None
    ) = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="max_tokens")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="no more than n")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="generate on after an end marker")
    user: str | None = None

    @field_validator("best_of")
    @classmethod
    def _no_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if (value or 1) > (info.data.get("n") or 1):
            raise ValueError("not supported above n: every answer is returned, none is chosen")
        return value


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(
        None, ge=0, lt=2**31, description="16 where not given; 0 only with echo"
    )
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31, description="max_tokens")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOG_PROBS)
    echo: bool | None = None
    suffix: str | None = Field(None, description="not supported: only empty")

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("not supported: this model only continues a prompt")
        return value


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Any] | None = Field(None, description="not supported: only empty")
    function_call: Any = Field(None, description="not supported")

    _asks_no_tools = field_validator("tool_calls", "function_call")(_no_tools)

    @property
    def text(self) -> str:
        """The whole content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(Body):
    type: Literal["text"]

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: object) -> object:
        if value != "text":
            raise ValueError("this server only answers with text")
        return value


class Conversation(Body):
    """Where in its messages the model goes on."""

    add_generation_prompt: bool | None = Field(
        None, description="begin the assistant's next turn; true where not given"
    )
    continue_final_message: bool | None = Field(
        None, description="continue the last message, the assistant's, in place of a new turn"
    )


class ChatRequest(Conversation, Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="what the context has left")
    tools: list[Any] | None = Field(None, description="not supported: only empty")
    functions: list[Any] | None = Field(None, description="not supported: only empty")
    tool_choice: Any = Field(None, description="not supported: only none or auto")
    function_call: Any = Field(None, description="not supported: only none or auto")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOG_PROBS)
    response_format: ResponseFormat | None = None
    store: bool | None = Field(
        None, description="the user consents that this conversation is kept for training"
    )

    _asks_no_tools = field_validator("tools", "functions", "tool_choice", "function_call")(
        _no_tools
    )


class TokenizeRequest(Conversation):
    """`POST /tokenize`: a text, or messages as the model reads them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


class LoadRequest(Body):
    """`POST /admin/models`: what to load and serve from now on."""

    path: Annotated[str, Field(min_length=1, max_length=4096, description="run, checkpoint or hub")]
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class ScoreRequest(Body):
    """`POST /v1/score`."""

    model: str | None = None
    sequences: (
        Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )


class LegacyRequest(BaseModel):
    """mesh-transformer-jax's `POST /complete`; numbers may be strings, as there."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    context: Annotated[str, Field(strict=True)]
    top_p: float = Field(0.9, gt=0, le=1)
    temp: float = Field(1.0, ge=0, le=2)
