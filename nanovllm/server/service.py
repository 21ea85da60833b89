"""What the endpoints share: the engine and what goes with it, once they are there, and limits."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from nanovllm.async_llm import AsyncLLM
from nanovllm.checks import check_ids
from nanovllm.errors import EngineDeadError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.config import ServerConfig
from nanovllm.server.control_tokens import ControlTokens, new_mark
from nanovllm.server.guard import ServerState
from nanovllm.server.metrics import Metrics
from nanovllm.server.replicas.front import Replicas
from nanovllm.server.templates import Templates
from nanovllm.server.tools import decode_arguments, describe_tools, supports_tools

RESERVED = {"messages", "tools", "chat_template", "add_generation_prompt"}
ROLES = {"system", "user", "assistant", "tool", "developer"}


class UnknownModelError(HTTPException):
    """A request names a model that is not here."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What is there once the model is loaded.

    Attributes:
        chat_template: the operator's, or else the model's; None: there is none.
        defaults: sampling parameters of requests that bring none.
    """

    llm: AsyncLLM | Replicas
    metrics: Metrics | Replicas
    templates: Templates
    control_tokens: ControlTokens
    chat_template: str | None
    defaults: Mapping[str, Any]

    @property
    def max_num_tokens(self) -> int:
        return self.llm.engine.core.max_num_tokens

    def check_ids(self, token_ids: list[int]) -> None:
        """Refuse token ids that the model does not have."""
        check_ids(token_ids, SamplingParams(), self.llm.engine.vocab_size)

    def decode(self, token_ids: list[int]) -> str:
        return self.control_tokens.tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        """The text of each token alone."""
        texts = {token_id: self.decode([token_id]) for token_id in set(token_ids)}
        return [texts[token_id] for token_id in token_ids]

    def check_text(self, field: str, num_chars: int) -> None:
        """Refuse a text too long for any prompt, before time is spent on it."""
        most = self.control_tokens.longest * self.max_num_tokens
        if num_chars > most:
            why = f"{most} are more than {self.max_num_tokens} tokens, the most there may be"
            raise InvalidRequestError(field, f"{num_chars} characters", why)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.check_text("prompt", len(text))
        encode = self.control_tokens.tokenizer.encode
        return await self.llm.in_background(encode, text, add_special_tokens=add_special_tokens)

    async def render(
        self,
        messages: Items[Mapping[str, Any]],
        *,
        tools: Items[Mapping[str, Any]] = (),
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """A conversation as a prompt: its text and its token ids.

        Raises:
            InvalidRequestError: a message is impossible, or the template refuses it.
            TemplateError: the template failed.
        """
        if taken := RESERVED & (chat_template_kwargs or {}).keys():
            why = "is a name that the server sets itself"
            raise InvalidRequestError("chat_template_kwargs", min(taken), why)
        if len(messages) > self.max_num_tokens:
            why = f"{self.max_num_tokens} tokens are the most there may be"
            raise InvalidRequestError("messages", f"{len(messages)} messages", why)
        plain = decode_arguments([plain_message(m, i) for i, m in enumerate(messages)])
        self.check_text("messages", sum(len(message["content"]) for message in plain))
        source, mark = chat_template or self.chat_template, new_mark()
        if tools and not supports_tools(source):
            plain, tools = describe_tools(plain, tools), ()
        hidden = self.control_tokens.hide(plain, mark)
        text = await self.templates.render(
            hidden,
            tools=list(tools) or None,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **(chat_template_kwargs or {}),
        )
        shown = self.control_tokens.show(text, mark)
        self.check_text("messages", len(shown))
        token_ids = await self.llm.in_background(
            self.control_tokens.encode, text, mark, add_special_tokens=add_special_tokens
        )
        return shown, token_ids


@dataclass(slots=True)
class Service:
    """The state of a server.

    Attributes:
        model_names: under which the model goes; the first is the one shown.
        loaded: None until the model is there.
    """

    config: ServerConfig
    model_names: list[str]
    state: ServerState
    loaded: Engine | None = None
    started_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Engine:
        if self.loaded is None:
            raise EngineDeadError("the model is still being loaded: try again in a moment")
        return self.loaded

    @property
    def problem(self) -> str | None:
        """Why requests are not taken in, or not answered soon."""
        llm = self.loaded.llm if self.loaded else None
        return self.state.refusal or (llm.problem if isinstance(llm, Replicas) else None)

    def check_model(self, name: str | None) -> str:
        """The name under which the response shows the model.

        Raises:
            UnknownModelError: no model has the name that was asked for.
        """
        if name is not None and name not in self.model_names:
            known = ", ".join(self.model_names)
            why = f"The model `{name[:200]}` does not exist; here is: {known}"
            raise UnknownModelError(404, why)
        return name or self.model_names[0]

    def check_logprobs(self, **asked: int | None) -> None:
        """Hold the log probabilities that a request asks for to the server's limit."""
        most = self.config.max_logprobs
        for name, count in asked.items():
            if count is not None and not 0 <= count <= most:
                why = f"must be from 0 to {most} (the server's --max-logprobs)"
                raise InvalidRequestError(name, count, why)

    def check_room(self, name: str, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse an output that would be cut, as vLLM does."""
        most = self.engine.max_num_tokens
        if max_tokens is not None and num_prompt_tokens + max_tokens > most:
            why = f"with a prompt of {num_prompt_tokens} tokens, {most} is the most for both"
            raise InvalidRequestError(name, max_tokens, why)


def plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message with its content as one text.

    Raises:
        InvalidRequestError: it has an unknown role, or holds what is no text.
    """
    at, role, content = f"messages[{index}]", message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequestError(f"{at}.role", role, f"can be {', '.join(sorted(ROLES))}")
    if isinstance(content, list):
        content = "\n".join(plain_part(p, f"{at}.content[{i}]") for i, p in enumerate(content))
    if not isinstance(content, str | None):
        raise InvalidRequestError(f"{at}.content", content, "must be a text or a list of parts")
    if content is None and role != "assistant":
        raise InvalidRequestError(f"{at}.content", None, "is missing")
    role = "system" if role == "developer" else role
    return {**message, "role": role, "content": content or ""}


def plain_part(part: Any, at: str) -> str:
    """The text of a part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(kind) if kind in ("text", "refusal") else None
    if not isinstance(text, str):
        why = "only parts of type text are read; nothing is fetched"
        raise InvalidRequestError(f"{at}.type", kind, why)
    return text
