"""`nanovllm serve` with parts that fail when a prompt asks for it, and a wall clock that jumps:

python -m tests.server.faulty serve MODEL ...
"""

import sys
import time
from collections.abc import Sequence as Items

import torch

import nanovllm.llm
from nanovllm.cli import main
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.executor.inline import InlineExecutor
from nanovllm.tokenizer import Tokenizer

# the last token of a prompt -> what the step that takes it in raises
FAILS, OUT_OF_MEMORY, DIES = 48_901, 48_902, 48_903
FAULTS: dict[int, BaseException] = {
    FAILS: RuntimeError("a kernel failed"),
    OUT_OF_MEMORY: torch.OutOfMemoryError("no memory is left"),
    DIES: SystemExit("the engine's thread ends"),
}
UNDECODABLE = 48_904  # a prompt that ends so makes tokens that have no text
UNENCODABLE = "no tokenizer reads this"
HOUR_S = 3600


class FaultyExecutor(InlineExecutor):
    """Runs the model, but for some prompts."""

    def execute(self, plan: StepPlan) -> StepResult:
        for new in plan.new_sequences:
            if (fault := FAULTS.get(new.token_ids[-1])) is not None:
                raise fault
        return super().execute(plan)


class FaultyTokenizer(Tokenizer):
    """Reads and writes text, but for some."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, field: str = "prompt"
    ) -> list[int]:
        if text == UNENCODABLE:
            raise RuntimeError("the tokenizer failed")
        return super().encode(text, add_special_tokens=add_special_tokens, field=field)

    def decode(self, token_ids: Items[int], *, skip_special_tokens: bool = True) -> str:
        if UNDECODABLE in token_ids[:-1]:
            raise RuntimeError("the detokenizer failed")
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


class JumpingClock:
    """time.time() of a machine whose clock is set an hour forth or back at each look."""

    def __init__(self) -> None:
        self.now, self.num_looks = time.time, 0

    def __call__(self) -> float:
        self.num_looks += 1
        return self.now() + HOUR_S * (-1) ** self.num_looks


if __name__ == "__main__":
    nanovllm.llm.InlineExecutor = FaultyExecutor  # type: ignore[misc]
    nanovllm.llm.Tokenizer = FaultyTokenizer  # type: ignore[misc]
    time.time = JumpingClock()
    sys.exit(main())
