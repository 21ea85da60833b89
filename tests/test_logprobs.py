"""Log probabilities end to end: vLLM's format, transformers' values, and all of them there whatever
the scheduler does. A small random Llama with a vocabulary of 199, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.core.plan import TokenLogprobs
from nanovllm.llm import LLM
from nanovllm.logprobs import show_logprobs
from nanovllm.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer
from tests.models.test_families import make_reference

VOCAB_SIZE = 199
PROMPTS = [[(37 * i + 11 * seed + 5) % VOCAB_SIZE for i in range(13)] for seed in range(4)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return make_reference("llama", {"num_hidden_layers": 2})


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with make_llm(folder) as engine:
        yield engine


def make_llm(folder: Path, **settings: Any) -> LLM:
    small = {"num_kv_blocks": 64, "block_size": 4, "attention_backend": "reference"}
    return LLM(str(folder), skip_tokenizer_init=True, **small | settings)


def params(max_tokens: int = 6, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens} | options)


def generate(
    llm: LLM, prompts: list[list[int]], options: SamplingParams | list[SamplingParams]
) -> list[RequestOutput]:
    return llm.generate(prompts, options, use_tqdm=False)


def one(llm: LLM, prompt: list[int], **options: Any) -> tuple[RequestOutput, CompletionOutput]:
    [request] = generate(llm, [prompt], params(**options))
    return request, request.outputs[0]


def theirs_logprobs(theirs: Any, token_ids: list[int]) -> Tensor:
    """Row i: of the token after the first i + 1."""
    with torch.inference_mode():
        return theirs(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def assert_like(entries: Logprobs, logprobs_V: Tensor, token_id: int, num_top: int) -> None:
    """The entries of one position are those of a distribution: this token, then the likeliest."""
    top = logprobs_V.argsort(descending=True).tolist()
    assert list(entries) == list(dict.fromkeys([token_id, *top[:num_top]]))
    for key, entry in entries.items():
        assert entry.rank == top.index(key) + 1
        assert entry.logprob == pytest.approx(logprobs_V[key].item(), abs=1e-4)


def assert_same(found: RequestOutput, expected: RequestOutput) -> None:
    """Every log probability of two runs of a request."""

    def flat(request: RequestOutput) -> list[tuple[int, int, int, float]]:
        positions: list[Any] = list(request.prompt_logprobs or ())
        for completion in request.outputs:
            positions += completion.logprobs or ()
        return [
            (place, key, entry.rank, entry.logprob)
            for place, entries in enumerate(positions)
            for key, entry in (entries or {}).items()
        ]

    assert [output.token_ids for output in found.outputs] == [
        output.token_ids for output in expected.outputs
    ]
    mine, others = flat(found), flat(expected)
    assert [entry[:3] for entry in mine] == [entry[:3] for entry in others]
    assert [entry[3] for entry in mine] == pytest.approx([entry[3] for entry in others], abs=1e-4)


# Format and values


@pytest.mark.parametrize("num_top", [0, 1, 3, -1])
def test_logprobs_are_those_of_transformers(llm: LLM, theirs: Any, num_top: int) -> None:
    _, output = one(llm, PROMPTS[0], logprobs=num_top)
    expected = theirs_logprobs(theirs, PROMPTS[0] + output.token_ids)
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) == 6
    for i, (token_id, entries) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        row = expected[len(PROMPTS[0]) - 1 + i]
        assert_like(entries, row, token_id, VOCAB_SIZE if num_top < 0 else num_top)
        assert entries[token_id].rank == 1


@pytest.mark.parametrize("num_top", [0, 1, 3, -1])
def test_prompt_logprobs_are_those_of_transformers(llm: LLM, theirs: Any, num_top: int) -> None:
    request, _ = one(llm, PROMPTS[0], prompt_logprobs=num_top)
    expected = theirs_logprobs(theirs, PROMPTS[0])
    assert request.prompt_logprobs is not None
    assert len(request.prompt_logprobs) == len(PROMPTS[0])
    assert request.prompt_logprobs[0] is None
    for i, token_id in enumerate(PROMPTS[0][1:]):
        entries = request.prompt_logprobs[i + 1]
        assert entries is not None
        assert_like(entries, expected[i], token_id, VOCAB_SIZE if num_top < 0 else num_top)


def test_a_prompt_of_one_token_has_nothing_to_tell(llm: LLM) -> None:
    request, _ = one(llm, [7], prompt_logprobs=2)
    assert request.prompt_logprobs == [None]


def test_without_a_word_there_are_none(llm: LLM) -> None:
    request, output = one(llm, PROMPTS[0])
    assert (request.prompt_logprobs, output.logprobs, output.cumulative_logprob) == (None,) * 3


def test_the_cumulative_logprob_is_the_sum_over_the_sampled_tokens(llm: LLM, theirs: Any) -> None:
    _, output = one(llm, PROMPTS[1], logprobs=0, temperature=1.5, seed=3, max_tokens=12)
    expected = theirs_logprobs(theirs, PROMPTS[1] + output.token_ids)[len(PROMPTS[1]) - 1 : -1]
    picked = expected[range(12), output.token_ids]
    assert output.cumulative_logprob == pytest.approx(picked.sum().item(), abs=1e-3)
    assert output.logprobs is not None
    ranks = [entries[t].rank for t, entries in zip(output.token_ids, output.logprobs, strict=True)]
    assert max(ranks) > 1  # else the draws are no test


def test_logprobs_are_the_models_own_whatever_changes_the_choice(llm: LLM, theirs: Any) -> None:
    changes: list[dict[str, Any]] = [
        {"temperature": 2.0, "seed": 1, "top_k": 50},
        {"repetition_penalty": 3.0, "presence_penalty": 1.0, "frequency_penalty": 1.0},
        {"allowed_token_ids": [3, 4, 5]},
        {"logit_bias": {9: 100.0}},
        {},
    ]
    options = [params(logprobs=2, **change) for change in changes]
    for request in generate(llm, [PROMPTS[2]] * len(changes), options):
        [output] = request.outputs
        expected = theirs_logprobs(theirs, PROMPTS[2] + output.token_ids)
        for i, token_id in enumerate(output.token_ids):
            assert output.logprobs is not None
            assert_like(output.logprobs[i], expected[len(PROMPTS[2]) - 1 + i], token_id, 2)


def test_requests_of_one_batch_get_what_each_asked_for(llm: LLM) -> None:
    wishes: list[dict[str, Any]] = [
        {},
        {"logprobs": 1},
        {"prompt_logprobs": 2},
        {"logprobs": -1, "prompt_logprobs": 0},
    ]
    together = generate(llm, PROMPTS, [params(**wish) for wish in wishes])
    for prompt, wish, found in zip(PROMPTS, wishes, together, strict=True):
        expected, _ = one(llm, prompt, **wish)
        assert_same(found, expected)
        assert (found.prompt_logprobs is None) == ("prompt_logprobs" not in wish)
        assert (found.outputs[0].logprobs is None) == ("logprobs" not in wish)


def test_each_sample_has_its_own_and_the_prompt_has_one(llm: LLM, theirs: Any) -> None:
    request, _ = one(llm, PROMPTS[3], n=3, temperature=1.0, seed=5, logprobs=1, prompt_logprobs=1)
    assert request.prompt_logprobs is not None and len(request.prompt_logprobs) == 13
    assert len({tuple(output.token_ids) for output in request.outputs}) > 1
    for output in request.outputs:
        expected = theirs_logprobs(theirs, PROMPTS[3] + output.token_ids)
        assert output.logprobs is not None
        for i, token_id in enumerate(output.token_ids):
            assert_like(output.logprobs[i], expected[12 + i], token_id, 1)


def test_a_token_that_stops_is_in_the_logprobs(llm: LLM) -> None:
    _, free = one(llm, PROMPTS[0], logprobs=1)
    _, ended = one(llm, PROMPTS[0], logprobs=1, stop_token_ids=[free.token_ids[2]])
    count = free.token_ids.index(free.token_ids[2]) + 1
    assert ended.token_ids == free.token_ids[:count]
    assert ended.logprobs is not None and len(ended.logprobs) == count


def test_they_grow_with_the_tokens(llm: LLM) -> None:
    lengths = []
    for request in llm.stream(PROMPTS[0], params(max_tokens=3, logprobs=1)):
        [output] = request.outputs
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
        lengths.append(len(output.token_ids))
    assert lengths == [1, 2, 3]


# Whatever the scheduler does


@pytest.mark.parametrize("budget", [1, 3, 5, 12])
def test_a_prompt_in_chunks_has_all_of_them(folder: Path, llm: LLM, budget: int) -> None:
    options = params(logprobs=2, prompt_logprobs=2)
    expected = [generate(llm, [prompt], options)[0] for prompt in PROMPTS]
    with make_llm(folder, max_num_batched_tokens=budget) as chunked:
        found = generate(chunked, PROMPTS, options)
    for mine, other in zip(found, expected, strict=True):
        assert mine.prompt_logprobs is not None and len(mine.prompt_logprobs) == 13
        assert_same(mine, other)


def test_a_cached_prefix_leaves_out_none(llm: LLM) -> None:
    llm.reset_prefix_cache()
    first, _ = one(llm, PROMPTS[0], prompt_logprobs=1, logprobs=1)
    plain, _ = one(llm, PROMPTS[0])
    again, _ = one(llm, PROMPTS[0], prompt_logprobs=1, logprobs=1)
    assert (plain.num_cached_tokens, again.num_cached_tokens) == (12, 0)
    assert_same(again, first)


def test_a_preempted_request_has_each_of_them_once(folder: Path, llm: LLM) -> None:
    options = params(max_tokens=20, logprobs=2, prompt_logprobs=2)
    expected = [generate(llm, [prompt], options)[0] for prompt in PROMPTS]
    with make_llm(folder, num_kv_blocks=12, max_num_batched_tokens=9) as tight:
        found = generate(tight, PROMPTS, options)
        assert tight.get_metrics()["num_preemptions_total"] > 0
    for mine, other in zip(found, expected, strict=True):
        assert mine.prompt_logprobs is not None and len(mine.prompt_logprobs) == 13
        assert len(mine.outputs[0].logprobs or ()) == 20
        assert_same(mine, other)


def test_a_prompt_preempted_in_its_midst_has_each_of_them_once(folder: Path, llm: LLM) -> None:
    options = params(logprobs=1, prompt_logprobs=1)
    expected, _ = one(llm, PROMPTS[0], logprobs=1, prompt_logprobs=1)
    with make_llm(
        folder, num_kv_blocks=5, max_num_batched_tokens=4, scheduling_policy="priority"
    ) as tight:
        engine = tight.engine
        late = engine.submit(engine.prepare(PROMPTS[0], options, priority=1))
        engine.step()
        engine.step()
        [seq] = late.sequences
        assert 0 < seq.num_computed_tokens < 13
        urgent = engine.submit(engine.prepare(PROMPTS[1], params(), priority=0))
        while not late.finished:
            engine.step()
        assert urgent.finished
        assert seq.num_preemptions > 0
        assert_same(engine.output(late), expected)


# The text of the tokens


def test_a_token_is_shown_as_its_text(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    [day], [half] = tokenizer.encode(" day"), tokenizer.encode("😀")[:1]
    entry = TokenLogprobs([day, 2, day, half], [-3.0, -1.0, -3.0, -4.0], 2)
    assert show_logprobs([entry], tokenizer) == [
        {
            day: Logprob(-3.0, 2, " day"),
            2: Logprob(-1.0, 1, "<|im_end|>"),
            half: Logprob(-4.0, 3, "\ufffd"),
        }
    ]
    [shown] = show_logprobs([entry], None)
    assert [entry.decoded_token for entry in shown.values()] == [None] * 3
    assert list(shown) == [day, 2, half]


def test_without_a_tokenizer_there_is_no_text(llm: LLM) -> None:
    request, output = one(llm, PROMPTS[0], logprobs=1, prompt_logprobs=1)
    positions = [*(output.logprobs or ()), *(request.prompt_logprobs or ())[1:]]
    assert len(positions) == 6 + 12
    assert {entry.decoded_token for position in positions for entry in position.values()} == {None}


def test_a_stop_string_cuts_the_text_and_not_the_logprobs(smollm2: Path) -> None:
    prompt = "Count: one, two, three, four,"
    with LLM(str(smollm2), num_kv_blocks=8, max_model_len=64) as real:
        [request] = real.generate(
            [prompt],
            params(max_tokens=8, logprobs=1, prompt_logprobs=0, stop=" six"),
            use_tqdm=False,
        )
    [output] = request.outputs
    assert (output.text, output.stop_reason) == (" five,", " six")
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids) == 3
    shown = [e[t].decoded_token for t, e in zip(output.token_ids, output.logprobs, strict=True)]
    assert shown == [" five", ",", " six"]
    total = sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)
    assert request.prompt_logprobs is not None and request.prompt_logprobs[0] is None
    pairs = zip(request.prompt_token_ids, request.prompt_logprobs, strict=True)
    pieces = [entries[token_id].decoded_token for token_id, entries in pairs if entries]
    assert "".join(map(str, pieces)) == prompt.removeprefix("Count")
