"""BlockManager: which block ids are handed out, shared, kept and evicted. Blocks of 4 tokens."""

from array import array
from hashlib import blake2b

from nanovllm.core.block_manager import BlockManager
from nanovllm.core.sequence import Sequence
from tests.core.fakes import make_seq


def manager(num_blocks: int = 8, **options: object) -> BlockManager:
    return BlockManager(num_blocks, 4, **options)


def fill(blocks: BlockManager, seq: Sequence) -> list[int]:
    """Share what is cached of `seq`, allocate and hash the rest. Returns its block table."""
    blocks.share(seq, blocks.match(seq))
    blocks.allocate(seq, seq.num_tokens)
    blocks.cache_full_blocks(seq, seq.num_tokens)
    return list(seq.block_table)


def ref_counts(blocks: BlockManager) -> list[int]:
    return [block.ref_count for block in blocks.blocks]


def matched(blocks: BlockManager, seq: Sequence) -> list[int]:
    return [block.block_id for block in blocks.match(seq)]


# Allocation


def test_blocks_are_allocated_in_order_and_only_as_many_as_the_tokens_fill():
    blocks, a, b = manager(6), make_seq(list(range(10))), make_seq([9] * 5)
    assert blocks.allocate(a, 10) == [0, 1, 2]
    assert (a.block_table, a.num_slots) == ([0, 1, 2], 12)
    assert blocks.allocate(b, 5) == [3, 4]
    assert blocks.allocate(a, 12) == []
    assert blocks.allocate(a, 13) == [5]
    assert a.block_table == [0, 1, 2, 5]
    assert ref_counts(blocks) == [1, 1, 1, 1, 1, 1]
    assert blocks.num_available == 0
    assert blocks.usage == 1


def test_released_blocks_without_a_hash_are_reused_last_of_all_and_tail_first():
    blocks, a, b = manager(6), make_seq([1] * 10), make_seq([2] * 20)
    blocks.allocate(a, 10)
    blocks.release(a)
    assert (a.block_table, a.num_slots, a.num_hashed_blocks) == ([], 0, 0)
    assert list(blocks.free) == [3, 4, 5, 2, 1, 0]
    assert blocks.allocate(b, 20) == [3, 4, 5, 2, 1]


def test_num_blocks_for_rounds_up():
    assert [manager().num_blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


# Hashes


def test_each_hash_covers_its_tokens_and_the_hash_before_it():
    blocks, seq = manager(), make_seq([1, 2, 3, 4, 5, 6, 7, 8, 9], salt="mine")
    blocks.key = bytes(32)
    fill(blocks, seq)

    def digest(parent: bytes, *tokens: int) -> bytes:
        data = parent + array("q", tokens).tobytes()
        return blake2b(data, key=bytes(32), digest_size=16).digest()

    first = digest(b"mine", 1, 2, 3, 4)
    assert seq.block_hashes == [first, digest(first, 5, 6, 7, 8)]
    assert [block.block_hash for block in blocks.blocks[:3]] == [*seq.block_hashes, None]
    assert blocks.cached == dict(zip(seq.block_hashes, blocks.blocks[:2], strict=True))


def test_equal_tokens_after_different_ones_hash_differently():
    blocks, a, b = manager(), make_seq([1] * 4 + [5] * 4), make_seq([2] * 4 + [5] * 4, 1)
    assert fill(blocks, a) == [0, 1]
    assert fill(blocks, b) == [2, 3]
    assert a.block_hashes[1] != b.block_hashes[1]


def test_two_managers_hash_with_different_keys():
    a, b = make_seq([1] * 4), make_seq([1] * 4)
    fill(manager(), a)
    fill(manager(), b)
    assert a.block_hashes != b.block_hashes


def test_only_full_blocks_are_hashed_and_each_once():
    blocks, seq = manager(), make_seq([1] * 11)
    blocks.allocate(seq, 11)
    for num_tokens, hashed in ((3, []), (7, [0]), (7, [0]), (11, [0, 1])):
        blocks.cache_full_blocks(seq, num_tokens)
        assert [block.block_id for block in blocks.cached.values()] == hashed
        assert seq.num_hashed_blocks == len(hashed)


# Sharing


def test_a_prefix_is_shared_and_the_rest_allocated():
    blocks = manager()
    a, b = make_seq([1, 1, 1, 1, 2, 2, 2, 2, 3]), make_seq([1, 1, 1, 1, 2, 2, 2, 2, 4, 4], 1)
    assert fill(blocks, a) == [0, 1, 2]
    found = blocks.match(b)
    assert [block.block_id for block in found] == [0, 1]
    assert blocks.num_to_take(found, 1) == 1
    blocks.share(b, found)
    assert (b.block_table, b.num_slots, b.num_hashed_blocks) == ([0, 1], 8, 2)
    assert blocks.allocate(b, 10) == [3]
    assert ref_counts(blocks) == [2, 2, 1, 1, 0, 0, 0, 0]
    blocks.release(a)
    assert ref_counts(blocks) == [1, 1, 0, 1, 0, 0, 0, 0]
    assert list(blocks.idle) == []
    blocks.release(b)
    assert ref_counts(blocks) == [0] * 8
    assert list(blocks.idle) == [1, 0]
    assert list(blocks.free) == [4, 5, 6, 7, 2, 3]


def test_a_match_stops_at_the_first_difference():
    blocks = manager()
    fill(blocks, make_seq([1] * 4 + [2] * 4 + [3] * 4))
    assert matched(blocks, make_seq([1] * 4 + [9] * 4 + [3] * 4, 1)) == [0]
    assert matched(blocks, make_seq([9] * 4 + [2] * 4 + [3] * 4, 2)) == []
    assert matched(blocks, make_seq([1] * 7, 3)) == [0]


def test_taking_idle_blocks_counts_against_what_is_available():
    blocks, a, b = manager(3), make_seq([1] * 8), make_seq([1] * 9, 1)
    fill(blocks, a)
    blocks.release(a)
    found = blocks.match(b)
    assert blocks.num_available == 3
    assert blocks.num_to_take(found, 1) == 3
    blocks.share(b, found)
    assert (blocks.num_available, list(blocks.idle)) == (1, [])
    assert blocks.allocate(b, 9) == [2]


def test_salts_never_share():
    blocks = manager()
    a, b, c = (make_seq([1] * 8, i, salt) for i, salt in enumerate(["", "x", "y"]))
    assert [fill(blocks, seq) for seq in (a, b, c)] == [[0, 1], [2, 3], [4, 5]]
    assert matched(blocks, make_seq([1] * 8, 3, "x")) == [2, 3]


def test_a_salt_that_is_no_valid_unicode_is_a_salt_like_any_other():
    blocks = manager()
    assert fill(blocks, make_seq([1] * 4, 0, "\ud800")) == [0]
    assert matched(blocks, make_seq([1] * 4, 1, "\ud800")) == [0]
    assert matched(blocks, make_seq([1] * 4, 2, "\ud801")) == []


def test_a_hit_is_verified_against_the_tokens():
    blocks = manager()
    fill(blocks, make_seq([1] * 8))
    blocks.blocks[1].token_ids = [1, 1, 1, 2]  # as if two prefixes had the same hash
    assert matched(blocks, make_seq([1] * 8, 1)) == [0]


def test_prompt_logprobs_match_nothing_but_leave_their_blocks_to_others():
    blocks = manager()
    fill(blocks, make_seq([1] * 8))
    seq = make_seq([1] * 4 + [2] * 4, 1, prompt_logprobs=1)
    assert fill(blocks, seq) == [2, 3]
    assert matched(blocks, make_seq([1] * 4 + [2] * 4, 2)) == [0, 3]


def test_of_blocks_with_equal_content_only_one_answers():
    blocks, a, b = manager(), make_seq([1] * 8), make_seq([1] * 8, 1)
    for seq in (a, b):  # b was admitted before a had computed anything
        blocks.allocate(seq, 8)
    blocks.cache_full_blocks(a, 8)
    blocks.cache_full_blocks(b, 8)
    assert [block.block_id for block in blocks.blocks if block.block_hash] == [0, 1]
    assert matched(blocks, make_seq([1] * 8, 2)) == [0, 1]
    blocks.release(b)
    assert list(blocks.free) == [4, 5, 6, 7, 3, 2]
    assert list(blocks.idle) == []


# Eviction


def test_the_cache_is_evicted_least_recently_used_first_and_tail_first():
    blocks, a, b = manager(5), make_seq([1] * 8), make_seq([2] * 8, 1)
    fill(blocks, a)
    fill(blocks, b)
    blocks.release(b)
    blocks.release(a)
    assert list(blocks.idle) == [3, 2, 1, 0]
    fill(blocks, make_seq([2] * 4, 2))  # a use of block 2 takes it out of the queue
    assert list(blocks.idle) == [3, 1, 0]
    assert blocks.allocate(make_seq([3] * 16, 3), 16) == [4, 3, 1, 0]


def test_free_blocks_are_used_before_cached_ones():
    blocks, a = manager(4), make_seq([1] * 8)
    fill(blocks, a)
    blocks.release(a)
    assert blocks.allocate(make_seq([2] * 8, 1), 8) == [2, 3]
    assert matched(blocks, make_seq([1] * 8, 2)) == [0, 1]


def test_a_hash_does_not_survive_the_reuse_of_its_block():
    blocks, a = manager(2), make_seq([1] * 8)
    fill(blocks, a)
    blocks.release(a)
    taken = make_seq([2] * 3, 1)
    assert blocks.allocate(taken, 3) == [1]
    assert (blocks.blocks[1].block_hash, blocks.blocks[1].token_ids) == (None, [])
    assert matched(blocks, make_seq([1] * 8, 2)) == [0]
    blocks.release(taken)
    assert matched(blocks, make_seq([1] * 8, 3)) == [0]
    assert (list(blocks.free), list(blocks.idle)) == ([1], [0])


def test_a_chain_whose_head_was_evicted_matches_nothing_until_the_head_is_back():
    blocks, a = manager(3, evict=lambda idle: next(reversed(idle))), make_seq([1] * 8)
    fill(blocks, a)
    blocks.release(a)
    other = make_seq([2] * 8, 1)
    assert blocks.allocate(other, 8) == [2, 0]
    assert matched(blocks, make_seq([1] * 8, 2)) == []
    blocks.release(other)
    assert fill(blocks, make_seq([1] * 4, 3)) == [0]
    assert matched(blocks, make_seq([1] * 8, 4)) == [0, 1]


def test_the_evict_hook_sees_the_idle_blocks_in_order_and_chooses():
    seen: list[list[int]] = []

    def newest(idle: object) -> int:
        seen.append(list(idle))
        return seen[-1][-1]

    blocks, a = manager(3, evict=newest), make_seq([1] * 12)
    fill(blocks, a)
    blocks.release(a)
    assert blocks.allocate(make_seq([2] * 8, 1), 8) == [0, 1]
    assert seen == [[2, 1, 0], [2, 1]]


# Taking hashes back


def test_forget_takes_back_the_hashes_of_a_step_that_failed():
    blocks, seq = manager(), make_seq([1] * 12)
    blocks.allocate(seq, 12)
    assert [block.block_id for block in blocks.cache_full_blocks(seq, 7)] == [0]
    hashed = blocks.cache_full_blocks(seq, 12)
    assert [block.block_id for block in hashed] == [1, 2]
    blocks.forget(hashed)
    assert matched(blocks, make_seq([1] * 12, 1)) == [0]
    blocks.release(seq)
    assert (list(blocks.free), list(blocks.idle)) == ([3, 4, 5, 6, 7, 2, 1], [0])


def test_forget_frees_blocks_that_only_the_cache_held():
    blocks, seq = manager(), make_seq([1] * 8)
    blocks.allocate(seq, 8)
    hashed = blocks.cache_full_blocks(seq, 8)
    blocks.release(seq)  # aborted before the step failed
    assert list(blocks.idle) == [1, 0]
    blocks.forget(hashed)
    assert (list(blocks.free), list(blocks.idle)) == ([2, 3, 4, 5, 6, 7, 0, 1], [])


def test_num_matched_counts_the_tokens_of_cached_blocks_from_the_beginning():
    blocks, seq = manager(), make_seq([1] * 4 + [2] * 4 + [3] * 4)
    fill(blocks, seq)
    assert blocks.num_matched(make_seq([1] * 4 + [2] * 4 + [9] * 8, 1)) == 8
    assert blocks.num_matched(make_seq([2] * 4, 2)) == 0
    blocks.forget([blocks.blocks[1]])
    assert blocks.num_matched(make_seq([1] * 4 + [2] * 4 + [3] * 4, 3)) == 4


def test_num_matched_is_nothing_for_a_prompt_that_shares_nothing():
    blocks, seq = manager(), make_seq([1] * 8)
    fill(blocks, seq)
    assert blocks.num_matched(make_seq([1] * 8, 1, prompt_logprobs=0)) == 0
    without, seq = manager(enable_prefix_caching=False), make_seq([1] * 8)
    assert (without.num_matched(seq), seq.block_hashes) == (0, [])  # and hashes nothing


def test_only_known_tokens_fill_a_block():
    blocks, seq = manager(), make_seq([1] * 7)
    blocks.allocate(seq, 8)
    seq.num_tokens = 8  # the last is awaited
    assert [block.block_id for block in blocks.cache_full_blocks(seq, 8)] == [0]
    seq.token_ids.append(1)
    assert [block.block_id for block in blocks.cache_full_blocks(seq, 8)] == [1]


def test_reset_prefix_cache_forgets_all_and_leaves_blocks_in_use():
    blocks, a, b = manager(6), make_seq([1] * 8), make_seq([2] * 8, 1)
    fill(blocks, a)
    fill(blocks, b)
    blocks.release(a)
    blocks.reset_prefix_cache()
    assert (blocks.cached, list(blocks.idle), list(blocks.free)) == ({}, [], [4, 5, 1, 0])
    assert (b.block_table, ref_counts(blocks)) == ([2, 3], [0, 0, 1, 1, 0, 0])
    blocks.release(b)
    assert list(blocks.free) == [4, 5, 1, 0, 3, 2]


def test_without_prefix_caching_nothing_is_hashed_or_shared():
    blocks, a = manager(enable_prefix_caching=False), make_seq([1] * 8)
    assert fill(blocks, a) == [0, 1]
    assert (blocks.cached, a.block_hashes) == ({}, [])
    assert matched(blocks, make_seq([1] * 8, 1)) == []
    blocks.release(a)
    assert (list(blocks.free), list(blocks.idle)) == ([2, 3, 4, 5, 6, 7, 1, 0], [])
