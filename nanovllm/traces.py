"""Traces: when requests came, how long they were, and what their prompts shared."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from math import inf, isfinite
from types import NoneType
from typing import Any, TextIO

from nanovllm.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens that one of its hash ids stands for


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace; the tokens themselves are in none of them.

    Attributes:
        arrival_s: after the first request of the trace.
        num_prompt_tokens, num_output_tokens: at least 1.
        pieces: what the prompt starts with, as names and numbers of tokens. Pieces of the same
            name hold the same tokens, a shorter one the first of them. The rest of the prompt
            is shared with nobody.
        priority: lower goes first; None is the server's default.
        tenant: whose it is.
        ttft_target_s, tpot_target_s: wanted time to the first token, and for each one after it.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    pieces: tuple[tuple[str, int], ...] = ()
    priority: int | None = None
    tenant: str = ""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.arrival_s):
            raise ValueError("its time of arrival is no number of seconds")
        if self.num_prompt_tokens < 1 or self.num_output_tokens < 1:
            raise ValueError("prompt and output need at least 1 token")
        if sum(size for _, size in self.pieces) > self.num_prompt_tokens:
            raise ValueError("its prefix is longer than its prompt")
        if type(self.priority) not in (int, NoneType):
            raise ValueError("its priority is no integer")
        for target_s in (self.ttft_target_s, self.tpot_target_s):
            if target_s is not None and not 0 < target_s < inf:
                raise ValueError("its targets must be positive numbers")


def read_trace(path: str, most: int) -> list[TraceRequest]:
    """The first requests of a file, by time of arrival.

    Args:
        path: JSON lines of `arrival_s, prompt_tokens, output_tokens` and maybe `prefix_id,
            prefix_tokens, priority, tenant, ttft_target_ms, tpot_target_ms`; JSON lines as
            Mooncake publishes them (`timestamp` in ms, `input_length, output_length, hash_ids`: Qin
            et al., 2024); or the CSV of Azure's LLM inference traces (`TIMESTAMP, ContextTokens,
            GeneratedTokens`: Patel et al., 2024).
        most: requests to read.

    Raises:
        ConfigError: the file cannot be read, or a request in it is impossible.
    """
    requests: list[TraceRequest] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            read, rows = reader(file)
            requests.extend(read(row) for row in islice(rows, most))
    except OSError as error:
        raise ConfigError("trace", path, f"cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ConfigError(
            "trace", path, f"request {len(requests) + 1} has no {error.args[0]}"
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError("trace", path, f"request {len(requests) + 1}: {error}") from error
    if not requests:
        raise ConfigError("trace", path, "has no requests")
    requests.sort(key=lambda request: request.arrival_s)
    start_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - start_s) for request in requests]


def reader(file: TextIO) -> tuple[Callable[[Any], TraceRequest], Iterator[Mapping[str, Any]]]:
    """The rows of a file, and what makes a request of one."""
    first = file.readline()
    file.seek(0)
    if not first.startswith("{"):
        return read_azure, csv.DictReader(file)
    rows = (json.loads(line) for line in file if line.strip())
    return (read_own if "arrival_s" in json.loads(first) else read_mooncake), rows


def read_own(row: Mapping[str, Any]) -> TraceRequest:
    size = int(row.get("prefix_tokens") or 0)
    return TraceRequest(
        arrival_s=float(row["arrival_s"]),
        num_prompt_tokens=int(row["prompt_tokens"]),
        num_output_tokens=int(row["output_tokens"]),
        pieces=((str(row["prefix_id"]), size),) if size else (),
        priority=row.get("priority"),
        tenant=str(row.get("tenant") or ""),
        ttft_target_s=target(row, "ttft_target_ms"),
        tpot_target_s=target(row, "tpot_target_ms"),
    )


def target(row: Mapping[str, Any], name: str) -> float | None:
    """A target in seconds, if the row has it."""
    value = row.get(name)
    return None if value is None else float(value) / 1000


def read_azure(row: Mapping[str, Any]) -> TraceRequest:
    return TraceRequest(
        arrival_s=datetime.fromisoformat(row["TIMESTAMP"]).replace(tzinfo=UTC).timestamp(),
        num_prompt_tokens=int(row["ContextTokens"]),
        num_output_tokens=int(row["GeneratedTokens"]),
    )


def read_mooncake(row: Mapping[str, Any]) -> TraceRequest:
    length = int(row["input_length"])
    starts = range(0, length, MOONCAKE_BLOCK)
    return TraceRequest(
        arrival_s=float(row["timestamp"]) / 1000,
        num_prompt_tokens=length,
        num_output_tokens=int(row["output_length"]),
        pieces=tuple(
            (str(hash_id), min(MOONCAKE_BLOCK, length - start))
            for hash_id, start in zip(row["hash_ids"], starts, strict=False)
        ),
    )
