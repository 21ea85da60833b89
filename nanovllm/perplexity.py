"""How well a model knows a text: the perplexity, e to the mean negative log probability of a token
given those before it in its window."""

from collections.abc import Sequence
from math import exp, fsum
from typing import TYPE_CHECKING

from nanovllm.errors import InvalidRequestError, RequestFailedError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM


def cut(token_ids: Sequence[int], context: int) -> list[list[int]]:
    """A text in windows of `context` tokens, one after the other; the last may be shorter. A rest
    of a single token, which would only be given, is left out."""
    starts = range(0, len(token_ids) - 1, context)
    return [list(token_ids[start : start + context]) for start in starts]


def perplexity(llm: "LLM", windows: Sequence[list[int]]) -> tuple[int, float]:
    """The perplexity over windows of token ids. The first token of each is given, not scored.

    Returns:
        how many tokens were scored, and their perplexity.

    Raises:
        InvalidRequestError: no window has a token to score, or one is too long for the engine.
        RequestFailedError: a window could not be computed.
    """
    if not any(len(window) > 1 for window in windows):
        raise InvalidRequestError("windows", windows, "a window needs two tokens to score one")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    logprobs = []
    for output in llm.generate(windows, params, use_tqdm=False):
        sample = output.outputs[0]
        if sample.finish_reason == "error" or output.prompt_logprobs is None:
            raise RequestFailedError(f"request {output.request_id}: {sample.stop_reason}")
        pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        logprobs += [entry[token_id].logprob for token_id, entry in pairs if entry is not None]
    return len(logprobs), exp(-fsum(logprobs) / len(logprobs))
