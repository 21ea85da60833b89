"""The `nanovllm` command. Each command is a module here with a `run`, imported when it is asked
for; none imports torch before its flags are read and found to be good."""

import os
import sys
from importlib import import_module

from nanovllm import __version__
from nanovllm.cli.flags import Parser
from nanovllm.errors import FieldError, NanoVLLMError

COMMANDS = {
    "generate": "complete prompts",
    "serve": "serve a model to OpenAI's clients",
    "chat": "talk with a model, here or at a server",
    "complete": "complete prompts at a server",
    "pull": "fetch a model, or see that it is there and can be read",
    "bench": "measure throughput, latency, the time to start, or a server",
    "eval-ppl": "measure how well a model knows a text: its perplexity",
    "simulate": "serve a workload in virtual time, on hardware that need not be here",
    "calibrate": "fit the simulator to measured requests",
    "sweep": "simulate a grid of settings and compare them",
    "advise": "find the cheapest setting that meets latency targets",
    "replay": "run a recording again under another policy, settings or hardware",
    "explain": "say in words what an engine did, from a recording of it",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `nanovllm`; None takes them from the command line.

    Returns:
        the exit status: 0; 1 if a model or a request failed; 2 if a flag or prompt is
        impossible; 130 after Ctrl-C.

    Raises:
        SystemExit: --help and --version (0), or words that no command understands (2).
    """
    words = sys.argv[1:] if argv is None else argv
    listing = "".join(f"\n  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="nanovllm",
        description="An LLM inference engine to read, change and run.",
        epilog=f"commands:{listing}\n\n`nanovllm COMMAND --help` shows the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    command = parser.parse_args(words[:1]).command
    try:
        status: int = import_module(f"nanovllm.cli.{command.replace('-', '_')}").run(words[1:])
        sys.stdout.flush()
        return status
    except NanoVLLMError as error:
        report(error)
        return 2 if isinstance(error, FieldError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `nanovllm generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def report(error: NanoVLLMError) -> None:
    """One line on stderr."""
    print(f"nanovllm: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
