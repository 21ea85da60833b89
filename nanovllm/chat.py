"""From a conversation to a prompt: the model's chat template, rendered in jinja2's sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.errors import InvalidRequestError
from nanovllm.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


def chat_prompts(
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A prompt, as text and token ids, for each conversation.

    Args:
        messages: a conversation or a list of them.
        chat_template, add_generation_prompt: see `render_chat`. chat_template_kwargs: more names
            for the template.
    """
    one = not messages or isinstance(messages, Mapping) or isinstance(messages[0], Mapping)
    names = {"add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
    prompts = []
    for conversation in [messages] if one else messages:
        text = render_chat(tokenizer.config, conversation, chat_template=chat_template, **names)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        prompts.append({"prompt": text, "prompt_token_ids": token_ids})
    return prompts


def render_chat(
    config: Mapping[str, Any],
    messages: Sequence[Message],
    /,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt for a conversation.

    Args:
        config: tokenizer_config.json; has the template and the special tokens it may name.
        chat_template: instead of the model's own. variables: more names for the template.

    Raises:
        InvalidRequestError: there is no message or no template, or it refuses the messages.
    """
    if not messages:
        raise InvalidRequestError("messages", messages, "must hold at least one message")
    source = chat_template or config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((t["template"] for t in source if t["name"] == "default"), None)
    if source is None:
        raise InvalidRequestError("chat_template", None, "the model has none; give one")
    names = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    names |= special_tokens(config) | variables
    try:
        return compiled(source).render(messages=messages, **names)
    except Exception as error:  # a template can fail in any way
        raise InvalidRequestError("messages", messages, f"chat template: {error}") from error


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, as templates know them."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


@lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """A template, parsed once: that takes longer than a rendering."""
    return sandbox().from_string(source)


def sandbox() -> ImmutableSandboxedEnvironment:
    """An environment in which templates can neither reach Python nor change what they are given,
    with the helpers that Hugging Face's templates expect."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment
