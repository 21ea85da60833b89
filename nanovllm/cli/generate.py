"""`nanovllm generate`: complete prompts, all in one batch."""

import json
import sys
from dataclasses import asdict
from os.path import expanduser, isdir

from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.config import DEFAULT_MODEL, EngineConfig
from nanovllm.errors import RequestFailedError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

DEFAULTS = {"temperature": 0.0, "max_tokens": 128}


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm generate",
        usage="nanovllm generate [MODEL] PROMPT... [--json] [flags]",
        description="Complete prompts, all in one batch. Takes the likeliest tokens, "
        f"{DEFAULTS['max_tokens']} at most;\n--temperature 1 samples as vLLM does by default.",
        epilog="A list (--stop, ...) is given by repeating its flag. After `--` all words are "
        "prompts.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL] PROMPT...",
        help="the first word is the MODEL if more follow and it is a folder, built in "
        f"({DEFAULT_MODEL}), or has a / or ends in .gguf and has no spaces; -m MODEL leaves no "
        "doubt. The PROMPT - is read from stdin",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object per request")
    add_flags(parser, EngineConfig, skip=["skip_tokenizer_init"])
    add_flags(parser, SamplingParams, skip=["seed"], defaults=DEFAULTS)
    args, words = parser.parse(argv)
    settings, params = given(args, EngineConfig), SamplingParams(**given(args, SamplingParams))
    if "model" not in settings and len(words) > 1 and names_model(words[0]):
        settings["model"] = words.pop(0)
    if not words:
        parser.error("PROMPT is missing")
    EngineConfig.make(**settings)  # so that a bad value is found before torch is imported
    prompts = [sys.stdin.read().rstrip("\n") if word == "-" else word for word in words]

    from nanovllm.llm import LLM

    with LLM(**settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
    for output in outputs:
        show(output, as_json=args.json, with_prompt=len(outputs) > 1)
    for output in outputs:
        for sample in output.outputs:
            if sample.finish_reason == "error":
                raise RequestFailedError(f"request {output.request_id}: {sample.stop_reason}")
    return 0


def names_model(word: str) -> bool:
    """Whether the first of several words is a model's name and not a prompt."""
    path_like = ("/" in word or word.endswith(".gguf")) and not any(map(str.isspace, word))
    return path_like or word == DEFAULT_MODEL or isdir(expanduser(word))


def show(output: RequestOutput, *, as_json: bool, with_prompt: bool) -> None:
    if as_json:
        print(json.dumps(asdict(output), ensure_ascii=False))
        return
    if with_prompt:
        print(f"> {output.prompt}")
    for sample in output.outputs:
        print(sample.text)
    if with_prompt:
        print()
