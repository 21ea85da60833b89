"""`nanovllm serve`: an OpenAI-compatible server."""

import logging
import os
import sys
from dataclasses import replace

from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.config import EngineConfig
from nanovllm.errors import MissingDependencyError
from nanovllm.server.config import ServerConfig


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm serve",
        usage="nanovllm serve [MODEL] [flags]",
        description="Serve a model to OpenAI's clients. SIGTERM or Ctrl-C lets requests end.",
        epilog="--api-key may be repeated; --served-model-name takes all words up to the next "
        "flag.",
    )
    parser.add_argument("words", nargs="*", metavar="MODEL", help="the same as -m MODEL")
    add_flags(parser, ServerConfig)
    add_flags(parser, EngineConfig, skip=["skip_tokenizer_init"])
    args, words = parser.parse(argv)
    settings, config = given(args, EngineConfig), ServerConfig(**given(args, ServerConfig))
    if len(words) + ("model" in settings) > 1:
        parser.error("give one MODEL")
    if words:
        settings["model"] = words[0]
    EngineConfig.make(**settings)  # so that a bad value is found before torch is imported
    if key := os.environ.get("NANOVLLM_API_KEY"):
        config = replace(config, api_key=[*config.api_key, key])
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("nanovllm.server").setLevel(logging.INFO)
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "fastapi", "server", "the server") from error

    from nanovllm.server.run import listen, serve
    from nanovllm.server.run import run as run_loop

    # The engine's thread takes the interpreter back this often (5 ms is the default) while the
    # event loop is busy.
    sys.setswitchinterval(0.001)
    run_loop(serve(config, settings, listen(config.host, config.port)))
    return 0
