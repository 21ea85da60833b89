"""`nanovllm complete`: complete prompts at a server, and show the text as it comes."""

import sys
from typing import Any

from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.client import DEFAULT_URL, Client
from nanovllm.sampling_params import SamplingParams

DEFAULTS = {"temperature": 0.0, "max_tokens": 128}
NOT_HERE = ["n", "logprobs", "prompt_logprobs", "detokenize"]


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm complete",
        usage="nanovllm complete PROMPT... [--url URL] [flags]",
        description="Complete prompts at a server, one after the other, and show the text as it "
        f"comes.\nTakes the likeliest tokens, {DEFAULTS['max_tokens']} at most; --temperature 1 "
        "samples.",
        epilog="A list (--stop, ...) is given by repeating its flag. After `--` all words are "
        "prompts.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="PROMPT...", help="the PROMPT - is read from stdin"
    )
    add_server_flags(parser, DEFAULT_URL)
    parser.add_argument("-m", "--model", metavar="NAME", help="default: the server's first")
    add_flags(parser, SamplingParams, skip=NOT_HERE, defaults=DEFAULTS)
    args, words = parser.parse(argv)
    if not words:
        parser.error("PROMPT is missing")
    body = request_fields(given(args, SamplingParams))
    client = Client(args.url, args.api_key)
    body["model"] = args.model or client.first_model()
    for word in words:
        prompt = sys.stdin.read().rstrip("\n") if word == "-" else word
        if len(words) > 1:
            print(f"> {prompt}")
        for chunk in client.stream("/v1/completions", {**body, "prompt": prompt}):
            for choice in chunk["choices"]:
                print(choice["text"], end="", flush=True)
        print("\n" if len(words) > 1 else "")
    return 0


def add_server_flags(parser: Parser, url: str | None) -> None:
    """Flags that say which server is asked; `url` is the default."""
    shown = "" if url is None else f" (default: {url})"
    parser.add_argument("--url", default=url, help=f"of a server that speaks OpenAI's API{shown}")
    parser.add_argument(
        "--api-key", metavar="KEY", help="default: the environment's OPENAI_API_KEY, if any"
    )


def request_fields(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters that were given, as fields of a request.

    Raises:
        InvalidRequestError: a value is out of its range.
    """
    SamplingParams(**params)  # so that a bad value is found before a server is asked
    return {name: value for name, value in params.items() if value is not None}
