"""To try a policy without a model: `check_policy`, and the trial that it is built on.

Standard library and core only.
"""

from nanovllm.testing.check import Report, check_policy
from nanovllm.testing.trial import Arrival, FakeExecutor, Setting, Trial

__all__ = ["Arrival", "FakeExecutor", "Report", "Setting", "Trial", "check_policy"]
