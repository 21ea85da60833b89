"""`nanovllm pull`: fetch a model, see that it can be read, and say where it is."""

import sys

from nanovllm.cli.flags import Parser
from nanovllm.config import DEFAULT_MODEL


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm pull",
        description="Fetch a model if it is not here yet, see that it can be read, and print "
        "where it is.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a hub id (owner/name, or owner/name:file.gguf), {DEFAULT_MODEL}, a folder or a "
        ".gguf file",
    )
    args = parser.parse_args(argv)

    from nanovllm.models.checkpoint import locate, open_tensors, read_config
    from nanovllm.models.registry import model_class

    path = locate(args.model)
    config = read_config(path)
    model_class(config.architecture)
    open_tensors(path, "auto")  # reads headers only
    print(
        f"{config.architecture}: {config.num_layers} layers of {config.hidden_size}, "
        f"{config.vocab_size} tokens, up to {config.max_model_len} positions, {config.dtype}",
        file=sys.stderr,
    )
    print(path)
    return 0
