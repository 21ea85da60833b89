"""A policy under watch: what it is shown, what it does with that, and what it gives back."""

import gc
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any

from nanovllm.core.policy import Decision, Policy, StepView
from nanovllm.core.views import SequenceView
from nanovllm.errors import PolicyError

SHOWN = frozenset(name for name in vars(SequenceView) if not name.startswith("_"))
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time", "sleep"}


class View:
    """A sequence of which only what a SequenceView has can be read, and nothing be written."""

    __slots__ = ("blame", "seq")

    def __init__(self, seq: SequenceView, blame: Callable[[str, str], None]) -> None:
        object.__setattr__(self, "seq", seq)
        object.__setattr__(self, "blame", blame)

    def __getattribute__(self, name: str) -> Any:
        get = object.__getattribute__
        if name in SHOWN:
            return getattr(get(self, "seq"), name)
        if not name.startswith("__"):
            what = f"reads seq.{name}; policies are shown what SequenceView has"
            get(self, "blame")("purity", what)
        return get(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        object.__getattribute__(self, "blame")("purity", f"writes seq.{name}; views are read-only")


class Watched(Policy):
    """Passes each hook on to a policy, and holds it to what hooks may do.

    Raises:
        PolicyError: from any hook; the rule is "purity" or "contract".
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name = policy, type(policy).__name__
        self.keys_change, self.wants_matches = policy.keys_change, policy.wants_matches
        self.views: dict[int, View] = {}
        self.sequences: dict[int, SequenceView] = {}
        self.hook, self.blamed = "", ("", "")

    def key(self, seq: SequenceView, now_s: float) -> tuple[float, ...]:
        key = self.ask("key", self.show(seq), now_s)
        if not (isinstance(key, tuple) and all(isinstance(x, int | float) and x == x for x in key)):
            self.fail("contract", f"returned {key!r}; a tuple of numbers is wanted")
        return key  # type: ignore[no-any-return]

    def admit(self, seq: SequenceView, num_blocks: int, step: StepView) -> Decision[bool]:
        return self.decision("admit", self.show(seq), num_blocks, step)

    def share_budget(self, step: StepView) -> Decision[tuple[int, int]]:
        decision: Decision[Any] = self.decision("share_budget", step)
        shares = decision.value
        pair = isinstance(shares, tuple) and len(shares) == 2
        if not (pair and all(isinstance(share, int) and share >= 0 for share in shares)):
            self.fail("contract", f"returned {shares!r}; two numbers of tokens are wanted")
        return decision

    def victim(
        self, running: Sequence[SequenceView], needy: SequenceView
    ) -> Decision[SequenceView | None]:
        shown = [self.show(seq) for seq in running]
        victim, why = self.decision("victim", list(shown), self.show(needy))
        for view, seq in zip(shown, running, strict=True):
            if view is victim:
                return Decision(seq, why)
        if victim is not None:
            self.fail("contract", "returned somebody who is not among `running`")
        return Decision(None, why)

    def evict(self, idle: Mapping[int, object]) -> int:
        block_id: int = self.ask("evict", MappingProxyType(dict.fromkeys(idle)))
        if block_id not in idle:
            self.fail("contract", f"returned {block_id!r}, which is not among `idle`")
        return block_id

    def added(self, seq: SequenceView) -> None:
        self.ask("added", self.show(seq))

    def served(self, rows: Iterable[tuple[SequenceView, int]]) -> None:
        self.ask("served", [(self.show(seq), num_tokens) for seq, num_tokens in rows])

    def finished(self, seq: SequenceView) -> None:
        self.ask("finished", self.show(seq))

    # Watching

    def show(self, seq: SequenceView) -> Any:
        return self.views.setdefault(seq.seq_id, View(seq, self.blame))

    def decision(self, hook: str, *args: object) -> Decision[Any]:
        found = self.ask(hook, *args)
        if not (isinstance(found, Decision) and isinstance(found.reason, str) and found.reason):
            self.fail("contract", f"returned {found!r}; a Decision with a reason is wanted")
        return found  # type: ignore[no-any-return]

    def ask(self, hook: str, *args: object) -> Any:
        self.hook, before, collecting = hook, sys.getprofile(), gc.isenabled()
        failure = None
        gc.disable()  # callbacks of a collection are not the policy's calls
        sys.setprofile(self.witness)
        try:
            answer = getattr(self.policy, hook)(*args)
        except Exception as error:
            failure = f"raised {type(error).__name__}: {error}"
        finally:
            sys.setprofile(before)
            if collecting:
                gc.enable()
        if self.blamed[0]:
            self.fail(*self.blamed)
        if failure:
            self.fail("contract", failure)
        return answer

    def witness(self, frame: FrameType, event: str, called: Any) -> None:
        """Sees each call of a built-in function while a hook runs."""
        if event != "c_call":
            return
        module, name = getattr(called, "__module__", None), called.__name__
        owner = getattr(called, "__self__", None)
        if module == "time" and name.removesuffix("_ns") in CLOCKS:
            self.blame("purity", f"calls time.{name}(); the engine's clock is in now_s")
        elif name in ("now", "utcnow", "today") and isinstance(owner, type):
            self.blame("purity", f"calls {owner.__name__}.{name}(); the engine's clock is in now_s")
        elif owner is getattr(random, "_inst", self) or name == "urandom":
            self.blame("purity", "draws from global randomness; keep a seeded random.Random")

    def blame(self, rule: str, what: str) -> None:
        self.blamed = self.blamed if self.blamed[0] else (rule, what)

    def fail(self, rule: str, what: str) -> None:
        raise PolicyError(self.name, rule, f"{self.hook} {what}")
