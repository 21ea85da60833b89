"""The offline API, called as its users call it."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm.errors import ConfigError, EngineDeadError, InvalidRequestError
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, RequestOutput, RequestTiming
from nanovllm.sampling_params import SamplingParams
from tests.llm.helpers import VOCAB_SIZE, assert_idle, greedy, make_ids, num_used, tokens_of, watch

PROMPT = "The capital of France is"
PROMPT_IDS = [504, 3575, 282, 4649, 314]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


# Prompts


def test_a_prompt_is_a_text_ids_or_a_dictionary_of_either(llm: LLM) -> None:
    prompts: list[Any] = [
        PROMPT,
        PROMPT_IDS,
        tuple(PROMPT_IDS),
        {"prompt": PROMPT},
        {"prompt_token_ids": PROMPT_IDS},
        {"prompt_token_ids": PROMPT_IDS, "prompt": PROMPT, "cache_salt": "mine"},
    ]
    together = llm.generate(prompts, greedy(8), use_tqdm=False)
    alone = [llm.generate(prompt, greedy(8), use_tqdm=False) for prompt in prompts]
    assert [len(outputs) for outputs in alone] == [1] * 6
    assert tokens_of(together) == [output[0].outputs[0].token_ids for output in alone]
    assert len({tuple(tokens) for tokens in tokens_of(together)}) == 1
    assert [output.prompt for output in together] == [PROMPT, None, None, PROMPT, None, PROMPT]
    assert [output.prompt_token_ids for output in together] == [PROMPT_IDS] * 6


def test_a_list_of_ids_is_one_prompt_and_a_list_of_lists_is_many(llm: LLM) -> None:
    first, second = make_ids(1, 7), make_ids(2, 9)
    assert len(llm.generate(first, greedy(1), use_tqdm=False)) == 1
    outputs = llm.generate([first, second], greedy(1), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [first, second]


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [make_ids(i, 4 + i) for i in range(6)]
    params = [greedy(max_tokens) for max_tokens in (12, 1, 9, 3, 7, 5)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(tokens) for tokens in tokens_of(outputs)] == [12, 1, 9, 3, 7, 5]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


def test_requests_of_different_salts_share_nothing(llm: LLM) -> None:
    prompt = make_ids(3, 64)
    cached = []
    for salt in ("mine", "mine", "yours", None):
        [output] = llm.generate(
            {"prompt_token_ids": prompt, "cache_salt": salt}, greedy(2), use_tqdm=False
        )
        cached.append(output.num_cached_tokens)
    assert cached == [0, 63, 0, 0]


# Parameters


def test_parameters_are_for_all_or_one_for_each_and_default_to_16_tokens(llm: LLM) -> None:
    prompts = [make_ids(1, 5), make_ids(2, 5)]
    each = llm.generate(prompts, [greedy(3), greedy(5)], use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(each)] == [3, 5]
    shared = llm.generate(prompts, greedy(4), use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(shared)] == [4, 4]
    default = llm.generate(prompts[0], use_tqdm=False)[0].outputs[0]
    assert len(default.token_ids) == 16 or default.finish_reason == "stop"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_parameters_must_be_as_many_as_prompts(llm: LLM, count: int) -> None:
    with pytest.raises(InvalidRequestError, match="one for each of 2 prompts") as caught:
        llm.generate([PROMPT, PROMPT], [greedy()] * count, use_tqdm=False)
    assert caught.value.field == "sampling_params"


@pytest.mark.parametrize("priority", [[], [1], [1, 2, 3]])
def test_priorities_must_be_as_many_as_prompts(llm: LLM, priority: list[int]) -> None:
    with pytest.raises(InvalidRequestError, match="one for each of 2 prompts") as caught:
        llm.generate([PROMPT, PROMPT], greedy(), priority=priority, use_tqdm=False)
    assert caught.value.field == "priority"


def test_the_priority_policy_takes_the_lowest_first(tiny: Path) -> None:
    with LLM(tiny, scheduling_policy="priority", max_num_seqs=1, max_model_len=64) as llm:
        prompts = [make_ids(i, 5) for i in range(4)]
        outputs = llm.generate(prompts, greedy(2), priority=[2, 0, 3, 1], use_tqdm=False)
        starts = [output.timing.scheduled_s or 0 for output in outputs]
        assert sorted(range(4), key=starts.__getitem__) == [1, 3, 0, 2]


def test_parameters_of_many_kinds_share_a_batch(llm: LLM) -> None:
    params = [
        greedy(9),
        SamplingParams(seed=1, max_tokens=9, ignore_eos=True),
        SamplingParams(seed=1, max_tokens=9, ignore_eos=True, top_k=5, top_p=0.9, min_p=0.01),
        greedy(9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
        greedy(9, allowed_token_ids=[40, 41, 42], logprobs=2),
        greedy(9, prompt_logprobs=1, n=2),
    ]
    together = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    alone = [llm.generate(PROMPT, one, use_tqdm=False)[0] for one in params]
    assert tokens_of(together) == tokens_of(alone)
    assert set(together[4].outputs[0].token_ids) <= {40, 41, 42}


def test_max_tokens_none_goes_on_to_max_model_len(tiny: Path) -> None:
    with LLM(tiny, max_model_len=40, num_kv_blocks=16) as llm:
        [output] = llm.generate([make_ids(1, 10)], greedy(None), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 30
        assert output.outputs[0].finish_reason == "length"


def test_max_model_len_ends_a_request_by_length(tiny: Path) -> None:
    with LLM(tiny, max_model_len=24, num_kv_blocks=16) as llm:
        outputs = llm.generate([make_ids(1, 20), make_ids(2, 23)], greedy(1000), use_tqdm=False)
        assert [len(tokens) for tokens in tokens_of(outputs)] == [4, 1]
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 2
        with pytest.raises(InvalidRequestError, match="24 tokens"):
            llm.generate([make_ids(3, 24)], use_tqdm=False)
        assert_idle(llm)


def test_min_tokens_delays_every_stop(llm: LLM) -> None:
    [free] = llm.generate([PROMPT_IDS], greedy(12), use_tqdm=False)
    tokens = free.outputs[0].token_ids
    early = llm.generate([PROMPT_IDS], greedy(12, stop_token_ids=[tokens[2]]), use_tqdm=False)
    assert early[0].outputs[0].token_ids == tokens[:3]
    assert (early[0].outputs[0].finish_reason, early[0].outputs[0].stop_reason) == (
        "stop",
        tokens[2],
    )
    params = greedy(12, stop_token_ids=[tokens[2]], min_tokens=8)
    [late] = llm.generate([PROMPT_IDS], params, use_tqdm=False)
    assert late.outputs[0].token_ids[:2] == tokens[:2]
    assert tokens[2] not in late.outputs[0].token_ids[:8]
    assert len(late.outputs[0].token_ids) >= 8


def test_a_stop_string_cuts_the_text_and_is_the_reason(llm: LLM) -> None:
    text = llm.generate([PROMPT_IDS], greedy(12), use_tqdm=False)[0].outputs[0].text
    stop = text[15:19]
    for kept, end in ((False, 15), (True, 19)):
        params = greedy(12, stop=stop, include_stop_str_in_output=kept)
        [output] = llm.generate([PROMPT_IDS], params, use_tqdm=False)
        assert output.outputs[0].text == text[: text.index(stop)] + (stop if kept else "")
        assert len(output.outputs[0].text) <= end
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_a_stop_string_in_the_last_token_allowed_is_a_stop(llm: LLM) -> None:
    texts = [output.outputs[0].text for output in llm.stream(PROMPT_IDS, greedy(12))]
    count = next(i for i in range(4, 12) if texts[i][len(texts[i - 1]) :] not in texts[i - 1])
    stop = texts[count][len(texts[count - 1]) :]  # what token number count, from 0, adds
    params = greedy(count + 1, stop=stop)
    [output] = llm.generate([PROMPT_IDS], params, use_tqdm=False)
    assert output.outputs[0].text == texts[count - 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


# Outputs


def test_an_output_has_all_its_fields(llm: LLM) -> None:
    params = greedy(6, logprobs=2, prompt_logprobs=1)
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert isinstance(output, RequestOutput)
    assert output.request_id
    assert (output.prompt, output.prompt_token_ids) == (PROMPT, PROMPT_IDS)
    assert output.finished
    assert output.num_cached_tokens == 0
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for token_id, entry in zip(PROMPT_IDS[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert token_id in entry
        assert [found.rank for found in entry.values() if found.rank == 1] == [1]
    [completion] = output.outputs
    assert isinstance(completion, CompletionOutput)
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (
        0,
        "length",
        None,
    )
    assert len(completion.token_ids) == 6
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    assert completion.logprobs is not None
    for token_id, likely in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(likely) == 2
        assert likely[token_id].rank == 1
        assert likely[token_id].decoded_token == llm.get_tokenizer().decode([token_id])
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    total = sum(likely[token_id].logprob for token_id, likely in pairs)
    assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_are_absent_unless_asked_for(llm: LLM) -> None:
    [output] = llm.generate([PROMPT], greedy(3), use_tqdm=False)
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_outputs_answer_as_those_of_the_original_do(llm: LLM) -> None:
    [output] = llm.generate([PROMPT], greedy(5), use_tqdm=False)
    assert output["text"] == output.outputs[0].text
    assert output["token_ids"] == output.outputs[0].token_ids
    assert output["prompt"] == PROMPT


def test_a_script_of_the_original_runs(tiny: Path) -> None:
    llm = nanovllm.LLM(str(tiny), enforce_eager=True, tensor_parallel_size=1)
    params = nanovllm.SamplingParams(temperature=0.6, max_tokens=8)
    outputs = llm.generate(["introduce yourself", "list all prime numbers within 100"], params)
    for output in outputs:
        assert isinstance(output["text"], str)
        assert 1 <= len(output["token_ids"]) <= 8
    llm.close()


def test_end_of_text_is_the_models_own_stop(llm: LLM) -> None:
    [output] = llm.generate(
        [PROMPT], SamplingParams(temperature=0, allowed_token_ids=[2]), use_tqdm=False
    )
    completion = output.outputs[0]
    assert (completion.token_ids, completion.text) == ([2], "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_detokenize_false_makes_no_text(llm: LLM) -> None:
    [output] = llm.generate([PROMPT], greedy(5, detokenize=False), use_tqdm=False)
    assert output.outputs[0].text == ""
    assert tokens_of([output]) == tokens_of(llm.generate([PROMPT], greedy(5), use_tqdm=False))


def test_bad_words_are_kept_out_without_a_text_too(llm: LLM) -> None:
    free = llm.generate([PROMPT], greedy(6), use_tqdm=False)[0].outputs[0].token_ids
    word = llm.get_tokenizer().decode([free[3]])
    params = greedy(6, bad_words=[word], detokenize=False)
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert output.outputs[0].token_ids[:3] == free[:3]
    assert free[3] not in output.outputs[0].token_ids


def test_times_are_in_order(llm: LLM) -> None:
    outputs = llm.generate([make_ids(i, 20) for i in range(4)], greedy(5), use_tqdm=False)
    for output in outputs:
        timing = output.timing
        assert isinstance(timing, RequestTiming)
        assert timing.scheduled_s is not None
        assert timing.first_token_s is not None
        assert timing.last_token_s is not None
        assert timing.arrival_s <= timing.scheduled_s <= timing.first_token_s < timing.last_token_s
        assert timing.ttft_s == timing.first_token_s - timing.arrival_s


def test_request_ids_are_unique(llm: LLM) -> None:
    outputs = llm.generate([PROMPT] * 3, greedy(1, n=2), use_tqdm=False)
    assert len({output.request_id for output in outputs}) == 3


# Samples


def test_n_samples_are_numbered_and_differ_by_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    single = SamplingParams(seed=6, max_tokens=8, ignore_eos=True)
    [second] = llm.generate([PROMPT], single, use_tqdm=False)
    assert second.outputs[0].token_ids == output.outputs[1].token_ids


def test_n_samples_share_the_blocks_of_their_prompt(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=0, max_tokens=20, ignore_eos=True)
    with watch(llm) as watched:
        llm.generate([make_ids(1, 70)], params, use_tqdm=False)
    assert watched.used[0] == 4 + 4  # 64 tokens in 4 shared blocks, a tail of 6 for each sample
    assert watched.used[-1] == 4 + 2 * 4  # 89 stored tokens: two blocks of its own for each


def test_samples_that_end_early_leave_the_others_going(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    free = tokens_of(llm.generate([PROMPT], params, use_tqdm=False))
    stop = free[1][2]
    assert stop not in free[0] + free[2]
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert tokens_of([output]) == [free[0], free[1][:3], free[2]]
    assert [c.finish_reason for c in output.outputs] == ["length", "stop", "length"]


# The prefix cache


def test_the_second_run_of_a_prompt_reports_what_the_cache_saved(llm: LLM) -> None:
    prompt = make_ids(1, 70)
    runs = [llm.generate([prompt], greedy(4), use_tqdm=False)[0] for _ in range(2)]
    assert [run.num_cached_tokens for run in runs] == [0, 64]
    assert runs[0].outputs[0].token_ids == runs[1].outputs[0].token_ids
    llm.reset_prefix_cache()
    [again] = llm.generate([prompt], greedy(4), use_tqdm=False)
    assert again.num_cached_tokens == 0


def test_metrics_have_vllms_names_and_count_tokens(tiny: Path) -> None:
    with LLM(tiny, max_model_len=128, num_kv_blocks=32) as llm:
        assert set(llm.get_metrics().values()) == {0}
        for _ in range(2):
            llm.generate([make_ids(1, 70), make_ids(2, 10)], greedy(6), use_tqdm=False)
        metrics = llm.get_metrics()
        assert metrics == {
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "num_preemptions_total": 0,
            "prefix_cache_queries_total": 160,
            "prefix_cache_hits_total": 64,
            "prompt_tokens_total": 160,
            "generation_tokens_total": 24,
            "request_success_total": 4,
        }
        stream = llm.stream(make_ids(3, 40), greedy(4))
        next(stream)
        assert llm.get_metrics()["num_requests_running"] == 1
        assert llm.get_metrics()["kv_cache_usage_perc"] == pytest.approx(3 / 32)
        stream.close()


# The progress bar


def test_the_progress_bar_is_shown_unless_refused(llm: LLM, capfd: Any) -> None:
    llm.generate([PROMPT] * 2, greedy(2), use_tqdm=False)
    assert capfd.readouterr().err == ""
    llm.generate([PROMPT] * 2, greedy(2))
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert "tok/s" in shown


# Chat


def test_chat_answers_one_conversation(llm: LLM) -> None:
    [output] = llm.chat(QUESTION, greedy(6), use_tqdm=False)
    assert output.prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert output.prompt_token_ids[0] == 1  # <|im_start|> as the token, not as its letters
    [direct] = llm.generate([output.prompt_token_ids], greedy(6), use_tqdm=False)
    assert tokens_of([output]) == tokens_of([direct])


def test_chat_answers_many_conversations(llm: LLM) -> None:
    longer = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who are you?"},
    ]
    outputs = llm.chat([QUESTION, longer], [greedy(6), greedy(3)], use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [6, 3]
    assert str(outputs[1].prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert tokens_of(outputs)[0] == tokens_of(llm.chat(QUESTION, greedy(6), use_tqdm=False))[0]


def test_chat_takes_a_template_of_the_callers(llm: LLM) -> None:
    template = "{{ style }}: {{ messages[0].content }}{% if add_generation_prompt %} >{% endif %}"
    [output] = llm.chat(
        QUESTION,
        greedy(1),
        use_tqdm=False,
        chat_template=template,
        chat_template_kwargs={"style": "short"},
    )
    assert output.prompt == "short: What is the capital of France? >"


@pytest.mark.parametrize("messages", [[], [[]]])
def test_chat_needs_a_message(llm: LLM, messages: list[Any]) -> None:
    with pytest.raises(InvalidRequestError, match="at least one message") as caught:
        llm.chat(messages, use_tqdm=False)
    assert caught.value.field == "messages"


# Streaming


def test_a_stream_grows_and_ends_as_generate_does(llm: LLM) -> None:
    [whole] = llm.generate([PROMPT], greedy(20), use_tqdm=False)
    seen = list(llm.stream(PROMPT, greedy(20)))
    assert [output.finished for output in seen] == [False] * 19 + [True]
    tokens = whole.outputs[0].token_ids
    assert tokens_of(seen) == [tokens[: i + 1] for i in range(20)]
    assert_only_grows([output.outputs[0].text for output in seen])
    assert seen[-1].outputs == whole.outputs


@pytest.mark.parametrize("length", [1, 2, 5, 30])
def test_a_stream_never_takes_back_what_may_become_a_stop_string(llm: LLM, length: int) -> None:
    text = llm.generate([PROMPT], greedy(20), use_tqdm=False)[0].outputs[0].text
    for begin in range(0, len(text) - length, 7):
        stop = text[begin : begin + length]
        shown = [out.outputs[0].text for out in llm.stream(PROMPT, greedy(20, stop=stop))]
        assert_only_grows(shown)
        assert shown[-1] == text[: text.index(stop)]


def assert_only_grows(texts: list[str]) -> None:
    for earlier, later in pairwise(texts):
        assert later.startswith(earlier)


def test_a_stream_of_half_characters_shows_whole_ones(llm: LLM) -> None:
    face = llm.get_tokenizer().encode("\N{GRINNING FACE}")
    assert len(face) > 1
    chain = greedy(1, allowed_token_ids=face[:1])
    assert llm.generate([PROMPT], chain, use_tqdm=False)[0].outputs[0].text == "\ufffd"
    texts = [
        output.outputs[0].text for output in llm.stream(PROMPT, greedy(4, allowed_token_ids=face))
    ]
    assert all("\ufffd" not in text for text in texts[:-1])
    assert_only_grows(texts)


def test_closing_a_stream_aborts_its_request(llm: LLM) -> None:
    stream = llm.stream(make_ids(1, 40), greedy(50))
    for _ in range(3):
        next(stream)
    assert num_used(llm) == 3
    stream.close()
    assert_idle(llm)
    aborted = llm.engine.core.events.counts["aborted"]
    assert aborted >= 1


def test_leaving_the_loop_over_a_stream_aborts_its_request(llm: LLM) -> None:
    for output in llm.stream(make_ids(1, 40), greedy(50, n=3)):
        if len(output.outputs[0].token_ids) == 3:
            break
    del output
    assert_idle(llm)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("ours", "theirs"), [(5, 20), (20, 5), (10, 10)])
def test_generate_while_a_stream_is_open(llm: LLM, ours: int, theirs: int) -> None:
    streamed, other = make_ids(1, 20), make_ids(2, 20)
    alone = tokens_of(llm.generate([streamed, other], [greedy(ours), greedy(theirs)]))
    stream = llm.stream(streamed, greedy(ours))
    next(stream)
    between = llm.generate([other], greedy(theirs), use_tqdm=False)
    seen = list(stream)
    assert tokens_of(between) == [alone[1]]
    assert tokens_of(seen[-1:]) == [alone[0]]
    assert seen[-1].finished


@pytest.mark.timeout(60)
def test_streams_that_take_turns_each_show_their_end(llm: LLM) -> None:
    prompts, params = [make_ids(i, 20) for i in range(3)], [greedy(n) for n in (5, 6, 12)]
    alone = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    streams = [llm.stream(*pair) for pair in zip(prompts, params, strict=True)]
    last: dict[int, RequestOutput] = {}
    for _ in range(12):
        for i, stream in enumerate(streams):
            last[i] = next(stream, last[i]) if i in last else next(stream)
    assert [last[i].finished for i in range(3)] == [True] * 3
    assert tokens_of([last[i] for i in range(3)]) == alone
    assert [list(stream) for stream in streams] == [[]] * 3


def test_forgetting_the_cache_leaves_an_open_stream_as_it_is(llm: LLM) -> None:
    prompt = make_ids(1, 40)
    alone = tokens_of(llm.generate([prompt], greedy(30), use_tqdm=False))
    stream = llm.stream(prompt, greedy(30))
    for _ in range(5):
        next(stream)
    llm.reset_prefix_cache()
    assert num_used(llm) == 3
    [other] = llm.generate([prompt], greedy(3), use_tqdm=False)
    assert other.num_cached_tokens == 0
    assert tokens_of([other]) == [alone[0][:3]]
    assert tokens_of(list(stream)[-1:]) == alone


# The life of an engine


def test_a_closed_engine_refuses_everything(tiny: Path) -> None:
    llm = LLM(tiny, max_model_len=64, num_kv_blocks=8)
    llm.close()
    llm.close()
    for call in (
        lambda: llm.generate(PROMPT),
        lambda: llm.chat(QUESTION),
        lambda: next(llm.stream(PROMPT)),
        llm.get_metrics,
        llm.get_tokenizer,
        llm.reset_prefix_cache,
    ):
        with pytest.raises(EngineDeadError, match="closed"):
            call()


@pytest.mark.timeout(60)
def test_a_stream_of_a_closed_engine_ends_with_an_error(tiny: Path) -> None:
    llm = LLM(tiny, max_model_len=64, num_kv_blocks=8)
    stream = llm.stream(PROMPT, greedy(20))
    next(stream)
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        next(stream)
    assert list(stream) == []


def test_with_closes_the_engine_after_an_error_too(tiny: Path) -> None:
    with pytest.raises(RuntimeError), LLM(tiny, max_model_len=64, num_kv_blocks=8) as llm:
        raise RuntimeError
    with pytest.raises(EngineDeadError):
        llm.generate(PROMPT)


def test_two_engines_live_in_one_process(tiny: Path, llm: LLM) -> None:
    prompt = make_ids(1, 40)
    alone = tokens_of(llm.generate([prompt], greedy(10), use_tqdm=False))
    with LLM(tiny, max_model_len=64, num_kv_blocks=8, block_size=8) as other:
        one, two = llm.stream(prompt, greedy(10)), other.stream(prompt, greedy(10))
        pairs = list(zip(one, two, strict=True))
        assert tokens_of(list(pairs[-1])) == alone * 2
        assert other.get_metrics()["generation_tokens_total"] == 10
    assert tokens_of(llm.generate([prompt], greedy(10), use_tqdm=False)) == alone


def test_an_unknown_setting_is_refused_with_the_nearest_name(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="the nearest is max_num_seqs"):
        LLM(tiny, max_num_seq=4)


def test_without_a_tokenizer_ids_go_in_and_come_out(tiny: Path, llm: LLM) -> None:
    prompt = make_ids(1, 20)
    with LLM(tiny, skip_tokenizer_init=True, max_model_len=64, num_kv_blocks=8) as bare:
        [output] = bare.generate([prompt], greedy(5, logprobs=1), use_tqdm=False)
        assert output.outputs[0].text == ""
        assert tokens_of([output]) == tokens_of(llm.generate([prompt], greedy(5), use_tqdm=False))
        with pytest.raises(InvalidRequestError, match=r"prompt=.* token ids"):
            bare.generate(PROMPT, use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            bare.get_tokenizer()


def test_another_folder_may_hold_the_tokenizer(tiny: Path, tmp_path: Path, llm: LLM) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny / name)
    with LLM(tmp_path, tokenizer=str(tiny), max_model_len=64, num_kv_blocks=8) as other:
        outputs = other.generate([PROMPT], greedy(5), use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(llm.generate([PROMPT], greedy(5), use_tqdm=False))


def test_dummy_weights_need_only_a_config(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "num_kv_blocks": 8}
    runs = []
    for seed in (0, 0, 1):
        with LLM(tmp_path, seed=seed, max_model_len=64, **settings) as llm:
            params = SamplingParams(max_tokens=5, ignore_eos=True)
            runs += tokens_of(llm.generate([[1, 2, 3]], params, use_tqdm=False))
    assert runs[0] == runs[1] != runs[2]
    assert all(0 <= token_id < VOCAB_SIZE for token_id in runs[0])


# A pool that is too small, and Ctrl-C


def test_a_request_that_grows_to_the_pools_size_ends_and_the_others_go_on(tiny: Path) -> None:
    prompts = [make_ids(i, 10 + i) for i in range(3)]
    params = [greedy(1000), greedy(20), greedy(25)]
    with LLM(tiny, max_model_len=512) as llm:
        longest = 6 * 16 - len(prompts[0])
        alone = tokens_of(llm.generate(prompts, [greedy(longest), *params[1:]], use_tqdm=False))
    with LLM(tiny, max_model_len=512, num_kv_blocks=6) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert tokens_of(outputs) == alone
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3
        assert_idle(llm)


@pytest.mark.parametrize("step", [0, 3])
def test_ctrl_c_leaves_an_engine_that_works(llm: LLM, step: int) -> None:
    prompts = [make_ids(i, 40) for i in range(4)]
    alone = tokens_of(llm.generate(prompts, greedy(10), use_tqdm=False))
    llm.reset_prefix_cache()
    with watch(llm) as watched:
        watched.failures[step] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, greedy(10), use_tqdm=False)
    assert_idle(llm)
    outputs = llm.generate(prompts, greedy(10), use_tqdm=False)
    assert tokens_of(outputs) == alone
    assert [output.num_cached_tokens for output in outputs] == [0 if step == 0 else 32] * 4


@pytest.mark.timeout(60)
def test_ctrl_c_in_generate_ends_an_open_stream_too(llm: LLM) -> None:
    stream = llm.stream(make_ids(1, 20), greedy(30))
    next(stream)
    with watch(llm) as watched:
        watched.failures[1] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            llm.generate([make_ids(2, 20)], greedy(10), use_tqdm=False)
    last = list(stream)[-1]
    assert last.finished
    assert last.outputs[0].finish_reason == "error"


def test_outputs_can_be_printed_as_json(llm: LLM) -> None:
    [output] = llm.generate([PROMPT], greedy(3, logprobs=1, prompt_logprobs=1), use_tqdm=False)
    shown = json.loads(json.dumps(asdict(output)))
    assert shown["outputs"][0]["token_ids"] == output.outputs[0].token_ids
