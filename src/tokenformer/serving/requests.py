"""What a request may hold: the fields of OpenAI's API that are honoured, with their ranges.

A field that would have to be ignored is refused instead; null counts as not given, as in OpenAI's API.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_LARGEST = 2**31 - 1


@dataclass
class Sampling:
    """How to continue one prompt.

    Attributes:
        max_new_tokens: at most so many; None for the rest of the context.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the so many likeliest tokens; 0 from all.
        top_p: sample from the fewest tokens that have this probability together.
        stop: strings that end the text; they are not part of it.
        seed: equal seeds give equal texts; None gives another each time.
        option: the client's name of `max_new_tokens`, for messages.
        adapter: that takes part; None for the model alone.
    """

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]
    seed: int | None
    option: str
    adapter: str | None = None


def _is_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not Unicode text (half of a surrogate pair)") from None
    return text


Text = Annotated[str, AfterValidator(_is_text)]
StopText = Annotated[Text, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Text | None = None
    max_tokens: Count | None = None
    temperature: float = Field(1, ge=0)
    top_p: float = Field(1, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=_LARGEST)
    stop: StopText | list[StopText] = Field([], max_length=1000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    # Taken because many clients send them, but only with the value that asks for nothing.
    n: Literal[1] = 1
    frequency_penalty: Zero = 0
    presence_penalty: Zero = 0
    # Without meaning here: the last event of a stream always tells the usage.
    stream_options: dict[str, Any] | None = None
    user: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def _sampling(self, max_new_tokens: int | None, option: str) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(max_new_tokens, self.temperature, self.top_k, self.top_p, stop, self.seed, option)


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`."""

    prompt: Text

    def sampling(self) -> Sampling:
        """As asked for; OpenAI's default of 16 tokens."""
        return self._sampling(self.max_tokens or 16, "max_tokens")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class _Message(BaseModel):
    # Clients send answers back with whatever fields the answer had.
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "user", "assistant"]
    content: Text | list[_Part]


class ChatRequest(_Request):
    """The body of `POST /v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None

    def sampling(self) -> Sampling:
        """As asked for; by default the rest of the context."""
        if self.max_completion_tokens:
            return self._sampling(self.max_completion_tokens, "max_completion_tokens")
        return self._sampling(self.max_tokens, "max_tokens")
