"""What the tests of the whole engine share: small models, parameters, and eyes on its steps."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from tests.models.test_families import make_reference

VOCAB_SIZE = 49_152  # of SmolLM2's tokenizer
EOS = 2  # its <|im_end|>


def save_tiny(folder: Path, tokenizer: Path, family: str = "llama", **overrides: Any) -> Any:
    """A small random model with SmolLM2's tokenizer beside it; returns transformers' model."""
    own = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 8192, "eos_token_id": EOS}
    theirs = make_reference(family, own | {"num_hidden_layers": 2} | overrides)
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return theirs


def copy_with(folder: Path, target: Path, file: str = "config.json", **changed: Any) -> Path:
    """A copy of a checkpoint with some fields of one of its JSON files changed (None: removed)."""
    shutil.copytree(folder, target)
    fields = json.loads((target / file).read_text()) | changed
    kept = {name: value for name, value in fields.items() if value is not None}
    (target / file).write_text(json.dumps(kept))
    return target


def greedy(max_tokens: int | None = 16, **params: Any) -> SamplingParams:
    """The likeliest tokens, and exactly `max_tokens` of them unless told otherwise."""
    return SamplingParams(
        **{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True} | params
    )


def make_ids(seed: int, length: int) -> list[int]:
    """Token ids that look random and of which no two seeds share a beginning."""
    return [5 + (7919 * seed + 104_729 * i * (i + seed)) % 49_000 for i in range(length)]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def num_used(llm: LLM) -> int:
    """Blocks that sequences hold."""
    blocks = llm.engine.core.scheduler.blocks
    return blocks.num_blocks - blocks.num_available


def assert_idle(llm: LLM) -> None:
    """Nothing is queued, held or remembered of any request."""
    assert not llm.engine.core.has_unfinished
    assert num_used(llm) == 0
    assert not llm.engine.requests


class Watch:
    """What passes between an engine and its executor, and a way to disturb it.

    Attributes:
        plans: all that were executed. used: blocks in use as each was.
        failures: step number (from 0) -> exception to raise instead of executing it.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm, self.plans, self.used = llm, list[StepPlan](), list[int]()
        self.failures: dict[int, BaseException] = {}
        self.execute = llm.engine.core.executor.execute

    def __call__(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.used.append(num_used(self.llm))
        if failure := self.failures.get(len(self.plans) - 1):
            raise failure
        return self.execute(plan)

    @property
    def counts(self) -> list[dict[int, int]]:
        """Of each step: seq_id -> tokens computed."""
        rows = [(plan.seq_ids, plan.num_scheduled_tokens) for plan in self.plans]
        return [dict(zip(*row, strict=True)) for row in rows]


@contextmanager
def watch(llm: LLM) -> Iterator[Watch]:
    """See the plans of an engine as they are executed."""
    executor, watching = llm.engine.core.executor, Watch(llm)
    executor.execute = watching  # type: ignore[method-assign]
    try:
        yield watching
    finally:
        del executor.execute
