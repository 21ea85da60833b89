"""Sarathi: decode first, and only so much of the prompts that decodes hardly wait."""

from nanovllm.core.policy import Decision, Policy, StepView


class Sarathi(Policy):
    """Decodes first; prompts in chunks that fill a step up to `chunk_budget` tokens (Agrawal et
    al., OSDI 2024). A smaller budget makes steps shorter, and prompts take more of them.

    A subclass may say another one: "module:Class" wants one without arguments.
    """

    def __init__(self, chunk_budget: int = 512) -> None:
        self.chunk_budget = chunk_budget

    def share_budget(self, step: StepView) -> Decision[tuple[int, int]]:
        rest = max(0, self.chunk_budget - step.num_decodes)
        return Decision((step.token_budget, rest), f"{self.chunk_budget} tokens a step")
