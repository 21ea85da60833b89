"""Bugs of the original nano-vLLM that need a model to show; each is a test here. Those of the
control plane alone are in tests/core/test_original_bugs.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm.errors import ConfigError, InvalidRequestError, ModelLoadError
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from tests.llm.helpers import (
    assert_idle,
    copy_with,
    greedy,
    make_ids,
    tokens_of,
    watch,
)

PROMPTS = [make_ids(i, 10 + i) for i in range(20)]


@pytest.mark.parametrize("max_num_seqs", [1, 12, 20, 100])
def test_max_num_seqs_may_be_any_number(tiny: Path, llm: LLM, max_num_seqs: int) -> None:
    alone = tokens_of(llm.generate(PROMPTS, greedy(4), use_tqdm=False))
    with LLM(tiny, max_num_seqs=max_num_seqs, max_model_len=64) as other:
        with watch(other) as watched:
            outputs = other.generate(PROMPTS, greedy(4), use_tqdm=False)
        assert tokens_of(outputs) == alone
        assert max(len(plan.seq_ids) for plan in watched.plans) == min(max_num_seqs, 20)


def test_max_tokens_zero_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens=0"):
        llm.generate([PROMPTS[0]], SamplingParams(max_tokens=0), use_tqdm=False)


@pytest.mark.parametrize("prompt", ["", {"prompt_token_ids": []}])
def test_an_empty_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="at least one token"):
        llm.generate([prompt], use_tqdm=False)


def test_max_model_len_is_enforced(tiny: Path) -> None:
    with LLM(tiny, max_model_len=32, num_kv_blocks=16) as llm:
        [output] = llm.generate([make_ids(1, 30)], greedy(1000), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 2
        assert output.outputs[0].finish_reason == "length"


def test_max_model_len_cannot_exceed_what_the_model_was_trained_for(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len=8193: the model takes 8192"):
        LLM(tiny, max_model_len=8193)


def test_eight_identical_prompts_take_the_blocks_of_one_and_their_tails(tiny: Path) -> None:
    prompts = [make_ids(1, 1024), make_ids(1, 1027)]  # 64 blocks, without and with a tail
    with LLM(tiny, max_model_len=1100, num_kv_blocks=100) as llm:
        for prompt, num_used in zip(prompts, ([64, 64 + 8, 64 + 8], [64 + 8] * 3), strict=True):
            llm.reset_prefix_cache()
            with watch(llm) as watched:
                outputs = llm.generate([prompt] * 8, greedy(3), use_tqdm=False)
            assert watched.used == num_used
            assert [output.num_cached_tokens for output in outputs] == [0] + [
                min(1024, len(prompt) - 1)
            ] * 7
            assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 1


@pytest.mark.parametrize("name", ["max_num_sequences", "gpu_memory", "foo", "kvcache_block_size"])
def test_an_unknown_setting_is_refused(tiny: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=3: no such setting; the nearest is"):
        LLM(tiny, **{name: 3})


def test_each_of_several_ends_of_the_model_ends_an_output(
    tiny: Path, tmp_path: Path, llm: LLM
) -> None:
    tokens = tokens_of(llm.generate([PROMPTS[1]], greedy(8), use_tqdm=False))[0]
    assert tokens[5] not in tokens[:5]
    for i, ends in enumerate(([2, tokens[5]], [tokens[5], 2], tokens[5])):
        file = "generation_config.json"
        folder = copy_with(tiny, tmp_path / str(i), file, eos_token_id=ends)
        with LLM(folder, max_model_len=64, num_kv_blocks=8) as other:
            params = SamplingParams(temperature=0, max_tokens=8)
            completion = other.generate([PROMPTS[1]], params, use_tqdm=False)[0].outputs[0]
            assert completion.token_ids == tokens[:6]
            assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
            ignoring = other.generate([PROMPTS[1]], greedy(8), use_tqdm=False)
            assert tokens_of(ignoring) == [tokens]


@pytest.mark.parametrize("kind_name", ["rope_type", "type"])
def test_yarn_in_a_dictionary_of_rope_scaling_is_honoured(
    tiny: Path, tmp_path: Path, llm: LLM, kind_name: str
) -> None:
    scaling = {kind_name: "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    fields: dict[str, Any] = {"rope_parameters": None, "rope_theta": 10_000.0}
    folder = copy_with(tiny, tmp_path / "yarn", rope_scaling=scaling, **fields)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    params = greedy(2, logprobs=3)
    with LLM(folder, max_model_len=64, num_kv_blocks=8) as other:
        [scaled] = other.generate([PROMPTS[19]], params, use_tqdm=False)
        assert other.config.max_model_len == 64
    [plain] = llm.generate([PROMPTS[19]], params, use_tqdm=False)
    assert scaled.outputs[0].logprobs is not None
    assert scaled.outputs[0].logprobs != plain.outputs[0].logprobs
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPTS[19]])).logits[0, -1].log_softmax(-1)
    for token_id, entry in scaled.outputs[0].logprobs[0].items():
        assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)


def test_an_unknown_kind_of_rope_scaling_is_refused(tiny: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "spiral", "factor": 4.0}
    folder = copy_with(tiny, tmp_path / "spiral", rope_parameters=None, rope_scaling=scaling)
    with pytest.raises(ModelLoadError, match="spiral"):
        LLM(folder)


def test_greedy_is_allowed_and_repeats_itself(llm: LLM) -> None:
    runs = [llm.generate(PROMPTS[:4], greedy(6), use_tqdm=False) for _ in range(2)]
    assert tokens_of(runs[0]) == tokens_of(runs[1])


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_a_complete_cache_hit_gives_the_same_tokens(tiny: Path, block_size: int) -> None:
    prompt = make_ids(1, 64)
    with LLM(tiny, block_size=block_size, max_model_len=128, num_kv_blocks=256) as llm:
        params = greedy(10, logprobs=3)
        [first] = llm.generate([prompt], params, use_tqdm=False)
        with watch(llm) as watched:
            [again] = llm.generate([prompt], params, use_tqdm=False)
        assert list(watched.counts[0].values()) == [1]  # one query token is left
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 63)
        assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_stale_hash_does_not_survive_the_reuse_of_its_block(tiny: Path) -> None:
    one, two = make_ids(1, 48), make_ids(2, 60)
    with LLM(tiny, max_model_len=128, num_kv_blocks=4) as llm:
        fresh = tokens_of(llm.generate([one], greedy(5), use_tqdm=False))
        llm.generate([two], greedy(4), use_tqdm=False)  # takes all blocks
        [again] = llm.generate([one], greedy(5), use_tqdm=False)
        assert again.num_cached_tokens == 0
        assert tokens_of([again]) == fresh


def test_a_folder_without_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "tokenizer.json").symlink_to(tiny / "tokenizer.json")
    with pytest.raises(ModelLoadError, match="holds no weights") as caught:
        LLM(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_a_tensor_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny, tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ModelLoadError, match=r"the first is model\.layers\.2"):
        LLM(folder)


def test_two_engines_of_different_block_sizes_live_in_one_process(tiny: Path) -> None:
    prompt = make_ids(1, 33)
    with (
        LLM(tiny, block_size=4, max_model_len=64, num_kv_blocks=32) as small,
        LLM(tiny, block_size=32, max_model_len=64, num_kv_blocks=4) as large,
    ):
        with watch(small) as in_small, watch(large) as in_large:
            streams = [llm.stream(prompt, greedy(6)) for llm in (small, large)]
            *_, (one, two) = zip(*streams, strict=True)
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
        assert (in_small.used[0], in_large.used[0]) == (9, 2)


def test_a_request_larger_than_the_pool_is_refused_and_trying_again_works(tiny: Path) -> None:
    with LLM(tiny, max_model_len=512, num_kv_blocks=4) as llm:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="prompt='100 tokens'"):
                llm.generate([make_ids(1, 100)], use_tqdm=False)
            assert_idle(llm)
        assert len(llm.generate([make_ids(1, 20)], greedy(3), use_tqdm=False)) == 1


def test_a_request_that_grows_past_the_pool_ends_by_length(tiny: Path) -> None:
    with LLM(tiny, max_model_len=512, num_kv_blocks=4) as llm:
        [output] = llm.generate([make_ids(1, 20)], greedy(None), use_tqdm=False)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 4 * 16 - 20
        assert_idle(llm)


def test_long_prompts_that_the_cache_knows_cost_little_to_send(tiny: Path) -> None:
    with LLM(tiny, max_model_len=1024, num_kv_blocks=400, max_num_batched_tokens=4096) as llm:
        prompts = [make_ids(1, 1000) + make_ids(i, 8) for i in range(128)]
        with watch(llm) as watched:
            outputs = llm.generate(prompts, greedy(1), use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert len({output.outputs[0].token_ids[0] for output in outputs}) > 1
    assert sum(sum(counts.values()) for counts in watched.counts) == 1008 + 127 * 16
