"""The child process of `Templates`: reads conversations and writes prompts, until its input ends.

Both ways a message is its length in 4 bytes, big-endian, and JSON. The first message in is
{"config", "deadline_s"}, and an empty one out says that it has been taken in.
"""

import json
import signal
import sys
from typing import Any, BinaryIO

from nanovllm.chat import render_chat
from nanovllm.errors import InvalidRequestError

MAX_MEMORY_BYTES = 2**30
MAX_TEXT_BYTES = 16 * 2**20


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to end
        signal.signal(number, signal.SIG_IGN)
    limit_resources()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    settings = read(source)
    write(sink, {})
    while (request := read(source)) is not None:
        # The parent kills a child that is late; this is for one that has lost its parent.
        set_alarm(settings["deadline_s"] + 1)
        reply = render(settings["config"], request)
        set_alarm(0)
        write(sink, reply)


def render(config: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """{"text"}, or {"field", "remedy"} of an invalid request, or {"failure"} of a template."""
    too_much = {"failure": f"took more than {MAX_MEMORY_BYTES} bytes of memory"}
    try:
        text = render_chat(
            config,
            request["messages"],
            chat_template=request["chat_template"],
            **request["names"],
        )
        if len(text.encode()) > MAX_TEXT_BYTES:
            remedy = f"chat template: makes a prompt of more than {MAX_TEXT_BYTES} bytes"
            return {"field": "messages", "remedy": remedy}
        return {"text": text}
    except InvalidRequestError as error:
        if isinstance(error.__cause__, MemoryError):
            return too_much
        return {"field": error.field, "remedy": error.remedy[:1000]}  # may quote a message
    except MemoryError:
        return too_much
    except UnicodeEncodeError as error:
        return {"field": "messages", "remedy": f"chat template: no valid Unicode ({error})"}


def limit_resources() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":  # elsewhere the limit is refused or means nothing
            resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def set_alarm(seconds: float) -> None:
    """End this process after so long, even in the midst of a C function; 0 takes it back."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)


def read(source: BinaryIO) -> Any:
    """The next message; None at the end of the input."""
    size = source.read(4)
    return json.loads(source.read(int.from_bytes(size, "big"))) if len(size) == 4 else None


def write(sink: BinaryIO, message: Any) -> None:
    data = json.dumps(message, ensure_ascii=False).encode(errors="replace")
    sink.write(len(data).to_bytes(4, "big") + data)
    sink.flush()


if __name__ == "__main__":
    main()
