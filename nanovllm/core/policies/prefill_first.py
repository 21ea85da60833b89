"""Prefill first: as the original nano-vLLM does it."""

from nanovllm.core.policy import Decision, Policy, StepView


class PrefillFirst(Policy):
    """While a prompt can be computed, no sequence decodes: the first token comes early, and
    those that stream already stall."""

    def share_budget(self, step: StepView) -> Decision[tuple[int, int]]:
        if step.num_waiting or step.num_prefills:
            return Decision((0, step.token_budget), "prefills first")
        return Decision((step.token_budget, 0), "no prefills")
