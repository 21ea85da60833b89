"""Every exception that Nano-vLLM raises on purpose. Each message names the field or file, the
value found there, and what to do about it.

    NanoVLLMError
    ├── ConfigError             an engine setting is unknown or impossible      (a ValueError)
    ├── InvalidRequestError     a prompt or sampling parameter is impossible    (a ValueError)
    ├── ModelLoadError          a model's files are missing, damaged or of an unknown kind
    ├── MissingDependencyError  an optional package is needed; names the extra  (an ImportError)
    ├── QueueFullError          so many requests wait already that no more are taken in
    ├── RequestFailedError      one request ended with an error; the others went on
    ├── PolicyError             a scheduling policy breaks a rule (nanovllm.testing.check_policy)
    ├── TemplateError           a chat template takes too long or too much memory
    └── EngineDeadError         the engine was closed or its workers are gone
"""

from collections.abc import Sequence


class NanoVLLMError(Exception):
    """Base of the tree: catch this to catch everything the engine raises on purpose."""


class FieldError(NanoVLLMError, ValueError):
    """A field holds a value that cannot be used.

    Attributes:
        field: name of the argument.
        value: what was given.
        remedy: what is wrong with it, or what to give instead.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        try:
            shown = repr(value)
        except RecursionError:
            shown = "(nested without end)"
        super().__init__(f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


class ConfigError(FieldError):
    """An engine setting is unknown or impossible."""


class InvalidRequestError(FieldError):
    """A prompt or a sampling parameter is impossible; nothing was queued."""


class ModelLoadError(NanoVLLMError):
    """A model's files are missing, damaged or of an unknown kind."""


class MissingDependencyError(NanoVLLMError, ImportError):
    """An optional package is needed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'nano-vllm[{extra}]'")


class QueueFullError(NanoVLLMError):
    """So many requests wait already that no more are taken in: try again later."""


class RequestFailedError(NanoVLLMError):
    """One request ended with an error; the others went on."""


class PolicyError(NanoVLLMError):
    """A scheduling policy breaks a rule that holds for all.

    Attributes:
        rule: "progress", "starvation", "preemptions", "conservation", "determinism", "purity" or
            "contract".
        why: how, in words.
        trace: the shortest story found that shows it, a line each.
    """

    def __init__(self, policy: str, rule: str, why: str, trace: Sequence[str] = ()) -> None:
        super().__init__("\n    ".join((f"{policy} breaks {rule}: {why}", *trace)))
        self.rule, self.why, self.trace = rule, why, tuple(trace)


class TemplateError(NanoVLLMError):
    """A chat template takes too long or too much memory: mend the template."""


class EngineDeadError(NanoVLLMError):
    """The engine was closed or its workers are gone: make a new one."""
