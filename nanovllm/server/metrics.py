"""What the engine does and how long requests take, for Prometheus, under vLLM's names."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from nanovllm.core.engine import EngineCore
from nanovllm.core.sequence import Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Names, meanings and buckets are those of vLLM's v1/metrics (loggers.py, stats.py, buckets.py).
READINGS = {
    "num_requests_running": "Requests that are part of the engine's steps.",
    "num_requests_waiting": "Requests in the queue, new or preempted.",
    "kv_cache_usage_perc": "Share of the KV cache that requests hold, 0 to 1.",
    "num_preemptions_total": "Requests that lost their blocks to another and had to wait.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found in the prefix cache.",
    "prompt_tokens_total": "Prompt tokens of the requests begun, cached ones too.",
    "generation_tokens_total": "Tokens sampled.",
}
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
NEXT_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(m * 10**e) for e in range(9) for m in (1, 2, 5))  # up to the longest sequence
STEP = (1.0, *(2.0**i for i in range(3, 15)))
HISTOGRAMS = {
    "iteration_tokens_total": ("Tokens sampled in a step, and prompts it completed.", STEP),
    "time_to_first_token_seconds": ("From arrival to the first token.", FIRST_TOKEN),
    "inter_token_latency_seconds": ("From one token of a request to its next.", NEXT_TOKEN),
    "request_time_per_output_token_seconds": ("Mean of a request's tokens.", NEXT_TOKEN),
    "e2e_request_latency_seconds": ("From arrival to the end.", LATENCY),
    "request_queue_time_seconds": ("From arrival to the first step.", LATENCY),
    "request_prefill_time_seconds": ("From the first step to the first token.", LATENCY),
    "request_decode_time_seconds": ("From the first token to the last.", LATENCY),
    "request_inference_time_seconds": ("From the first step to the last token.", LATENCY),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_prefill_kv_computed_tokens": ("Tokens of a prompt, without cached ones.", TOKENS),
    "request_generation_tokens": ("Tokens sampled for a request.", TOKENS),
    "request_max_num_generation_tokens": ("Tokens of a request's longest sample.", TOKENS),
    "request_params_max_tokens": ("The parameter max_tokens, where given.", TOKENS),
    "request_params_n": ("The parameter n: samples of a request.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "request_num_preemptions": ("How often a request was preempted.", (1, 2, 3, 4, 5, 10, 20)),
}


class Histogram:
    """How many observations lie in each bucket, and their sum.

    Attributes:
        bounds: the upper end of each bucket, which is part of it; one more has no end.
        counts: observations by bucket.
    """

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds, self.sum = tuple(bounds), 0.0
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """Watches the engine's steps and says at any time what it saw.

    `stepped` and `aborted` are called by the thread that steps the engine, `render` by any. There
    is no lock: the containers that `render` goes through never change their size, and a number is
    replaced whole, so it may catch a step half counted but never a count that later shrinks.

    As in vLLM, each sample of a request counts as one (but for n and the longest sample), and a
    request that its client gave up is counted and not timed: it says nothing about the server.

    Args:
        model_name, engine: labels of every series; the second tells replicas of a model apart.
        core: the engine that is watched; times are on its clock.
    """

    def __init__(self, model_name: str, core: EngineCore, engine: str = "0") -> None:
        self.labels, self.core = {"model_name": model_name, "engine": engine}, core
        self.ended = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.histograms = {
            name: Histogram(b for b in bounds if bounds is not TOKENS or b <= core.max_num_tokens)
            for name, (_, bounds) in HISTOGRAMS.items()
        }
        self.last_token_s: dict[int, float] = {}  # by seq_id, of those with tokens to come
        self.samples: dict[int, tuple[int, int]] = {}  # of requests with samples to come, see below
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def stepped(self, sequences: list[Sequence]) -> None:
        """A step is over.

        Args:
            sequences: those that got a token in it, or ended; a step without any is not counted.
        """
        if not sequences:
            return
        num_tokens, previous, ended = 0, self.last_token_s, []
        observe_gap = self.histograms["inter_token_latency_seconds"].observe
        for seq in sequences:
            before_s, last_s = previous.get(seq.seq_id), seq.last_token_s
            # one that ended with an error may have got no token, first or next
            if last_s is not None and not (seq.finish_reason == "error" and last_s == before_s):
                num_tokens += 1
                if before_s is None:
                    num_tokens += seq.num_prompt_tokens - seq.num_cached_tokens
                    self._observe("time_to_first_token_seconds", last_s - seq.arrival_s)
                else:
                    observe_gap(last_s - before_s)
                previous[seq.seq_id] = last_s
            if seq.finish_reason is not None:
                previous.pop(seq.seq_id, None)
                ended.append(seq)
        self._observe("iteration_tokens_total", num_tokens)
        if ended:
            now_s = self.core.events.clock()
            for seq in ended:
                self._observe_end(seq, now_s)
            self._observe_requests(ended)

    def aborted(self, sequences: list[Sequence]) -> None:
        """These ended between steps: nobody wants them any more, or an error came up on their
        account. Each is named once."""
        for seq in sequences:
            assert seq.finish_reason is not None
            self.ended[seq.finish_reason] += 1
            self.last_token_s.pop(seq.seq_id, None)
            self.samples.pop(seq.seq_id - seq.index, None)

    def render(self) -> bytes:
        """All series as text, in CONTENT_TYPE."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        names, own = [*self.labels], [*self.labels.values()]
        values, blocks = self.core.get_metrics(), self.core.scheduler.blocks
        for name, what in READINGS.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            reading = family(f"vllm:{name}", what, labels=names)
            reading.add_metric(own, values[name])
            yield reading
        what = "Requests that ended, and why."
        success = CounterMetricFamily(
            "vllm:request_success", what, labels=[*names, "finished_reason"]
        )
        for reason, count in self.ended.items():
            success.add_metric([*own, reason], count)
        yield success
        for name, histogram in self.histograms.items():
            metric = HistogramMetricFamily(f"vllm:{name}", HISTOGRAMS[name][0], labels=names)
            ends = map(floatToGoString, (*histogram.bounds, float("inf")))
            buckets = list(zip(ends, accumulate(histogram.counts), strict=True))
            metric.add_metric(own, buckets, histogram.sum)
            yield metric
        settings = {
            "block_size": blocks.block_size,
            "num_gpu_blocks": blocks.num_blocks,
            "enable_prefix_caching": blocks.enable_prefix_caching,
        }
        what = "Settings of the KV cache, as labels."
        info = GaugeMetricFamily("vllm:cache_config_info", what, labels=[*names, *settings])
        info.add_metric([*own, *map(str, settings.values())], 1)
        yield info

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self.histograms[name].observe(value)

    def _observe_end(self, seq: Sequence, now_s: float) -> None:
        """An interval that never began or never ended, because of an error, is left out."""
        assert seq.finish_reason is not None
        self.ended[seq.finish_reason] += 1
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        first_s, last_s = seq.first_token_s, seq.last_token_s
        self._observe("e2e_request_latency_seconds", now_s - seq.arrival_s)
        self._observe("request_prompt_tokens", seq.num_prompt_tokens)
        self._observe("request_generation_tokens", num_generated)
        self._observe("request_params_max_tokens", seq.params.max_tokens)
        self._observe("request_num_preemptions", seq.num_preemptions)
        num_computed = seq.num_prompt_tokens - seq.num_cached_tokens
        self._observe("request_prefill_kv_computed_tokens", num_computed)
        if seq.scheduled_s is not None:
            self._observe("request_queue_time_seconds", seq.scheduled_s - seq.arrival_s)
            if first_s is not None and last_s is not None:
                decode_s = last_s - first_s
                self._observe("request_prefill_time_seconds", first_s - seq.scheduled_s)
                self._observe("request_inference_time_seconds", last_s - seq.scheduled_s)
                self._observe("request_decode_time_seconds", decode_s)
                mean_s = decode_s / max(num_generated - 1, 1)
                self._observe("request_time_per_output_token_seconds", mean_s)

    def _observe_requests(self, ended: list[Sequence]) -> None:
        """A sequence does not know how many samples its request has: they are counted as they
        end, with the most tokens of any, until none is left in the engine. A request is known by
        the seq_id of its first sample."""
        for seq in ended:
            count, longest = self.samples.get(seq.seq_id - seq.index, (0, 0))
            longest = max(longest, seq.num_tokens - seq.num_prompt_tokens)
            self.samples[seq.seq_id - seq.index] = count + 1, longest
        unfinished = {seq.seq_id - seq.index for seq in self.core.scheduler.running.values()}
        unfinished |= {seq.seq_id - seq.index for _, seq in self.core.scheduler.waiting}
        for first in self.samples.keys() - unfinished:
            count, longest = self.samples.pop(first)
            self._observe("request_params_n", count)
            self._observe("request_max_num_generation_tokens", longest)
