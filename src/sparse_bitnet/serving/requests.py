"""What is read of a request to OpenAI's interface. Nothing that would change an answer is passed over in silence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sparse_bitnet.engine.sampling import LARGEST_PENALTY, LARGEST_TOP_K, LEAST_PENALTY, SEEDS, Sampling
from sparse_bitnet.serving.errors import Refusal

DEFAULT_COMPLETION = 16  # tokens, as OpenAI's interface has it; a chat goes on to the end of the context
MOST_STOPS = 4
MOST_MESSAGES = 4096

WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier",
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not served, and the values that ask for nothing
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0), "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip


def _text(content: Any) -> Any:
    """The text of a message, which may come in parts; Refusal where one of them is no text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Refusal(400, f"messages: a part of type {kind!r} is not served, text alone", param="messages")
    return "\n".join(part["text"] for part in content)


def _one(prompt: Any) -> Any:
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return prompt
    if len(prompt) > 1:
        raise Refusal(400, f"{len(prompt)} prompts in a request are not served: send one in each", param="prompt")
    return prompt[0]


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _none(listed: Any) -> Any:
    return None if listed == [] else listed


Nothing = Annotated[None, BeforeValidator(_none)]


class StreamOptions(BaseModel):
    """The last piece of a stream tells the counts of tokens where `include_usage` is set."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool | None = None  # padding of the pieces, which are not padded


class Message(BaseModel):
    """One turn of a chat; what templates call system is developer too in newer clients.

    A `name` is for the template. The last fields are those of an answer that is sent back as it came.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None
    tool_calls: Nothing = None
    function_call: None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None

    def to_template(self) -> dict[str, str]:
        said = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return said if self.name is None else {**said, "name": self.name}


class Asked(BaseModel):
    """What both endpoints share. `top_k` and `repetition_penalty` go beyond OpenAI's interface, as vLLM's names do."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=LARGEST_TOP_K)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=LARGEST_PENALTY)] | None = None
    seed: Annotated[int, Field(ge=SEEDS.start, lt=SEEDS.stop)] | None = None
    stop: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS), BeforeValidator(_listed)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, fields: Any) -> Any:
        """Without the fields that have no effect; Refusal where one would have, and is not served."""
        if not isinstance(fields, dict):
            return fields
        for name, neutral in NEUTRAL.items():
            value = fields.get(name)
            if value is not None and value not in neutral:
                raise Refusal(400, f"{name}={value!r} is not served: leave {name} out", param=name)
        return {name: fields[name] for name in fields if name not in NEUTRAL and name not in WITHOUT_EFFECT}

    @property
    def sampling(self) -> Sampling:
        """With OpenAI's defaults: temperature 1."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=self.seed,
        )

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Asked):
    """POST /v1/chat/completions. `chat_template_kwargs` go to the template, as `enable_thinking` of Qwen3 does."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Asked):
    """POST /v1/completions: one prompt, text or tokens, also as a list of one."""

    prompt: Annotated[str | list[int], BeforeValidator(_one)] = ""
