"""A ring in shared memory, through which the leader tells all followers the same.

      slot 0        slot 1        slot 2   ...   slot S-1
    [ 8 | data ]  [ 9 | data ]  [ 6 | data ]  [ 7 | data ]
          ▲             ▲             ▲
      a follower    the newest    all have read this one and those
      reads this                  before it: it is free for number 10

A message is cut into as many slots as it needs, so it can be of any size. The memory has no name:
who has its descriptor can map it, and it is gone with the last of them. That a slot is written is
said by a byte to each follower's connection; by its end each side learns of the other's.
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

HEADER = struct.Struct("<QII")  # number of what the slot holds, its bytes, 1 if it ends a message
COUNT = struct.Struct("<Q")  # slots that a follower has read
WAIT_S = 0.0002  # between looks at a full ring


class Shape(NamedTuple):
    """How a ring is divided."""

    num_followers: int
    num_slots: int = 16
    slot_bytes: int = 1 << 18

    @property
    def size(self) -> int:
        return self.num_followers * COUNT.size + self.num_slots * (HEADER.size + self.slot_bytes)

    def slot_at(self, number: int) -> int:
        start = self.num_followers * COUNT.size
        return start + number % self.num_slots * (HEADER.size + self.slot_bytes)


def shared_memory(size: int) -> int:
    """The descriptor of new memory that can be passed on to other processes."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("nanovllm")
    else:  # a file without a name
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


class RingWriter:
    """The leader's end.

    Args:
        fd: of the memory. connections: one for each follower.
    """

    def __init__(self, fd: int, shape: Shape, connections: Sequence[Connection]) -> None:
        self.shape, self.connections, self.number = shape, connections, 0
        self.memory = mmap.mmap(fd, shape.size)

    def write(self, message: bytes, wait: Callable[[float], None]) -> None:
        """Tell all followers.

        Args:
            wait: sleeps for so many seconds while the ring is full, or raises.

        Raises:
            OSError: a follower is gone.
        """
        shape = self.shape
        for start in range(0, max(len(message), 1), shape.slot_bytes):
            while self.number - self._least_read() >= shape.num_slots:
                wait(WAIT_S)
            part = message[start : start + shape.slot_bytes]
            at, ends = shape.slot_at(self.number), start + shape.slot_bytes >= len(message)
            self.memory[at + HEADER.size : at + HEADER.size + len(part)] = part
            HEADER.pack_into(self.memory, at, self.number, len(part), ends)
            self.number += 1
            for connection in self.connections:
                connection.send_bytes(b".")

    def _least_read(self) -> int:
        counts = range(0, self.shape.num_followers * COUNT.size, COUNT.size)
        return min(int(COUNT.unpack_from(self.memory, at)[0]) for at in counts)


class RingReader:
    """A follower's end.

    Args:
        follower: its number, from 0.
    """

    def __init__(self, fd: int, shape: Shape, follower: int, connection: Connection) -> None:
        self.shape, self.follower, self.connection, self.number = shape, follower, connection, 0
        self.memory = mmap.mmap(fd, shape.size)

    def read(self) -> bytes:
        """The next message; waits for it.

        Raises:
            EOFError: the leader is gone, or has closed its connection.
        """
        parts, ends = [], 0
        while not ends:
            self.connection.recv_bytes()
            at = self.shape.slot_at(self.number)
            number, size, ends = HEADER.unpack_from(self.memory, at)
            assert number == self.number, f"the slot holds {number}, not {self.number}"
            parts.append(self.memory[at + HEADER.size : at + HEADER.size + size])
            self.number += 1
            COUNT.pack_into(self.memory, self.follower * COUNT.size, self.number)
        return b"".join(parts)
