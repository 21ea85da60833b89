"""Chat templates rendered in a process of their own, where one that loops or grows can be killed.

A template is a program that came with the model. jinja2's sandbox bounds what it can reach, but
neither its time nor its memory, and a thread cannot be stopped.
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from nanovllm.chat import Message
from nanovllm.errors import InvalidRequestError, TemplateError

START_S = 60.0  # that a child may take to start on a busy machine; 0.15 is usual


class Templates:
    """Renders the conversations of all requests, one after another, in one child process.

    The child starts with the first one. It is killed when a rendering is late or its caller is
    cancelled, since what it would say next has no reader, and the next rendering gets a new one.

    Args:
        config: tokenizer_config.json, as for `nanovllm.chat.render_chat`.
        deadline_s: what a rendering may take.
    """

    def __init__(self, config: Mapping[str, Any], *, deadline_s: float = 2.0) -> None:
        names = [name for name in config if name == "chat_template" or name.endswith("_token")]
        self.settings = {"config": {name: config[name] for name in names}, "deadline_s": deadline_s}
        self.deadline_s = deadline_s
        self.lock = asyncio.Lock()
        self.child: Process | None = None
        self.is_closed = False

    async def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **chat_template_kwargs: Any,
    ) -> str:
        """The prompt for a conversation, as `nanovllm.chat.render_chat` makes it.

        Args:
            chat_template_kwargs: more names for the template.

        Raises:
            InvalidRequestError: the template refuses the messages, or they are no valid Unicode.
            TemplateError: the template took too long or too much memory, or its process died.
        """
        names = {**chat_template_kwargs, "tools": tools}
        names["add_generation_prompt"] = add_generation_prompt
        try:
            request = encode({"messages": messages, "chat_template": chat_template, "names": names})
        except (ValueError, TypeError, RecursionError) as error:
            remedy = f"is no JSON or no valid Unicode ({error})"
            raise InvalidRequestError("messages", messages, remedy) from error
        reply = await self._ask(request)
        if "text" in reply:
            return str(reply["text"])
        if "failure" in reply:
            raise TemplateError(f"chat template: {reply['failure']}")
        value = messages if reply["field"] == "messages" else chat_template
        raise InvalidRequestError(reply["field"], value, reply["remedy"])

    async def close(self) -> None:
        """End the child; renderings under way or to come raise TemplateError."""
        self.is_closed = True
        await self._kill()

    async def _ask(self, request: bytes) -> dict[str, Any]:
        async with self.lock:
            try:
                child = self.child
                if child is None or child.returncode is not None:
                    child = await self._start()
                reply = await exchange(child, request, self.deadline_s)
                if "failure" in reply:  # its memory may be in pieces
                    await self._kill()
                return reply
            except BaseException:
                await self._kill()
                raise

    async def _start(self) -> Process:
        self._check_open()
        paths = os.pathsep.join(map(os.path.abspath, sys.path))  # what this process can import
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "nanovllm.server.render"),
            stdin=PIPE,
            stdout=PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.child = child
        self._check_open()  # it may have been closed meanwhile
        await exchange(child, encode(self.settings), START_S)
        return child

    def _check_open(self) -> None:
        if self.is_closed:
            raise TemplateError("chat template: the server is closing")

    async def _kill(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def exchange(child: Process, request: bytes, deadline_s: float) -> dict[str, Any]:
    """Send a message to the child and wait for its answer.

    Raises:
        TemplateError: there is none by the deadline, or ever.
    """
    assert child.stdin is not None and child.stdout is not None
    try:
        async with asyncio.timeout(deadline_s):
            child.stdin.write(request)
            await child.stdin.drain()
            size = int.from_bytes(await child.stdout.readexactly(4), "big")
            reply: dict[str, Any] = json.loads(await child.stdout.readexactly(size))
            return reply
    except TimeoutError as error:
        raise TemplateError(f"chat template: took more than {deadline_s:g} s") from error
    except (EOFError, ConnectionError) as error:
        raise TemplateError("chat template: its process died") from error


def encode(message: Any) -> bytes:
    """A message as the child reads it.

    Raises:
        ValueError, TypeError, RecursionError: it cannot be written as JSON in UTF-8.
    """
    data = json.dumps(message, ensure_ascii=False).encode()
    return len(data).to_bytes(4, "big") + data
