"""The engine in numbers, under vLLM's names."""

from nanovllm.core.events import Kind
from nanovllm.core.scheduler import Scheduler


def metrics(scheduler: Scheduler) -> dict[str, float]:
    """Counters (names in _total) since the start, and gauges of this moment.

    kv_cache_usage_perc is a share from 0 to 1; queries and hits of the prefix cache are tokens;
    requests are counted by their samples.
    """
    counts, caching = scheduler.events.counts, scheduler.blocks.enable_prefix_caching
    return {
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": len(scheduler.waiting),
        "kv_cache_usage_perc": scheduler.blocks.usage,
        "num_preemptions_total": counts[Kind.PREEMPTED],
        "prefix_cache_queries_total": counts["prompt_tokens"] if caching else 0,
        "prefix_cache_hits_total": counts["prefix_cache_hits"],
        "prompt_tokens_total": counts["prompt_tokens"],
        "generation_tokens_total": counts["generation_tokens"],
        "request_success_total": counts["success"],
    }
