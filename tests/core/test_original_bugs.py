"""Bugs of the original nano-vLLM that the control plane could have; each is a test here."""

import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from tests.core.fakes import Rig


def test_a_request_larger_than_the_pool_is_refused_and_the_others_go_on():
    rig = Rig(4, 4)
    other = rig.add([1] * 4, max_tokens=2)
    with pytest.raises(InvalidRequestError, match="prompt='40 tokens'"):
        rig.engine.add([2] * 40, SamplingParams())
    rig.run()
    assert other.finish_reason == "length"


def test_a_request_that_grows_past_the_pool_ends_by_length():
    rig = Rig(4, 4)
    seq = rig.add([1] * 10, max_tokens=None)
    rig.run()
    assert (seq.num_tokens, seq.finish_reason, seq.num_preemptions) == (16, "length", 0)
    assert rig.blocks.num_available == 4


def test_max_model_len_is_enforced():
    rig = Rig(max_model_len=12)
    seq = rig.add([1] * 10, max_tokens=1000)
    rig.run()
    assert (seq.num_tokens, seq.finish_reason) == (12, "length")


def test_max_tokens_zero_is_refused():
    with pytest.raises(InvalidRequestError, match="max_tokens=0"):
        SamplingParams(max_tokens=0)


def test_an_empty_prompt_is_refused():
    rig = Rig()
    with pytest.raises(InvalidRequestError, match="prompt"):
        rig.engine.add([], SamplingParams())
    assert not rig.engine.has_unfinished


def test_greedy_is_allowed():
    assert SamplingParams(temperature=0).greedy


def test_waiting_prompts_do_not_starve_decodes():
    rig = Rig(400, 4, max_num_batched_tokens=16)
    decoding = rig.add([1] * 4, max_tokens=40)
    rig.step()
    for i in range(10):
        rig.add([10 + i] * 60, max_tokens=1)
    for num_tokens in range(2, 41):
        rig.step()
        assert len(decoding.output_token_ids) == num_tokens
    assert decoding.finish_reason == "length"


def test_eight_identical_prompts_in_a_step_take_the_blocks_of_one():
    rig = Rig(64, 256, max_num_batched_tokens=8192)
    for _ in range(8):
        rig.add([1] * 1024)
    rig.step()
    assert 64 - rig.blocks.num_available == 4


def test_a_complete_cache_hit_leaves_one_query_token():
    rig = Rig()
    rig.add([1] * 8, max_tokens=1)
    rig.run()
    seq = rig.add([1] * 8, max_tokens=1)
    assert rig.step() == {1: 1}
    assert seq.output_token_ids == [7]


def test_a_stale_hash_does_not_survive_the_reuse_of_its_block():
    rig = Rig(3, 4)
    rig.add([1] * 8, max_tokens=1)
    rig.run()
    rig.add([2] * 11, max_tokens=1)  # takes all blocks and leaves two other hashes
    rig.run()
    assert rig.blocks.match(rig.add([1] * 8, max_tokens=1)) == []
    assert rig.step() == {2: 8}


def test_a_block_is_shared_only_if_its_tokens_are_equal_too():
    rig = Rig()
    rig.add([1] * 8, max_tokens=1)
    rig.run()
    for block in rig.blocks.cached.values():
        block.token_ids = [9] * 4  # as a hash of 64 bits may collide
    seq = rig.add([1] * 8, max_tokens=1)
    assert rig.step() == {1: 8}
    assert seq.num_cached_tokens == 0


def test_two_engines_of_one_process_have_their_own_block_sizes():
    small, large = Rig(64, 4), Rig(64, 16)
    for rig in (small, large):
        rig.add([1] * 17)
        rig.step()
    assert small.plan.new_block_ids == {0: [0, 1, 2, 3, 4]}
    assert large.plan.new_block_ids == {0: [0, 1]}
