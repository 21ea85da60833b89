"""Where the time of an engine's steps goes: an LLM whose parts are timed for a while."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nanovllm.errors import NanoVLLMError
from nanovllm.executor.inline import InlineExecutor
from nanovllm.kernels import AttentionBatch, Backend, KVCache, Ops
from nanovllm.layers.linear import Linear
from nanovllm.llm import LLM
from nanovllm.tokenizer import Text

PRODUCTS, ATTENTION, NORMS = "products", "attention", "norms"
SAMPLING, INPUTS, SCHEDULING = "sampling", "input preparation", "scheduling"
DETOKENIZING, REST = "detokenizing", "the rest"
PARTS = (PRODUCTS, ATTENTION, NORMS, SAMPLING, INPUTS, SCHEDULING, DETOKENIZING, REST)
OPS = {name: ATTENTION if name == "attend" else NORMS for name in vars(Ops) if name[0] != "_"}
MISSING = object()


@dataclass(slots=True)
class Spent:
    """On one part: without the time of the parts that it called."""

    seconds: float = 0.0
    calls: int = 0


@dataclass(slots=True)
class Profile:
    """Seconds and calls of each of PARTS. An activation counts with its product. All time in which
    no other part ran is the rest's: the embedding, RoPE's angles, log probabilities of prompts, and
    what happens between steps; each step is a call of it.

    Attributes:
        stack: the parts that are running, each called by the one before it.
    """

    clock: Callable[[], float] = perf_counter
    parts: dict[str, Spent] = field(default_factory=lambda: {name: Spent() for name in PARTS})
    stack: list[str] = field(default_factory=list)
    since_s: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(spent.seconds for spent in self.parts.values())

    @property
    def num_steps(self) -> int:
        return self.parts[REST].calls

    def enter(self, part: str) -> None:
        """From now on the time is this part's."""
        self.settle()
        self.stack.append(part)

    def leave(self) -> None:
        """From now on the time is again that of the part before."""
        self.settle()
        self.stack.pop()

    def settle(self) -> None:
        """Give the time up to now to the part that was running."""
        now_s = self.clock()
        if self.stack:
            self.parts[self.stack[-1]].seconds += now_s - self.since_s
        self.since_s = now_s

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; the time of its calls is the part's."""
        spent = self.parts[part]

        def call(*args: Any, **settings: Any) -> Any:
            spent.calls += 1
            self.enter(part)
            try:
                return function(*args, **settings)
            finally:
                self.leave()

        return call

    def rows(self) -> dict[str, dict[str, float]]:
        """For each part: seconds, share (of all), calls, ms_per_step."""
        whole, steps = self.seconds or 1, self.num_steps or 1
        return {
            name: {
                "seconds": spent.seconds,
                "share": spent.seconds / whole,
                "calls": spent.calls,
                "ms_per_step": spent.seconds / steps * 1000,
            }
            for name, spent in self.parts.items()
        }

    def table(self) -> str:
        """The same to look at."""
        lines = [f"{'part':<20}{'seconds':>10}{'share':>8}{'calls':>9}{'ms a step':>11}"]
        for name, row in self.rows().items():
            counts = f"{row['seconds']:>10.3f}{row['share']:>8.1%}{row['calls']:>9}"
            lines.append(f"{name:<20}{counts}{row['ms_per_step']:>11.3f}")
        steps = f"{self.num_steps} steps"
        whole_ms = self.seconds / (self.num_steps or 1) * 1000
        lines.append(f"{'all':<20}{self.seconds:>10.3f}{1:>8.1%}{steps:>9}{whole_ms:>11.3f}")
        return "\n".join(lines)


@contextmanager
def profile(llm: LLM) -> Iterator[Profile]:
    """Time the parts of an engine until the context is left. A timed call costs about a microsecond
    more, several hundred of which make a step.

    Raises:
        EngineDeadError: the engine is closed.
        NanoVLLMError: its model runs in other processes.
    """
    engine = llm.engine
    executor, scheduler = engine.core.executor, engine.core.scheduler
    if not isinstance(executor, InlineExecutor) or executor.runner is None:
        raise NanoVLLMError("a profile needs the model in this process: use one device")
    runner, table = executor.runner, executor.runner.table
    on_gpu = runner.device.type == "cuda"
    spent = Profile(partial(synchronized, runner.device) if on_gpu else perf_counter)
    with ExitStack() as undo:
        for owner, name, part in (
            (runner, "submit", REST),
            (runner, "sample", SAMPLING),
            (table, "apply", INPUTS),
            (table, "prepare", INPUTS),
            (scheduler, "schedule", SCHEDULING),
            (scheduler, "update", SCHEDULING),
            (Text, "__init__", DETOKENIZING),  # the class's, as its objects are yet to be made
            (Text, "advance", DETOKENIZING),
            *((module, name, PRODUCTS) for module, name in products(runner.model)),
        ):
            put(undo, owner, name, spent.timed(part, getattr(owner, name)))
        put(undo, runner, "backend", timed_backend(runner.backend, spent))
        spent.enter(REST)
        try:
            yield spent
        finally:
            spent.leave()


def synchronized(device: torch.device) -> float:
    """The time when the GPU is done with what it was given."""
    torch.cuda.synchronize(device)
    return perf_counter()


def products(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, name of its method) of all that multiplies with weights."""
    for module in model.modules():
        if isinstance(module, Linear):
            yield module, "product" if module.product else "forward"
        elif any(weight.dim() == 3 for weight in module.parameters(recurse=False)):
            yield module, "forward"  # experts, stacked


def put(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute until `undo` is closed."""
    own = vars(owner).get(name, MISSING)
    setattr(owner, name, value)
    if own is MISSING:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, own)


def timed_backend(backend: Backend, spent: Profile) -> Any:
    """A backend whose plans, and what is done by them, are timed."""
    plan = spent.timed(INPUTS, backend.plan)

    def timed_plan(batch: AttentionBatch, caches: list[KVCache]) -> Any:
        ops = plan(batch, caches)
        timed = {name: spent.timed(part, getattr(ops, name)) for name, part in OPS.items()}
        return SimpleNamespace(**timed)

    return SimpleNamespace(plan=timed_plan, pack=backend.pack)
