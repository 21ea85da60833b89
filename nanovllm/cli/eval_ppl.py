"""`nanovllm eval-ppl`: the perplexity of texts, to see what a format of the weights costs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.checks import check_fields, ranged
from nanovllm.cli.bench import check_writable, write
from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from nanovllm.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is evaluated.

    Args:
        context: tokens of a window; each text is cut into windows, and the first token of each is
            given, not scored.
        json: the file to write the result to.

    Raises:
        ConfigError: a value is impossible.
    """

    context: int = ranged(512, 2, 2**24)
    json: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        check_writable("json", self.json)


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm eval-ppl",
        usage="nanovllm eval-ppl FILE... [--context N] [--json FILE] [flags]",
        description="Measure the perplexity of texts: e to the mean negative log probability of a "
        "token.\nLower is better; only figures of one tokenizer and one context compare.",
    )
    parser.add_argument("words", nargs="*", metavar="FILE", help="a text in UTF-8")
    add_flags(parser, Evaluation)
    add_flags(parser, EngineConfig, skip=["skip_tokenizer_init"])
    args, files = parser.parse(argv)
    settings, evaluation = given(args, EngineConfig), Evaluation(**given(args, Evaluation))
    if not files:
        parser.error("FILE is missing")
    config = EngineConfig.make(**settings)  # a bad value is found before torch is imported
    texts = [read(file) for file in files]

    from nanovllm.llm import LLM
    from nanovllm.perplexity import cut, perplexity

    with LLM(**settings) as llm:
        encode = llm.get_tokenizer().encode
        windows = [window for text in texts for window in cut(encode(text), evaluation.context)]
        if not windows:
            raise InvalidRequestError("FILE", " ".join(files), "holds fewer than two tokens")
        check_fit(llm, windows, evaluation.context)
        num_tokens, value = perplexity(llm, windows)
    print(f"Tokens scored: {num_tokens}\nPerplexity: {value:.4f}")
    result = {
        "perplexity": value,
        "num_tokens": num_tokens,
        "context": evaluation.context,
        "model": config.model,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "files": files,
    }
    write(evaluation.json, result)
    return 0


def read(file: str) -> str:
    """The text in a file.

    Raises:
        InvalidRequestError: it cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError("FILE", file, f"name a text in UTF-8 ({error})") from error


def check_fit(llm: "LLM", windows: list[list[int]], context: int) -> None:
    """Refuse windows that leave the engine no room for the token it makes after them.

    Raises:
        ConfigError: names the longest that fits.
    """
    most = llm.engine.core.max_num_tokens - 1
    if max(map(len, windows)) > most:
        raise ConfigError("context", context, f"{most} is the most here (see --max-model-len)")
