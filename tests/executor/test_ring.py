"""The ring: messages of any size reach every follower whole, in order."""

import os
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread

import pytest

from nanovllm.executor.ring import RingReader, RingWriter, Shape, shared_memory


class Ends:
    """A leader and two followers around a small ring, in one process."""

    def __init__(self, shape: Shape) -> None:
        self.fd = shared_memory(shape.size)
        pairs: list[tuple[Connection, Connection]] = [Pipe() for _ in range(shape.num_followers)]
        self.writer = RingWriter(self.fd, shape, [ours for ours, _ in pairs])
        self.readers = [
            RingReader(self.fd, shape, i, theirs) for i, (_, theirs) in enumerate(pairs)
        ]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends(Shape(num_followers=2, num_slots=3, slot_bytes=8))
    yield ends
    os.close(ends.fd)


def never(seconds: float) -> None:
    raise AssertionError("there is room")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 24])
def test_each_follower_reads_what_was_written(ends: Ends, size: int) -> None:
    message = bytes(range(size))
    ends.writer.write(message, never)
    assert [reader.read() for reader in ends.readers] == [message, message]


def test_messages_stay_apart_and_in_order(ends: Ends) -> None:
    for number in range(20):
        ends.writer.write(b"%d" % number, never)
        ends.writer.write(b"", never)
        assert [reader.read() for reader in ends.readers for _ in range(2)] == [
            b"%d" % number, b"", b"%d" % number, b"",
        ]  # fmt: skip


def test_a_message_larger_than_the_ring_waits_for_its_readers(ends: Ends) -> None:
    message = os.urandom(10_000)
    found: list[bytes] = []
    threads = [Thread(target=lambda r=reader: found.append(r.read())) for reader in ends.readers]
    for thread in threads:
        thread.start()
    ends.writer.write(message, time.sleep)
    for thread in threads:
        thread.join(30)
    assert found == [message, message]


def test_a_full_ring_waits_for_its_slowest_reader(ends: Ends) -> None:
    class WaitedError(Exception):
        pass

    def waited(seconds: float) -> None:
        raise WaitedError

    for number in range(3):
        ends.writer.write(b"%d" % number, never)
    fast, slow = ends.readers
    assert [fast.read() for _ in range(3)] == [b"0", b"1", b"2"]
    with pytest.raises(WaitedError):
        ends.writer.write(b"3", waited)
    assert slow.read() == b"0"
    ends.writer.write(b"3", never)
    assert [slow.read() for _ in range(3)] == [b"1", b"2", b"3"]


def test_a_leader_that_is_gone_ends_the_reading(ends: Ends) -> None:
    for connection in ends.writer.connections:
        connection.close()
    with pytest.raises(EOFError):
        ends.readers[0].read()


def test_a_follower_that_is_gone_is_an_error(ends: Ends) -> None:
    ends.readers[1].connection.close()
    with pytest.raises(BrokenPipeError):
        ends.writer.write(b"x", never)
