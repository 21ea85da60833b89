"""The books of the KV cache: which block holds which tokens, and who reads it.

A block is room for the keys and values of `block_size` consecutive tokens in every layer. At any
time each block is in exactly one of three places:

          allocate                        release, unhashed
    free ──────────────▶ referenced ──────────────────────▶ free
     ▲                    ▲      │ release, hashed
     │ evict              │ hit  ▼
     └───────────────── cached-idle   (content kept for whoever comes with the same prefix)

A full block is hashed together with everything before it: hash = H(hash of the block before it,
its tokens), so equal hashes mean equal prefixes and one dictionary look-up per block finds the
longest one. The idea is vLLM's automatic prefix caching (Kwon et al., SOSP 2023).
"""

import os
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile

from nanovllm.core.sequence import Sequence


@dataclass(eq=False, slots=True)
class Block:
    """One block: its id, how many block tables hold it, and what it answers to once hashed."""

    block_id: int
    ref_count: int = 0
    block_hash: bytes | None = None
    token_ids: list[int] = field(default_factory=list)


Idle = Mapping[int, Block]  # cached-idle blocks by id, the least recently used first


class BlockManager:
    """Hands out blocks, shares those with equal prefixes, takes them back.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block.
        enable_prefix_caching: False hashes nothing and shares nothing.
        evict: picks the cached-idle block to give up when no free one is left; the least recently
            used by default.

    Invariants (tests/core/test_invariants.py):
        free + cached-idle + referenced = all blocks;
        a block's ref_count is the number of block tables that hold it;
        only full blocks have a hash, and of blocks with equal content only one has;
        only the sequence that allocated a block writes to it, and each position once.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        evict: Callable[[Idle], int] = lambda idle: next(iter(idle)),
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching, self.evict = enable_prefix_caching, evict
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.free: deque[int] = deque(range(num_blocks))
        self.idle: OrderedDict[int, Block] = OrderedDict()
        self.cached: dict[bytes, Block] = {}
        self.key = os.urandom(32)  # nobody outside can make two prefixes collide

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones and those only the cache remembers."""
        return len(self.free) + len(self.idle)

    @property
    def usage(self) -> float:
        """Share of the pool that sequences hold, 0 to 1."""
        return 1 - self.num_available / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, seq: Sequence) -> list[Block]:
        """The longest run of cached blocks that equals the beginning of `seq`.

        A prompt that asks for prompt_logprobs computes every position and matches nothing.
        """
        found: list[Block] = []
        if self.enable_prefix_caching and seq.params.prompt_logprobs is None:
            for i, block_hash in enumerate(self._hashes(seq)):
                block = self.cached.get(block_hash)
                if block is None or block.token_ids != self._tokens(seq, i):
                    break
                found.append(block)
        return found

    def num_matched(self, seq: Sequence) -> int:
        """Tokens at the beginning of `seq` that the cache has, by their hashes alone: quick enough
        to ask of each waiting sequence in each step."""
        hashes = self._hashes(seq) if self.cached and seq.params.prompt_logprobs is None else []
        return self.block_size * sum(1 for _ in takewhile(self.cached.__contains__, hashes))

    def num_to_take(self, matched: Iterable[Block], num_new: int) -> int:
        """How far sharing `matched` and allocating `num_new` blocks lowers num_available."""
        return num_new + sum(block.ref_count == 0 for block in matched)

    def share(self, seq: Sequence, matched: Iterable[Block]) -> int:
        """Begin the block table of `seq`, which is empty, with blocks that `match` found.

        Returns:
            the tokens that these hold.
        """
        for block in matched:
            self.idle.pop(block.block_id, None)
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        seq.num_hashed_blocks = len(seq.block_table)
        seq.num_slots = seq.num_hashed_blocks * self.block_size
        return seq.num_slots

    def allocate(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Lengthen the block table of `seq` to hold `num_tokens`; the caller knows they fit.

        Returns:
            the ids of the blocks added.
        """
        start = len(seq.block_table)
        for _ in range(self.num_blocks_for(num_tokens) - start):
            if not self.free:
                evicted = self.idle.pop(self.evict(self.idle))
                self._unhash(evicted)
                self.free.append(evicted.block_id)
            block_id = self.free.popleft()
            self.blocks[block_id].ref_count = 1
            seq.block_table.append(block_id)
        seq.num_slots = len(seq.block_table) * self.block_size
        return seq.block_table[start:]

    def cache_full_blocks(self, seq: Sequence, num_tokens: int) -> list[Block]:
        """Let the blocks of `seq` that `num_tokens` known tokens fill answer to their hashes.

        Called when the step that computes those tokens is planned. A twin admitted to that very
        step may share them: in each layer a step stores all keys and values before it reads any.

        Returns:
            the blocks that answer from now on; if the step fails, `forget` takes that back.
        """
        num_full, hashed = min(num_tokens, len(seq.token_ids)) // self.block_size, list[Block]()
        if not self.enable_prefix_caching or num_full <= seq.num_hashed_blocks:
            return hashed
        hashes = self._hashes(seq)
        for i in range(seq.num_hashed_blocks, num_full):
            if hashes[i] not in self.cached:
                block = self.cached[hashes[i]] = self.blocks[seq.block_table[i]]
                block.block_hash, block.token_ids = hashes[i], self._tokens(seq, i)
                hashed.append(block)
        seq.num_hashed_blocks = num_full
        return hashed

    def forget(self, blocks: Iterable[Block]) -> None:
        """Take back the hashes of blocks: the step that was to fill them failed."""
        for block in blocks:
            self._unhash(block)
            if self.idle.pop(block.block_id, None) is not None:
                self.free.append(block.block_id)

    def release(self, seq: Sequence) -> None:
        """Give up all blocks of `seq`. Its tail goes first, so that it is also evicted first:
        a cached block is useful only while the blocks before it are there."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0 and block.block_hash is None:
                self.free.append(block_id)
            elif block.ref_count == 0:
                self.idle[block_id] = block
        seq.block_table = []
        seq.num_slots = seq.num_hashed_blocks = 0

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; blocks in use stay with their sequences."""
        for block in list(self.cached.values()):
            self._unhash(block)
        self.free.extend(self.idle)
        self.idle.clear()

    def _unhash(self, block: Block) -> None:
        if block.block_hash is not None:
            del self.cached[block.block_hash]
            block.block_hash, block.token_ids = None, []

    def _hashes(self, seq: Sequence) -> list[bytes]:
        """The chain hashes of all full blocks of `seq`; each is computed once."""
        hashes = seq.block_hashes
        for i in range(len(hashes), len(seq.token_ids) // self.block_size):
            parent = hashes[-1] if hashes else seq.cache_salt.encode(errors="surrogatepass")
            tokens = array("q", self._tokens(seq, i)).tobytes()
            hashes.append(blake2b(parent + tokens, key=self.key, digest_size=16).digest())
        return hashes

    def _tokens(self, seq: Sequence, i: int) -> list[int]:
        return seq.token_ids[i * self.block_size : (i + 1) * self.block_size]
