"""What clients may send: OpenAI's fields and vLLM's extras, with their types. Ranges are those of
SamplingParams; what neither knows is ignored, and what is known but not done here is refused.

A list fails with its first bad entry (fail_fast): pydantic would collect a million errors."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.terms import MOST_MS

MAX_PROMPTS = 1024  # in one request
MAX_N = 128
MAX_WORDS = 64  # stop strings, bad words
MAX_WORD_LENGTH = 256  # characters in one of them
MAX_BIASES = 1024
MAX_SALT_LENGTH = MAX_TENANT_LENGTH = 256

MAX_LISTED_IDS = 2**19  # no vocabulary is larger


def refuse_many(biases: Any) -> Any:
    """pydantic looks at all entries of a dictionary before it counts them."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise InvalidRequestError("logit_bias", f"{len(biases)} entries", f"at most {MAX_BIASES}")
    return biases


Words = Annotated[
    list[Annotated[str, Field(max_length=MAX_WORD_LENGTH)]],
    Field(max_length=MAX_WORDS, fail_fast=True),
]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
ListedIds = Annotated[list[int], Field(max_length=MAX_LISTED_IDS, fail_fast=True)]
Biases = Annotated[dict[str, float], Field(max_length=MAX_BIASES), BeforeValidator(refuse_many)]
Tenant = Annotated[str, Field(max_length=MAX_TENANT_LENGTH)]
TargetMs = Annotated[float, Field(gt=0, le=MOST_MS)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
# names that SamplingParams has too, and means the same by
SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "prompt_logprobs", "allowed_token_ids", "bad_words", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip
GUIDED = "structured_outputs={...} does this"


class Body(BaseModel):
    """A request's body. Types are exact: a string is no number."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )
    refused: ClassVar[Mapping[str, str]] = {}  # a field that is known -> what to do without it

    @model_validator(mode="before")
    @classmethod
    def refuse_fields(cls, data: Any) -> Any:
        for name, remedy in cls.refused.items() if isinstance(data, dict) else ():
            if data.get(name) not in (None, False):
                raise InvalidRequestError(name, data[name], f"is not supported: {remedy}")
        return data


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingBody(Body):
    """What completions and chat share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: Annotated[str, Field(max_length=MAX_WORD_LENGTH)] | Words | None = None
    stop_token_ids: ListedIds | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Biases | None = None
    allowed_token_ids: ListedIds | None = None
    bad_words: Words | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None
    user: Tenant | None = None
    safety_identifier: Tenant | None = None
    ttft_target_ms: TargetMs | None = None
    tpot_target_ms: TargetMs | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling_params(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        form: StructuredOutputsParams | None = None,
    ) -> SamplingParams:
        """What the engine is asked to do.

        Args:
            defaults: the model's own, for fields that are not given.
            form: of the output, if something other than this body's own fields sets it.

        Raises:
            InvalidRequestError: names the field.
        """
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            **{**defaults, **given},
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias=self.logit_biases(),
            structured_outputs=form or self.output_form(),
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
        )

    def prompt_fields(self) -> dict[str, Any]:
        """What a prompt brings beside its tokens; see text_engine.Prompt."""
        return {
            "cache_salt": self.cache_salt,
            "tenant": self.safety_identifier or self.user,  # OpenAI's name today, and before
            "ttft_target_ms": self.ttft_target_ms,
            "tpot_target_ms": self.tpot_target_ms,
        }

    def logit_biases(self) -> dict[int, float] | None:
        """JSON's keys are strings; these are to be token ids."""
        if self.logit_bias is None:
            return None
        for key in self.logit_bias:
            if not (key.isascii() and key.isdigit() and len(key) < 20):
                raise InvalidRequestError("logit_bias", key, "each key must be a token id")
        return {int(key): bias for key, bias in self.logit_bias.items()}

    def output_form(self) -> StructuredOutputsParams | None:
        """The form that the output must have, by structured_outputs or response_format."""
        asked = self.response_format
        if asked is not None and asked.type == "text":
            asked = None
        if self.structured_outputs is not None:
            if asked is not None:
                why = "give response_format or structured_outputs, not both"
                raise InvalidRequestError("structured_outputs", self.structured_outputs, why)
            return StructuredOutputsParams.make(self.structured_outputs)
        if asked is None:
            return None
        if asked.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if asked.json_schema is None or asked.json_schema.json_schema is None:
            raise InvalidRequestError("response_format.json_schema.schema", None, "is missing")
        return StructuredOutputsParams(json=asked.json_schema.json_schema)


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        "suffix": "put what comes before the gap into the prompt",
        "best_of": "ask for n samples and choose",
        "use_beam_search": "sample n times",
        "prompt_embeds": "send text or token ids",
        "truncate_prompt_tokens": "send a shorter prompt",
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), GUIDED),
    }
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool = True
    return_tokens_as_token_ids: bool | None = None


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChatCompletionRequest(SamplingBody):
    """POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        "functions": "tools=[...] does this",
        "function_call": "tool_choice does this",
        "audio": "this server makes text",
        "prediction": "leave it out",
        "web_search_options": "nothing is fetched for a request",
        "best_of": "ask for n samples and choose",
        "use_beam_search": "sample n times",
        "echo": "the prompt is yours already",
        "continue_final_message": "use /v1/completions for a text to go on with",
        "documents": "put them into a message",
        "mm_processor_kwargs": "this server reads text",
        "truncate_prompt_tokens": "send fewer messages",
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), GUIDED),
    }
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_tokens_as_token_ids: bool | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
