"""The fields of request bodies, under OpenAI's names, with this server's limits.

Unknown fields are ignored. null means not given. A number in quotes is an error.
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
"""OpenAI's limit is 4; lm-evaluation-harness sends more for some tasks."""
MAX_PROMPTS = 1024
MAX_TOP_LOG_PROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class Body(BaseModel):
    """The base of all request bodies."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


def _no_tools(value: object) -> object:
    """Accepts only values that request no tool: null, an empty list, none or auto."""
    if value not in (None, [], "none", "auto"):
        raise ValueError("not supported: this model calls no tools")
    return value


_TOOLS = ("tools", "functions", "tool_choice", "function_call")


class StreamOptions(Body):
    include_usage: bool | None = None


class GenerationFields(Body):
    """The fields that completions and chat share."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="0 or -1 keeps all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=300, description="token id as a string -> number added to its logit"),
        ]
        | None
    ) = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="newer name of max_tokens"
    )
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="must not exceed n")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="continue after an end marker")
    user: str | None = None

    @field_validator("best_of")
    @classmethod
    def _no_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if (value or 1) > (info.data.get("n") or 1):
            raise ValueError("not supported above n: every completion is returned")
        return value


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="default 16; 0 only with echo")
    max_completion_tokens: int | None = Field(
        None, ge=0, lt=2**31, description="newer name of max_tokens"
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOG_PROBS)
    echo: bool | None = None
    suffix: str | None = Field(None, description="not supported: must be empty")

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("not supported: the model only continues a prompt")
        return value


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Any] | None = Field(None, description="not supported: must be empty")
    function_call: Any = Field(None, description="not supported")

    _check_no_tools = field_validator("tool_calls", "function_call")(_no_tools)

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(Body):
    type: Literal["text"]

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: object) -> object:
        if value != "text":
            raise ValueError("not supported: responses are always text")
        return value


class ConversationEnd(Body):
    """Where in the conversation the model continues."""

    add_generation_prompt: bool | None = Field(
        None, description="begin the assistant's next turn; default true"
    )
    continue_final_message: bool | None = Field(
        None, description="continue the last message, an assistant message, instead of a new turn"
    )


class ChatRequest(ConversationEnd, GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: fills the context")
    tools: list[Any] | None = Field(None, description="not supported: must be empty")
    functions: list[Any] | None = Field(None, description="not supported: must be empty")
    tool_choice: Any = Field(None, description="not supported: must be none or auto")
    function_call: Any = Field(None, description="not supported: must be none or auto")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOG_PROBS)
    response_format: ResponseFormat | None = None
    store: bool | None = Field(
        None, description="the user agrees that the conversation is kept for training"
    )

    _check_no_tools = field_validator("tools", "functions", "tool_choice", "function_call")(
        _no_tools
    )


class TokenizeRequest(ConversationEnd):
    """`POST /tokenize`: a text, or messages rendered as the model reads them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


class LoadRequest(Body):
    """`POST /admin/models`: the model to load and serve."""

    path: Annotated[
        str, Field(min_length=1, max_length=4096, description="run, checkpoint or hub name")
    ]
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class LoadAdapterRequest(Body):
    """`POST /admin/adapters`: the LoRA adapter to serve beside the model."""

    path: Annotated[
        str,
        Field(min_length=1, max_length=4096, description="adapter directory, run or checkpoint"),
    ]
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class ScoreRequest(Body):
    """`POST /v1/score`."""

    model: str | None = None
    sequences: (
        Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )


class LegacyRequest(BaseModel):
    """mesh-transformer-jax's `POST /complete`; as there, numbers may be strings."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    context: Annotated[str, Field(strict=True)]
    top_p: float = Field(0.9, gt=0, le=1)
    temp: float = Field(1.0, ge=0, le=2)
