"""The GGUF container: metadata and where each tensor lies.

Follows the format's specification (ggml, docs/gguf.md), versions 2 and 3, little-endian:

    magic · version · counts │ key, type, value … │ name, shape, type, offset … │ padding │ data
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovllm.errors import ModelLoadError

DEFAULT_ALIGNMENT = 32
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
FLOAT32, STRING, ARRAY = 6, 8, 9
# type of a tensor -> (name, values in a block, bytes of a block)
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: the slowest dimension first, as torch has it (GGUF has it the other way round).
        kind: "F32", "Q4_1", ...
        start: position in the file, in bytes. size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF file whose header was read and checked; its tensors are read on demand."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap

    def require(self, key: str, kind: type) -> Any:
        """The metadata value at `key`.

        Raises:
            ModelLoadError: it is missing or of another kind.
        """
        value = self.metadata.get(key)
        if not isinstance(value, (int, float) if kind is float else kind):
            shown = f"is {value!r:.60}" if key in self.metadata else "is missing"
            raise ModelLoadError(f"{self.path}: metadata {key} {shown}; it must be {kind.__name__}")
        return value

    def optional(self, key: str, kind: type, default: Any = None) -> Any:
        """As `require`, but `default` where the key is missing."""
        return self.require(key, kind) if key in self.metadata else default

    def raw(self, info: TensorInfo) -> NDArray[np.uint8]:
        """The bytes of a tensor, [..., bytes of a row]; a view of the file, read-only."""
        flat = np.frombuffer(self.data, np.uint8, info.size, info.start)
        return flat.reshape(*info.shape[:-1], -1)


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file and check that every tensor lies within the file.

    Raises:
        ModelLoadError: names the file, and the tensor if one is to blame.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise ModelLoadError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    header = Header(data)
    try:
        if bytes(data[:4]) != b"GGUF":
            raise ModelLoadError(f"{path}: not a GGUF file (it does not begin with GGUF)")
        header.position = 4
        version = header.number("I")
        if version not in (2, 3):
            raise ModelLoadError(f"{path}: GGUF version {version:#x} is not 2 or 3, little-endian")
        num_tensors, num_values = header.number("Q"), header.number("Q")
        metadata = {header.string(): header.value() for _ in range(num_values)}
        entries = [header.tensor() for _ in range(num_tensors)]
    except (EOFError, ValueError) as error:
        raise ModelLoadError(f"{path}: damaged GGUF header ({error})") from error
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelLoadError(f"{path}: general.alignment={alignment!r} is impossible")
    start = -(-header.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        if kind not in BLOCKS:
            raise ModelLoadError(
                f"{path}: tensor {name} is of type {type_name(kind)}, which is not supported; "
                f"these are: {', '.join(known for known, _, _ in BLOCKS.values())}"
            )
        label, length, size = BLOCKS[kind]
        if not shape or shape[-1] % length or not all(shape) or name in tensors:
            raise ModelLoadError(
                f"{path}: tensor {name} of shape {list(shape)} is impossible for {label}, or twice"
            )
        info = TensorInfo(name, shape, label, start + offset, prod(shape) // length * size)
        if info.start + info.size > len(data):
            raise ModelLoadError(
                f"{path}: tensor {name} ends at byte {info.start + info.size}, but the file has "
                f"{len(data)}: it is truncated; fetch it again"
            )
        tensors[name] = info
    return GGUFFile(path, metadata, tensors, data)


class Header:
    """Reads a header's parts in order.

    Raises:
        EOFError: a part ends after the file. ValueError: a part is malformed.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise EOFError(f"byte {end} is needed, but the file has {len(self.data)}")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        number = self.number(number_code(kind))
        return shortest(number) if kind == FLOAT32 else number

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        code = number_code(kind)
        part = self.take(count * struct.calcsize("<" + code))
        values: list[Any] = np.frombuffer(part, np.dtype(code).newbyteorder("<")).tolist()
        return values

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type, and offset from the start of the data."""
        name, rank = self.string(), self.number("I")
        shape = tuple(self.number("Q") for _ in range(rank))
        return name, shape[::-1], self.number("I"), self.number("Q")


def number_code(kind: int) -> str:
    """struct's letter for a type of metadata value."""
    if kind not in NUMBERS:
        raise ValueError(f"unknown type of value {kind}")
    return NUMBERS[kind]


def shortest(number: float) -> float:
    """The decimal that a float32 was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def type_name(kind: int) -> str:
    """What ggml calls a type of tensor that is not in `BLOCKS`, if the gguf package knows it."""
    try:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(kind).name)
    except (ImportError, ValueError):
        return f"number {kind}"
