"""Perplexity: which tokens are scored, and the number that comes out."""

from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.errors import InvalidRequestError, RequestFailedError
from nanovllm.llm import LLM
from nanovllm.outputs import Logprob
from nanovllm.perplexity import cut, perplexity
from tests.models.test_families import make_reference

WINDOWS = [[(37 * i + 11 * seed + 5) % 199 for i in range(length)] for seed, length in
           enumerate((13, 2, 1, 30))]  # fmt: skip


class Fake:
    """An engine for which each token has the probability 1 / (1 + its id)."""

    def __init__(self, finish_reason: str = "length") -> None:
        self.finish_reason = finish_reason

    def generate(self, windows: list[list[int]], params: Any, use_tqdm: bool) -> list[Any]:
        assert params.prompt_logprobs == 0
        return [self.output(window) for window in windows]

    def output(self, window: list[int]) -> Any:
        known = [{i: Logprob(-log(1 + i), 1, None)} for i in window[1:]]
        sample = SimpleNamespace(finish_reason=self.finish_reason, stop_reason="broken")
        return SimpleNamespace(
            request_id="0", prompt_token_ids=window, prompt_logprobs=[None, *known],
            outputs=[sample],
        )  # fmt: skip


def test_it_is_the_inverse_of_the_mean_probability_of_a_token() -> None:
    assert perplexity(Fake(), [[9, 1]]) == (1, pytest.approx(2))
    assert perplexity(Fake(), [[9, 1, 7]]) == (2, pytest.approx(4))  # sqrt(2 · 8)
    assert perplexity(Fake(), [[9, 1, 7], [5, 3, 0]]) == (4, pytest.approx(64**0.25))


def test_the_first_token_of_each_window_is_given_and_not_scored() -> None:
    assert perplexity(Fake(), [[0, 3], [500, 3], [7]]) == (2, pytest.approx(4))


def test_it_is_what_transformers_logits_say(tmp_path: Path) -> None:
    theirs = make_reference("llama", {"num_hidden_layers": 2})
    theirs.save_pretrained(tmp_path)
    logprobs = []
    for window in WINDOWS:
        ids = torch.tensor([window])
        with torch.inference_mode():
            found = theirs(ids).logits[0, :-1].double().log_softmax(-1)
        logprobs.append(found.gather(1, ids[0, 1:, None]))
    expected = torch.cat(logprobs).mean().neg().exp().item()
    settings = {"skip_tokenizer_init": True, "num_kv_blocks": 8, "max_num_batched_tokens": 8}
    with LLM(tmp_path, **settings, max_num_seqs=8) as llm:
        assert perplexity(llm, WINDOWS) == (12 + 1 + 0 + 29, pytest.approx(expected, rel=1e-5))


def test_windows_without_a_token_to_score_are_refused() -> None:
    for windows in ([], [[]], [[3], [4]]):
        with pytest.raises(InvalidRequestError, match="a window needs two tokens to score one"):
            perplexity(Fake(), windows)


def test_a_window_that_fails_is_not_left_out_silently() -> None:
    with pytest.raises(RequestFailedError, match="request 0: broken"):
        perplexity(Fake("error"), [[1, 2]])


def test_a_text_is_cut_into_windows_and_a_single_token_left_is_dropped() -> None:
    ids = list(range(9))
    assert cut(ids, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(ids, 7) == [[0, 1, 2, 3, 4, 5, 6], [7, 8]]
    assert cut(ids, 9) == cut(ids, 100) == [ids]
    assert cut([5], 4) == cut([], 4) == []
