"""Which replica has which prefixes, as far as the requests sent there tell."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import takewhile


def prefix_hashes(token_ids: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """A hash for each full block of a prompt, of its tokens and all before them."""
    above, hashes = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest(), []
    for end in range(block_size, len(token_ids) + 1, block_size):
        block = ",".join(map(str, token_ids[end - block_size : end]))
        above = blake2b(above + block.encode(), digest_size=16).digest()
        hashes.append(above)
    return hashes


class PrefixIndex:
    """The prefixes that went to each replica, the latest used last.

    Args:
        max_blocks: remembered for each replica; the longest unused go first.
    """

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.blocks: dict[str, OrderedDict[bytes, None]] = {}

    def add(self, replica: str, hashes: Sequence[bytes]) -> None:
        """A prompt goes to a replica."""
        blocks = self.blocks.setdefault(replica, OrderedDict())
        for block_hash in reversed(hashes):  # so that the end of a prefix is forgotten first
            blocks[block_hash] = None
            blocks.move_to_end(block_hash)
        while len(blocks) > self.max_blocks:
            blocks.popitem(last=False)

    def keep(self, replicas: Sequence[str]) -> None:
        """Forget all replicas but these."""
        for gone in self.blocks.keys() - set(replicas):
            del self.blocks[gone]

    def match(self, replica: str, hashes: Sequence[bytes]) -> int:
        """Blocks at the beginning of a prompt that a replica should have."""
        blocks = self.blocks.get(replica, OrderedDict[bytes, None]())
        return sum(1 for _ in takewhile(blocks.__contains__, hashes))

    def choose(self, hashes: Sequence[bytes], loads: Mapping[str, int], most_ahead: int) -> str:
        """The replica with the longest match; the least loaded of equals (then the one with fewer
        prefixes), or of all where that one has over `most_ahead` requests more.

        Args:
            loads: requests under way at each replica that there is; not empty.
        """

        def room(replica: str) -> tuple[int, int]:
            return -loads[replica], -len(self.blocks.get(replica, ()))

        least = max(loads, key=room)
        best = max(loads, key=lambda replica: (self.match(replica, hashes), room(replica)))
        return best if loads[best] - loads[least] <= most_ahead else least
