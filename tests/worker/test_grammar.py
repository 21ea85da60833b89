"""Grammars: the logits that a form leaves, token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.errors import RequestFailedError
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.tokenizer import Tokenizer
from nanovllm.worker.grammar import Grammars
from nanovllm.worker.sampler import sample
from tests.models.gguf_files import write_gguf
from tests.worker.rows import Row, row

EOS, VOCAB_SIZE = 2, 49_152 + 100  # the head is padded
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture
def grammars(smollm2: Path) -> Grammars:
    return Grammars(smollm2, [EOS], VOCAB_SIZE)


@pytest.fixture
def ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return tokenizer.encode


def with_form(output: list[int] | None = None, stop: list[int] | None = None, **form: Any) -> Row:
    params = {name: form.pop(name) for name in ("min_tokens",) if name in form}
    spec = StructuredOutputsParams(**form)
    return row(PROMPT, output, stop, structured_outputs=spec, **params)


def left(grammars: Grammars, seq: Row) -> list[int]:
    """The tokens that may come next."""
    logits_V = torch.zeros(VOCAB_SIZE)
    grammars.restrict(logits_V, *seq)
    return logits_V.isfinite().nonzero().flatten().tolist()


def grown(seq: Row, *token_ids: int) -> Row:
    """The same sequence, longer."""
    return seq[0], np.concatenate([seq[1], np.array(token_ids, np.int64)])


def texts(tokenizer: Tokenizer, token_ids: list[int]) -> set[str]:
    return {tokenizer.decode([i], skip_special_tokens=False) for i in token_ids}


def test_tokens_are_taken_in_as_the_sequence_grows(
    grammars: Grammars, tokenizer: Tokenizer, ids: Any
) -> None:
    seq = with_form(choice=["no", "nine"])
    assert texts(tokenizer, left(grammars, seq)) == {"n", "ni", "nin", "no", "nine"} & texts(
        tokenizer, list(range(49_152))
    )
    seq = grown(seq, *ids("no"))
    assert left(grammars, seq) == [EOS]
    assert left(grammars, seq) == [EOS]  # asking again takes nothing in again


def test_the_prompt_is_not_part_of_the_output(grammars: Grammars, ids: Any) -> None:
    first, second = with_form(choice=["no"]), with_form(choice=["no"])
    assert left(grammars, first) == left(grammars, second)


def test_an_end_may_come_only_when_the_output_is_complete(grammars: Grammars, ids: Any) -> None:
    [a], [stop] = ids("a"), ids("!")
    seq = with_form(None, [EOS, stop], regex="aa*")
    assert {EOS, stop} & set(left(grammars, seq)) == set()
    assert {EOS, stop, a} <= set(left(grammars, grown(seq, a)))


def test_a_token_that_would_go_on_but_is_an_end_waits_until_the_output_is_complete(
    grammars: Grammars, ids: Any
) -> None:
    [b] = ids("b")
    seq = with_form(None, [EOS, b], regex="ab?")
    assert b not in left(grammars, seq)
    assert b in left(grammars, grown(seq, *ids("a")))


def test_after_an_end_that_does_not_count_only_ends_follow(grammars: Grammars, ids: Any) -> None:
    seq = grown(with_form(regex="a+"), *ids("a"), EOS)  # ignore_eos: EOS is no stop token
    assert left(grammars, seq) == [EOS]
    assert left(grammars, grown(seq, EOS, EOS)) == [EOS]


def test_padding_and_special_tokens_are_never_left(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    everything = left(grammars, with_form(regex=r"(?s:.+)"))
    assert max(everything) < 49_152
    assert not set(everything) & set(range(17))  # SmolLM2's control tokens
    assert len(everything) > 48_000


def test_a_sequence_that_is_back_is_followed_from_its_whole_output(
    grammars: Grammars, ids: Any
) -> None:
    form: dict[str, Any] = {"regex": "[a-c]{2}[0-9]"}
    seq = with_form(**form)
    left(grammars, seq)
    straight = left(grammars, grown(seq, *ids("a"), *ids("b")))
    grammars.forget([0])
    back = with_form(**form)
    assert left(grammars, grown(back, *ids("a"), *ids("b"))) == straight
    returned = with_form(**form)  # another sequence under the same id, even if none was forgotten
    assert left(grammars, grown(returned, *ids("a"), *ids("b"))) == straight


def test_a_form_is_compiled_once_and_each_sequence_goes_its_own_way(
    grammars: Grammars, ids: Any
) -> None:
    first, second = with_form(regex="[ab][0-9]"), with_form(regex="[ab][0-9]")
    beginning = left(grammars, first)
    left(grammars, grown(first, *ids("a")))
    assert left(grammars, second) == beginning
    assert grammars.beginning.cache_info().misses == 1


def test_forgetting_an_unknown_sequence_is_no_error(grammars: Grammars) -> None:
    left(grammars, with_form(regex="a"))
    grammars.forget([7, 0, 0])
    assert grammars.progress == {}


def test_min_tokens_keeps_an_output_going_while_it_can(grammars: Grammars, ids: Any) -> None:
    [a] = ids("a")
    seq = grown(with_form(None, [EOS], regex="a+", min_tokens=3), a)
    assert EOS not in left(grammars, seq) and a in left(grammars, seq)
    assert EOS in left(grammars, grown(seq, a, a))


def test_a_complete_output_ends_whatever_min_tokens_says(grammars: Grammars, ids: Any) -> None:
    [stop] = ids("!")
    seq = grown(with_form(None, [EOS, stop], regex="a", min_tokens=3), *ids("a"))
    assert left(grammars, seq) == sorted([EOS, stop])


def test_the_tokens_are_read_once_in_a_process(smollm2: Path, grammars: Grammars) -> None:
    assert grammars.vocabulary is Grammars(smollm2, [], VOCAB_SIZE).vocabulary


def test_a_model_without_an_end_is_an_error(smollm2: Path, ids: Any) -> None:
    seq = grown(with_form(regex="a"), *ids("a"))
    with pytest.raises(RequestFailedError, match="the model has no end"):
        left(Grammars(smollm2, [], VOCAB_SIZE), seq)


def test_a_form_that_gets_too_costly_ends_its_row_only(grammars: Grammars, ids: Any) -> None:
    costly = with_form([ids("a")[0]] * 60, regex="(?:(?:a{0,500}){0,500}){0,500}")
    rows = [row(temperature=0), costly, row(temperature=0, top_k=3)]
    logits_RV = torch.zeros(3, VOCAB_SIZE)
    logits_RV[:, 9] = 1
    samples = sample(logits_RV, rows, grammars)
    assert samples.token_ids == [9, -1, 9]
    assert list(samples.errors) == [1]
    assert "too many expressions" in samples.errors[1]


def test_a_tokenizer_that_cannot_be_read_ends_the_row_only(tmp_path: Path) -> None:
    rows = [with_form(regex="a"), row(temperature=0)]
    samples = sample(torch.zeros(2, VOCAB_SIZE), rows, Grammars(tmp_path, [EOS], VOCAB_SIZE))
    assert samples.token_ids == [-1, 0]
    assert "tokenizer.json: missing" in samples.errors[0]


def test_sentencepiece_and_gguf_tokenizers(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "▁a", "a", "b", "ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(9)],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1],
        "tokenizer.ggml.eos_token_id": 2,
    }
    grammars = Grammars(write_gguf(tmp_path / "tiny.gguf", metadata, {}), [2], 9)
    seq, _ = with_form(regex=r" ?a b*\n")

    def after(*output: int) -> set[str]:
        logits_V = torch.zeros(9)
        grammars.restrict(logits_V, seq, np.array([*PROMPT, *output]))
        return {pieces[i] for i in logits_V.isfinite().nonzero().flatten().tolist()}

    assert after() == {"▁", "▁a", "a"}
    assert after(5, 4) == {"b", "<0x0A>"}
    assert after(5, 4, 7, 3) == {"</s>"}


def test_a_bias_and_a_penalty_bring_nothing_back(grammars: Grammars, ids: Any) -> None:
    [a], [b], [c] = ids("a"), ids("b"), ids("c")
    spec = StructuredOutputsParams(regex="[ab]")
    biased = row(PROMPT, temperature=0, logit_bias={c: 100.0, b: 1.0}, structured_outputs=spec)
    assert sample(torch.zeros(1, VOCAB_SIZE), [biased], grammars).token_ids == [b]
    params = SamplingParams(temperature=0, repetition_penalty=0.1, structured_outputs=spec)
    assert params.plain is False
    allowed = row(PROMPT, temperature=0, allowed_token_ids=[a, c], structured_outputs=spec)
    assert sample(torch.zeros(1, VOCAB_SIZE), [allowed], grammars).token_ids == [a]
