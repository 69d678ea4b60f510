"""What callers send: OpenAI's requests as far as they are understood here, and no field more.

A field that is not here is refused by name: a limit or a rule that a caller believes in, and that
nobody keeps, is worse than an error. Fields that change nothing here are taken, and those whose one
harmless value clients send by habit are taken with that value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_SEED = 2**63 - 1
# OpenAI's own bounds.
_MOST_STOPS, _MOST_CHOICES, _MOST_TOP, _MOST_INPUTS, _MOST_TOOLS = 4, 16, 20, 2048, 128
# Of one request; there is one place for each in every step of its answer.
_MOST_BIASES = 1024


class Shape(BaseModel):
    """JSON of exactly these fields and types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Shape):
    """A part of a message's content; of kinds other than text a caller is told so in words."""

    type: str
    text: str | None = Field(default=None, repr=False)
    image_url: Any = Field(default=None, repr=False)
    input_audio: Any = Field(default=None, repr=False)
    file: Any = Field(default=None, repr=False)
    refusal: str | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _only_text(self) -> TextPart:
        if self.type != "text" or self.text is None:
            raise ValueError(
                "this server reads text alone, and fetches no address that a request names. Send"
                ' parts of {"type": "text", "text": …}.'
            )
        return self


class CalledFunction(Shape):
    """Which tool an assistant called, with the JSON text of its arguments."""

    name: str
    arguments: str = Field(repr=False)


class Call(Shape):
    """One call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    # Of a stream's pieces, which clients put together and send back.
    index: int | None = None


class ChatMessage(Shape):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(default=None, repr=False)
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(default=None, repr=False)
    # What this server's own answers have, and clients send back.
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None

    @model_validator(mode="after")
    def _whole(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's turn has tool_calls")
        return self

    def text(self) -> str:
        """Return its content as one text."""
        if isinstance(self.content, list):
            return "".join(each.text or "" for each in self.content)
        return self.content or ""


class FunctionShape(Shape):
    """A tool that may be called."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    """A tool, of the one kind that there is here."""

    type: Literal["function"]
    function: FunctionShape


class NamedFunction(Shape):
    """The name of a tool."""

    name: str


class NamedTool(Shape):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaShape(Shape):
    """What an answer has to fit."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Shape):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: SchemaShape | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema")
        return self


class StreamOptions(Shape):
    """What a stream has besides text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Sampled(Shape):
    """What all requests for an answer have."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = Field(default=None, repr=False)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = Field(default=None, repr=False)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = Field(
        default=None, max_length=_MOST_BIASES, repr=False
    )

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > _MOST_STOPS or not all(stops):
            raise ValueError(f"up to {_MOST_STOPS} texts, none of them empty")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its figures."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    # Taken, and without meaning here: nothing is kept.
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(default=None, repr=False)
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(default=None, repr=False)
    prompt_cache_key: str | None = Field(default=None, repr=False)
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        names = {each.function.name for each in self.tools or ()}
        if len(names) < len(self.tools or ()):
            raise ValueError("two tools have one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names no tool of this request")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required goes with tools")
        return self


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(repr=False)
    # 0 for a prompt that is only given back, with its log-probabilities.
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP)] | None = None
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 goes with echo")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is n here, or left out")
        if not self.prompts():
            raise ValueError("the prompt is empty")
        if len(self.prompts()) * (self.n or 1) > _MOST_CHOICES:
            raise ValueError(f"more than {_MOST_CHOICES} answers in one request")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[:1]
        if first and isinstance(first[0], int):
            return [[each for each in self.prompt if isinstance(each, int)]]
        return [each for each in self.prompt if isinstance(each, str | list)]


class EmbeddingRequest(Shape):
    """POST /v1/embeddings."""

    model: str
    input: str | list[str] | list[int] | list[list[int]] = Field(repr=False)
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: None = None
    user: str | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _fits(self) -> EmbeddingRequest:
        if not self.inputs():
            raise ValueError("the input is empty")
        if len(self.inputs()) > _MOST_INPUTS:
            raise ValueError(f"more than {_MOST_INPUTS} texts in one request")
        return self

    def inputs(self) -> list[str | list[int]]:
        """Return each text, as text or token ids."""
        if isinstance(self.input, str):
            return [self.input]
        first = self.input[:1]
        if first and isinstance(first[0], int):
            return [[each for each in self.input if isinstance(each, int)]]
        return [each for each in self.input if isinstance(each, str | list)]
