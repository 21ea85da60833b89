"""Requests that cannot be served, and errors in the midst of serving: each hurts itself alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Detokenizer
from nanovllm.worker import logits
from tests.llm.helpers import VOCAB_SIZE, greedy, make_ids, tokens_of, watch

GOOD = make_ids(1, 20)
FACE = "\ud83d"  # half of a surrogate pair


@pytest.fixture
def refused(llm: LLM) -> Iterator[Callable[..., None]]:
    """A function that gives `generate` a request (among good ones) and holds that it is refused,
    naming the field, with nothing queued. A stream is open all the while: it goes on as alone."""
    alone = tokens_of(llm.generate([GOOD], greedy(8), use_tqdm=False))
    stream = llm.stream(GOOD, greedy(8))
    next(stream)
    core = llm.engine.core
    before = core.num_added

    def refuse(field: str, prompt: Any = GOOD, params: Any = None, **options: Any) -> None:
        def call() -> None:
            made = params() if callable(params) else params or greedy()
            llm.generate(
                [GOOD, prompt, GOOD], [greedy(), made, greedy()], use_tqdm=False, **options
            )

        with pytest.raises(InvalidRequestError) as caught:
            call()
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field}=")
        assert (core.num_added, len(core.scheduler.waiting)) == (before, 0)
        assert len(core.scheduler.running) == 1  # the stream

    yield refuse
    assert tokens_of(list(stream)[-1:]) == alone


# Prompts


@pytest.mark.parametrize("prompt", ["", [], {"prompt": ""}, {"prompt_token_ids": []}])
def test_an_empty_prompt_is_refused(refused: Callable[..., None], prompt: Any) -> None:
    refused("prompt", prompt)


@pytest.mark.parametrize("prompt", [None, 5, 1.5, {}, {"promt": "Hello"}, object()])
def test_what_is_no_prompt_is_refused(refused: Callable[..., None], prompt: Any) -> None:
    refused("prompt", prompt)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**63, -(2**70), True, "5", 5.0, None, [5]])
def test_ids_outside_the_vocabulary_are_refused(
    refused: Callable[..., None], token_id: Any
) -> None:
    refused("prompt_token_ids", [5, token_id, 6])


def test_the_first_and_the_last_id_of_the_vocabulary_are_accepted(llm: LLM) -> None:
    outputs = llm.generate([[0, VOCAB_SIZE - 1]], greedy(2), use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "length"


def test_a_single_prompt_with_a_bad_id_is_refused(llm: LLM) -> None:
    for prompt in ([VOCAB_SIZE], [-1, 5]):
        with pytest.raises(InvalidRequestError, match="prompt_token_ids"):
            llm.generate(prompt, greedy(), use_tqdm=False)


def test_a_prompt_as_long_as_max_model_len_is_refused(refused: Callable[..., None]) -> None:
    refused("prompt", make_ids(2, 512))


def test_a_prompt_larger_than_all_blocks_is_refused_and_the_others_go_on(tiny: Path) -> None:
    with LLM(tiny, max_model_len=512, num_kv_blocks=4) as llm:
        stream = llm.stream(GOOD, greedy(8))
        next(stream)
        with pytest.raises(InvalidRequestError, match="shorter than 64 tokens") as caught:
            llm.generate([make_ids(2, 64)], use_tqdm=False)
        assert caught.value.field == "prompt"
        assert len(list(stream)) == 7


def test_a_prompt_longer_than_a_step_is_refused_without_chunked_prefill(tiny: Path) -> None:
    settings = {"max_model_len": 48, "max_num_batched_tokens": 48, "num_kv_blocks": 16}
    with LLM(tiny, enable_chunked_prefill=False, **settings) as llm:
        with pytest.raises(InvalidRequestError, match="shorter than 48 tokens"):
            llm.generate([make_ids(2, 48)], use_tqdm=False)
        outputs = llm.generate([make_ids(i, 47) for i in range(3)], greedy(9), use_tqdm=False)
        assert [len(tokens) for tokens in tokens_of(outputs)] == [1, 1, 1]


def test_half_a_surrogate_pair_in_a_prompt_is_refused(refused: Callable[..., None]) -> None:
    refused("prompt", f"Hello {FACE}")
    refused("prompt", {"prompt": FACE})


def test_half_a_surrogate_pair_in_a_message_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        llm.chat([{"role": "user", "content": FACE}], use_tqdm=False)


@pytest.mark.parametrize("salt", [5, 0, b"salt", ["salt"], True, False])
def test_a_cache_salt_that_is_no_string_is_refused(refused: Callable[..., None], salt: Any) -> None:
    refused("cache_salt", {"prompt_token_ids": GOOD, "cache_salt": salt})


def test_a_cache_salt_may_be_any_string(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": GOOD, "cache_salt": salt} for salt in ("", "é", FACE)]
    outputs = llm.generate(prompts, greedy(4), use_tqdm=False)
    assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 1


@pytest.mark.parametrize("priority", [[0, 0, "high"], [0, 0, None], [0, 0, float("nan")]])
def test_a_priority_that_is_no_number_is_refused(
    refused: Callable[..., None], priority: Any
) -> None:
    refused("priority", priority=priority)


# Parameters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("n", 0),
        ("n", 16_385),
        ("n", 2**70),
        ("n", None),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("seed", 2**64),
        ("seed", 1.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("stop", ""),
        ("stop", ["end", ""]),
        ("stop", [5]),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", 5),
        ("bad_words", [""]),
        ("bad_words", [5]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", ["5"]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: "much"}),
        ("logit_bias", [5]),
        ("logprobs", -2),
        ("prompt_logprobs", 1.5),
        ("ignore_eos", "yes"),
    ],
)
def test_an_impossible_parameter_is_refused(
    refused: Callable[..., None], field: str, value: Any
) -> None:
    refused(field, params=lambda: SamplingParams(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", VOCAB_SIZE + 1),
        ("prompt_logprobs", VOCAB_SIZE + 1),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", [-1]),
        ("allowed_token_ids", [5, VOCAB_SIZE]),
        ("allowed_token_ids", [2**63]),
        ("logit_bias", {-1: 1.0}),
    ],
)
def test_a_parameter_beyond_the_vocabulary_is_refused(
    refused: Callable[..., None], field: str, value: Any
) -> None:
    refused(field, params=SamplingParams(**{field: value}))


def test_half_a_surrogate_pair_in_bad_words_is_refused(refused: Callable[..., None]) -> None:
    refused("bad_words", params=SamplingParams(bad_words=["fine", FACE]))


def test_stop_strings_need_a_text(refused: Callable[..., None]) -> None:
    refused("stop", params=SamplingParams(stop="end", detokenize=False))


def test_parameters_that_are_no_parameters_are_refused(refused: Callable[..., None]) -> None:
    refused("sampling_params", params={"temperature": 0})


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e308},
        {"temperature": 1.1e-5},
        {"top_p": 1e-30},
        {"top_k": 2**62},
        {"top_k": VOCAB_SIZE, "top_p": 0.999999},
        {"min_p": 1.0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1, "n": 2},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e308},
        {"logit_bias": dict.fromkeys(range(100), 1e308)},
        {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), -1e308)},
        {"allowed_token_ids": [0, 0]},
        {"bad_words": ["a " * 500]},
        {"stop": ["x" * 10_000]},
        {"stop_token_ids": list(range(1000)), "min_tokens": 6},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"logprobs": VOCAB_SIZE, "max_tokens": 1},
        {"max_tokens": 2**62, "stop_token_ids": list(range(VOCAB_SIZE))},
    ],
    ids=",".join,
)
def test_an_extreme_parameter_is_served_and_disturbs_nobody(
    llm: LLM, extreme: dict[str, Any], temperature: float
) -> None:
    other = make_ids(2, 30)
    alone = tokens_of(llm.generate([other], greedy(8), use_tqdm=False))
    fields = {"temperature": temperature, "max_tokens": 6, "ignore_eos": True, "seed": 1} | extreme
    outputs = llm.generate([GOOD, other], [SamplingParams(**fields), greedy(8)], use_tqdm=False)
    assert tokens_of(outputs[1:]) == alone
    for completion in outputs[0].outputs:
        assert completion.finish_reason in ("stop", "length")
        assert len(completion.token_ids) == (1 if fields["max_tokens"] != 6 else 6)
        assert all(0 <= token_id < VOCAB_SIZE for token_id in completion.token_ids)


# Errors while serving


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_request_that_may_take_no_token_ends_alone(llm: LLM, temperature: float) -> None:
    other = make_ids(2, 30)
    alone = tokens_of(llm.generate([other], greedy(8), use_tqdm=False))
    nothing = SamplingParams(
        temperature=temperature, allowed_token_ids=[7], stop_token_ids=[7], min_tokens=3
    )
    bad, good = llm.generate([GOOD, other], [nothing, greedy(8)], use_tqdm=False)
    assert tokens_of([good]) == alone
    assert (bad.outputs[0].finish_reason, bad.outputs[0].token_ids) == ("error", [])
    assert bad.outputs[0].stop_reason


@pytest.mark.parametrize("num_good", [0, 3])
def test_an_error_in_sampling_ends_that_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, num_good: int
) -> None:
    prompts = [make_ids(i, 20 + i) for i in range(4)]
    params = [
        greedy(8, frequency_penalty=0.5),
        greedy(8),
        greedy(8, logit_bias={7: 1.0}),
        greedy(8),
    ]
    alone = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    adjust = logits.adjust

    def fail_for_one(logits_V: Any, seq: Any, token_ids: Any) -> None:
        if seq.params.logit_bias and len(token_ids) == len(prompts[2]) + num_good:
            raise ArithmeticError("no distribution")
        adjust(logits_V, seq, token_ids)

    monkeypatch.setattr(logits, "adjust", fail_for_one)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    bad = outputs[2].outputs[0]
    assert bad.finish_reason == "error"
    assert bad.stop_reason == "ArithmeticError: no distribution"
    assert bad.token_ids == alone[2][:num_good]
    assert outputs[2].finished
    for i in (0, 1, 3):
        assert (outputs[i].outputs[0].token_ids, outputs[i].outputs[0].finish_reason) == (
            alone[i],
            "length",
        )


@pytest.mark.parametrize("count", [1, 4, 8])
def test_an_error_in_detokenizing_ends_that_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    prompts = [make_ids(i, 20) for i in range(3)]
    alone = tokens_of(llm.generate(prompts, greedy(8), use_tqdm=False))
    assert alone[1][count - 1] not in alone[0] + alone[2] + alone[1][: count - 1]
    push = Detokenizer.push

    def fail_for_one(self: Detokenizer, token_id: int) -> str:
        if token_id == alone[1][count - 1]:
            raise UnicodeError("no such character")
        return push(self, token_id)

    monkeypatch.setattr(Detokenizer, "push", fail_for_one)
    outputs = llm.generate(prompts, greedy(8), use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].outputs[0].stop_reason == "UnicodeError: no such character"
    assert tokens_of(outputs) == [alone[0], alone[1][:count], alone[2]]


def test_an_error_in_one_sample_leaves_the_others_of_its_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True, logit_bias={7: 1.0})
    alone = tokens_of(llm.generate([GOOD], params, use_tqdm=False))
    adjust = logits.adjust

    def fail_for_one(logits_V: Any, seq: Any, token_ids: Any) -> None:
        if seq.params.seed == 6 and len(token_ids) == len(GOOD) + 2:
            raise ArithmeticError("no distribution")
        adjust(logits_V, seq, token_ids)

    monkeypatch.setattr(logits, "adjust", fail_for_one)
    [output] = llm.generate([GOOD], params, use_tqdm=False)
    assert [c.finish_reason for c in output.outputs] == ["length", "error", "length"]
    assert tokens_of([output]) == [alone[0], alone[1][:2], alone[2]]


@pytest.mark.parametrize("step", [0, 2, 5])
@pytest.mark.parametrize("late", [False, True])
def test_an_error_in_a_step_ends_the_requests_in_it_and_no_others(
    tiny: Path, step: int, late: bool
) -> None:
    """late: the step stores and samples before it fails."""
    prompts = [make_ids(i, 40) for i in range(4)]
    with LLM(tiny, max_model_len=128, num_kv_blocks=32, max_num_seqs=2) as llm:
        alone = tokens_of(llm.generate(prompts, greedy(6), use_tqdm=False))
        llm.reset_prefix_cache()
        with watch(llm) as watched:
            execute = watched.execute

            def spoil(plan: Any) -> Any:
                result = execute(plan)
                if len(watched.plans) - 1 == step:
                    raise RuntimeError("the device is gone")
                return result

            if late:
                watched.execute = spoil
            else:
                watched.failures[step] = RuntimeError("the device is gone")
            outputs = llm.generate(prompts, greedy(6), use_tqdm=False)
        reasons = [output.outputs[0].finish_reason for output in outputs]
        assert reasons == ["error", "error", "length", "length"]
        assert outputs[0].outputs[0].stop_reason == "RuntimeError: the device is gone"
        assert tokens_of(outputs) == [alone[0][:step], alone[1][:step], alone[2], alone[3]]
        assert not llm.engine.requests
        outputs = llm.generate(prompts, greedy(6), use_tqdm=False)
        assert tokens_of(outputs) == alone
        cached = [output.num_cached_tokens for output in outputs]
        assert cached == [0 if step == 0 else 32] * 2 + [32] * 2


def test_a_spoilt_step_leaves_nothing_in_the_prefix_cache(llm: LLM) -> None:
    """The failing step filled its blocks with nonsense; nobody may find them afterwards."""
    prompts = [make_ids(1, 64), make_ids(1, 64) + make_ids(2, 20)]
    alone = tokens_of(llm.generate(prompts, greedy(6), use_tqdm=False))
    llm.reset_prefix_cache()
    with watch(llm) as watched:
        execute = watched.execute

        def spoil(plan: Any) -> Any:
            execute(plan)
            for cache in llm.engine.core.executor.runner.caches:  # type: ignore[attr-defined]
                cache.k.fill_(1e3)
                cache.v.fill_(1e3)
            raise RuntimeError("power cut")

        watched.execute = spoil
        outputs = llm.generate(prompts, greedy(6), use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 2
    outputs = llm.generate(prompts, greedy(6), use_tqdm=False)
    assert tokens_of(outputs) == alone
