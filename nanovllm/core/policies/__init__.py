"""The built-in policies, one file per idea, and how a policy is found by its name."""

import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

from nanovllm.core.policy import Policy
from nanovllm.errors import ConfigError

# name -> module:class; each is imported when it is asked for
POLICIES: Mapping[str, str] = {
    "fcfs": "nanovllm.core.policy:Policy",
    "priority": "nanovllm.core.policies.priority:Priority",
    "sjf": "nanovllm.core.policies.sjf:ShortestJobFirst",
    "lpm": "nanovllm.core.policies.lpm:LongestPrefixMatch",
    "edf": "nanovllm.core.policies.edf:EarliestDeadline",
    "fair": "nanovllm.core.policies.fair:FairShare",
    "prefill-first": "nanovllm.core.policies.prefill_first:PrefillFirst",
    "sarathi": "nanovllm.core.policies.sarathi:Sarathi",
}


def load_policy(name: str) -> Policy:
    """A new policy: a built-in one by its name, or "module:Class" of one's own.

    Modules in the working directory are found too.

    Raises:
        ConfigError: there is no such policy, module or class, or it cannot be made.
    """

    def refusal(why: str) -> ConfigError:
        return ConfigError("scheduling_policy", name, why)

    path = POLICIES.get(name, name) if isinstance(name, str) else str(name)
    module_name, colon, class_name = path.partition(":")
    if not (colon and module_name and class_name):
        near = get_close_matches(path, POLICIES, 1, 0)[0]
        choices = ", ".join(POLICIES)
        raise refusal(f"can be {choices}, or module:Class; the nearest is {near}")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module_name), class_name, None)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "?"):
            raise refusal(f"there is no module {error.name} here or installed") from error
        why = f"{type(error).__name__}: {error}"
        raise refusal(f"importing {module_name} failed: {why}") from error
    finally:
        sys.path.remove(os.getcwd())
    if found is None:
        raise refusal(f"module {module_name} has no {class_name}")
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise refusal(f"{class_name} is not a subclass of nanovllm.core.policy.Policy")
    try:
        return found()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise refusal(f"{class_name}() must work without arguments: {why}") from error
