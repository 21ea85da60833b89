"""`nanovllm chat`: a conversation in the terminal."""

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from nanovllm.cli import report
from nanovllm.cli.complete import add_server_flags, request_fields
from nanovllm.cli.flags import Parser, add_flags, flag, given
from nanovllm.client import Client
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError, RequestFailedError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

DEFAULTS = {"temperature": 0.0, "max_tokens": 512}
NOT_HERE = ["seed", "n", "logprobs", "prompt_logprobs", "detokenize"]


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm chat",
        usage="nanovllm chat [MODEL] [--url URL] [--system-prompt TEXT] [flags]",
        description="Talk with a model. Takes the likeliest tokens; --temperature 1 samples.\n"
        "/reset starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.",
        epilog="A list (--stop, ...) is given by repeating its flag.",
    )
    parser.add_argument("words", nargs="*", metavar="MODEL", help="the same as -m MODEL")
    parser.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    add_server_flags(parser, None)
    add_flags(parser, EngineConfig, skip=["skip_tokenizer_init"])
    add_flags(parser, SamplingParams, skip=NOT_HERE, defaults=DEFAULTS)
    args, words = parser.parse(argv)
    settings, params = given(args, EngineConfig), given(args, SamplingParams)
    if len(words) + ("model" in settings) > 1:
        parser.error("give one MODEL; questions are typed in the chat")
    if words:
        settings["model"] = words[0]
    if args.url is None:
        talk_here(settings, SamplingParams(**params), args.system_prompt)
    else:
        others = [flag(name) for name in settings if name not in ("model", "seed")]
        if others:
            parser.error(f"{others[0]} is for a model here; the server at --url has its own")
        client = Client(args.url, args.api_key)
        seed = {"seed": settings["seed"]} if "seed" in settings else {}
        body = request_fields(params | seed)
        body["model"] = settings.get("model") or client.first_model()
        greet(f"{body['model']} at {client.url}")
        talk(ServerConversation(client, body, args.system_prompt))
    return 0


def talk_here(settings: dict[str, Any], params: SamplingParams, system_prompt: str | None) -> None:
    config = EngineConfig.make(**settings)  # so that a bad value is found before torch is imported

    from nanovllm.llm import LLM

    with LLM(**settings) as llm:
        greet(config.model)
        talk(LocalConversation(llm, params, system_prompt))


def greet(model: str) -> None:
    if sys.stdin.isatty():
        say(f"{model}: /reset starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer")


def talk(conversation: "Conversation") -> None:
    """Answer line after line, until /quit or the end of input."""
    for line in typed_lines():
        match line.strip():
            case "":
                pass
            case "/quit":
                return
            case "/reset":
                conversation.turns.clear()
                say("(starting over)")
            case text:
                try:
                    conversation.answer(text)
                except (InvalidRequestError, RequestFailedError) as error:
                    report(error)


class Conversation(ABC):
    """What was said, and how it goes on.

    Attributes:
        system: the system prompt, as a list of at most one message.
        turns: the messages after it: user, assistant, user, ...
    """

    def __init__(self, system_prompt: str | None) -> None:
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.turns: list[dict[str, str]] = []

    def answer(self, text: str) -> None:
        """Print the answer as it comes. Ctrl-C ends it; what has come stays in the conversation.

        Raises:
            InvalidRequestError, RequestFailedError: there is no answer; the question is dropped.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            shown, note = self.reply()
        except (InvalidRequestError, RequestFailedError):
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": shown})
        if note:
            say(note)

    @abstractmethod
    def reply(self) -> tuple[str, str]:
        """Print an answer to the last turn.

        Returns:
            the answer, and a note if it is not whole.
        """


class ServerConversation(Conversation):
    """With a model that a server runs.

    Args:
        body: what each request says but for its messages.
    """

    def __init__(self, client: Client, body: dict[str, Any], system_prompt: str | None) -> None:
        super().__init__(system_prompt)
        self.client, self.body = client, body

    def reply(self) -> tuple[str, str]:
        body = {**self.body, "messages": [*self.system, *self.turns]}
        shown, reason = "", None
        with closing(self.client.stream("/v1/chat/completions", body)) as chunks:
            try:
                for choice in (choice for chunk in chunks for choice in chunk["choices"]):
                    text = choice["delta"].get("content") or ""
                    shown += text
                    print(text, end="", flush=True)
                    reason = choice.get("finish_reason") or reason
            except KeyboardInterrupt:
                reason = "interrupt"
        print(flush=True)
        notes = {"length": "(cut; see --max-tokens)", "interrupt": "(stopped)"}
        return shown, notes.get(reason or "", "")


class LocalConversation(Conversation):
    """With a model of this process."""

    def __init__(self, llm: "LLM", params: SamplingParams, system_prompt: str | None) -> None:
        super().__init__(system_prompt)
        self.llm, self.params = llm, params

    def reply(self) -> tuple[str, str]:
        shown, reason = "", None
        with interruptible() as interrupts:
            for output in self.llm.stream(self.prompt(), self.params):
                sample = output.outputs[0]
                print(sample.text[len(shown) :], end="", flush=True)
                shown, reason = sample.text, sample.finish_reason
                if interrupts:
                    break  # drops the iterator, which aborts the request
        print(flush=True)
        match reason:
            case "error":
                raise RequestFailedError(f"no answer: {sample.stop_reason}")
            case "length":
                count = len(sample.token_ids)
                return shown, f"(cut after {count} tokens; see --max-tokens and --max-model-len)"
            case None:
                return shown, "(stopped)"
        return shown, ""

    def prompt(self) -> dict[str, Any]:
        """The conversation as a prompt. The oldest turns are dropped so that an answer fits in,
        but none if the question alone is too long."""
        from nanovllm.chat import chat_prompts

        limit = self.llm.engine.core.max_num_tokens
        room = min(self.params.max_tokens or limit, limit // 4)
        for dropped in range(0, len(self.turns), 2):
            turns = self.turns[dropped:]
            [prompt] = chat_prompts(self.llm.get_tokenizer(), [*self.system, *turns])
            if len(prompt["prompt_token_ids"]) + (room if len(turns) > 1 else 1) <= limit:
                if dropped:
                    say(f"(more than {limit} tokens: the {dropped} oldest messages are dropped)")
                self.turns = turns
                break
        return prompt


def typed_lines() -> Iterator[str]:
    """Lines of stdin, until it ends or Ctrl-C is pressed twice."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has history and editing
    terminal, interrupted = sys.stdin.isatty(), False
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt) as end:
            if interrupted or isinstance(end, EOFError):
                if terminal:
                    say("")  # the shell goes on in a line of its own
                return
            interrupted = True
            say("\n(Ctrl-C again, Ctrl-D or /quit ends the chat)")
        else:
            interrupted = False
            yield line


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C adds to the list yielded here, so that the step under way can end; a second one
    raises KeyboardInterrupt."""
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """A word of the program's own; stdout is for the model's."""
    print(text, file=sys.stderr, flush=True)
