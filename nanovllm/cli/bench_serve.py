"""`nanovllm bench serve`: how a server that speaks OpenAI's API does under a load. Flags, defaults,
what is printed and the keys of the result file are vLLM's."""

import asyncio
import json
import os
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from nanovllm.checks import HUGE, check_fields, one_of, ranged
from nanovllm.cli.bench import MANY, check_writable, draw_length
from nanovllm.cli.bench_metrics import LIMITS, METRICS, Record, details, spread_of, summary, table
from nanovllm.cli.flags import Parser, add_flags, field_texts, flag, given
from nanovllm.client import Client
from nanovllm.errors import ConfigError, MissingDependencyError, RequestFailedError
from nanovllm.traces import TraceRequest, read_trace

if TYPE_CHECKING:
    from nanovllm.cli.bench_requests import Request

PATHS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty",
)  # fmt: skip
PAIRS = {"goodput": "NAME:MS", "header": "KEY=VALUE", "metadata": "KEY=VALUE"}  # to be repeated
SHOWN_ERRORS = 10
FIRST_ID, VOCAB_SIZE = 1000, 32_000  # below the one lie the special tokens of some models
COMMON_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """Settings of `nanovllm bench serve`.

    Args:
        backend: openai and vllm post token ids to /v1/completions, openai-chat posts common words
            to /v1/chat/completions, of which most are one token.
        base_url: of the server, instead of host and port.
        host, port: where the server listens.
        endpoint: path to post to, if it is not the backend's own.
        model: asked for, and named in the results; the server's first if not given.
        served_model_name: asked for instead of it.
        header: sent with each request; OPENAI_API_KEY of the environment is, if it is there.
        dataset_name: random draws lengths and arrivals, trace replays those of a file. No request
            shares tokens with another but as they say.
        dataset_path: the trace: JSON lines of arrival_s, prompt_tokens, output_tokens (and
            prefix_id, prefix_tokens, priority, tenant, ttft_target_ms, tpot_target_ms), JSON lines
            of Mooncake, or a CSV of Azure.
        trace_speed: how much faster than recorded a trace is replayed.
        num_prompts: requests; of a trace, the first ones.
        vocab_size: token ids are drawn below it (and not below 1000, if there are twice as many):
            lower it for a model of a smaller vocabulary.
        random_input_len: tokens of a prompt, after its prefix. random_output_len: tokens
            generated for it.
        random_range_ratio: lengths are drawn from (1 - this) to (1 + this) times those two.
        random_prefix_len: tokens that all prompts start with.
        request_rate: requests per second on average; inf sends all at once.
        burstiness: shape of the gamma distribution of the times between requests: 1 is a Poisson
            process, less is burstier, inf is a steady beat. They are scaled so that the last
            request comes at num_prompts / request_rate.
        max_concurrency: requests that run at once; others wait in the client.
        num_warmups: requests sent before, and not counted.
        ready_check_timeout_sec: wait for so long until a first request succeeds; 0 does not.
        ignore_eos: answers are as long as asked for; a shorter one has failed.
        logprobs: report so many log probabilities per token.
        temperature, top_p, top_k, min_p: of sampling; the server's default if not given.
        frequency_penalty, presence_penalty, repetition_penalty: of sampling, likewise.
        seed: of lengths, tokens and arrivals; arrivals are those of vLLM with the same seed.
        percentile_metrics: what is reported: of ttft, tpot, itl, e2el, client_queue_time,
            e2el_including_client_queue, with commas.
        metric_percentiles: which percentiles of them, with commas.
        goodput: a request is good if it took at most these; of ttft, tpot, e2el.
        label: name of the results; the backend if not given.
        request_id_prefix: of the header x-request-id.
        save_result: write the results to a JSON file. append_result: add them to it as a line.
        save_detailed: with the lengths, times, text and error of each request.
        result_dir: folder of the file; made if it is not there.
        result_filename: its name, if not made of label, rate, model and date.
        metadata: more keys for it.
        disable_tqdm: no progress bar.

    Raises:
        ConfigError: a value is impossible.
    """

    backend: str = one_of("openai", "openai-chat", "vllm")
    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = ranged(8000, 1, 65_535)
    endpoint: str | None = None
    model: str | None = None
    served_model_name: str | None = None
    header: Sequence[str] = ()
    dataset_name: str = one_of("random", "trace")
    dataset_path: str | None = None
    trace_speed: float = ranged(1.0, 1e-6, 1e6)
    num_prompts: int = ranged(1000, 1, MANY)
    vocab_size: int = ranged(VOCAB_SIZE, 2, MANY)
    random_input_len: int = ranged(1024, 1, MANY)
    random_output_len: int = ranged(128, 1, MANY)
    random_range_ratio: float = ranged(0.0, 0.0, 0.999)
    random_prefix_len: int = ranged(0, 0, MANY)
    request_rate: float = ranged(inf, 1e-6, inf)
    burstiness: float = ranged(1.0, 1e-6, inf)
    max_concurrency: int | None = ranged(None, 1, MANY)
    num_warmups: int = ranged(0, 0, MANY)
    ready_check_timeout_sec: int = ranged(0, 0, MANY)
    ignore_eos: bool = True
    logprobs: int | None = ranged(None, 0, MANY)
    temperature: float | None = ranged(None, 0.0, HUGE)
    top_p: float | None = ranged(None, 0.0, 1.0)
    top_k: int | None = ranged(None, -1, 2**62)
    min_p: float | None = ranged(None, 0.0, 1.0)
    frequency_penalty: float | None = ranged(None, -2.0, 2.0)
    presence_penalty: float | None = ranged(None, -2.0, 2.0)
    repetition_penalty: float | None = ranged(None, 0.0, HUGE)
    seed: int = ranged(0, 0, 2**32 - 1)
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    goodput: Sequence[str] = ()
    label: str | None = None
    request_id_prefix: str | None = None
    save_result: bool = False
    append_result: bool = False
    save_detailed: bool = False
    result_dir: str | None = None
    result_filename: str | None = None
    metadata: Sequence[str] = ()
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if (self.dataset_name == "trace") != (self.dataset_path is not None):
            why = "names the file of --dataset-name trace, and is needed for it alone"
            raise ConfigError("dataset_path", self.dataset_path, why)
        if self.dataset_name == "trace" and self.request_rate != inf:
            why = "a trace says itself when requests come; --trace-speed scales it"
            raise ConfigError("request_rate", self.request_rate, why)
        for name in self.metrics:
            if name not in METRICS:
                why = f"can be {', '.join(METRICS)}"
                raise ConfigError("percentile_metrics", name, why)
        for name in self.goodput_ms:
            if name not in LIMITS:
                raise ConfigError("goodput", name, f"can be {', '.join(LIMITS)}")
        _ = self.percentages, self.headers, self.more  # each raises if it cannot be read

    @property
    def metrics(self) -> list[str]:
        return self.percentile_metrics.split(",")

    @property
    def percentages(self) -> list[float]:
        found = [number(word, "metric_percentiles") for word in self.metric_percentiles.split(",")]
        for percentage in found:
            if not 0 <= percentage <= 100:
                raise ConfigError("metric_percentiles", percentage, "must be from 0 to 100")
        return found

    @property
    def goodput_ms(self) -> dict[str, float]:
        limits = pairs(self.goodput, "goodput")
        return {name: number(word, "goodput") for name, word in limits.items()}

    @property
    def headers(self) -> dict[str, str]:
        return pairs(self.header, "header")

    @property
    def more(self) -> dict[str, str]:
        return pairs(self.metadata, "metadata")


def run(argv: list[str]) -> None:
    bench = parse(argv)
    try:
        from nanovllm.cli.bench_requests import Target, measure
    except ImportError as error:
        raise MissingDependencyError("aiohttp", "bench", "`nanovllm bench serve`") from error

    client = Client(bench.base_url or f"http://{bench.host}:{bench.port}", None, bench.headers)
    planned = plan(bench)
    model = bench.model or find_model(client, bench.ready_check_timeout_sec)
    date = time.strftime("%Y%m%d-%H%M%S")
    file = result_file(bench, model, date)
    target = Target(
        url=client.url + (bench.endpoint or PATHS[bench.backend]),
        headers=client.headers,
        max_concurrency=bench.max_concurrency,
        keep_events=bench.save_detailed,
    )
    alike = TraceRequest(0.0, planned[0].num_prompt_tokens, planned[0].num_output_tokens)
    ready, *warmups = build(bench, model, [alike] * (1 + bench.num_warmups), "warmup-")
    records, duration_s = asyncio.run(
        measure(
            target,
            build(bench, model, planned, ""),
            ready=ready,
            ready_timeout_s=bench.ready_check_timeout_sec,
            warmups=warmups,
            quiet=bench.disable_tqdm or not sys.stderr.isatty(),
        )
    )
    errors = [record.error for record in records if record.error]
    if len(errors) == len(records):
        raise RequestFailedError(f"all {len(records)} requests failed; the first: {errors[0]}")
    for message in errors[:SHOWN_ERRORS]:
        print(f"a request failed: {message}", file=sys.stderr)
    result = result_of(bench, model, date, records, duration_s)
    print(table(result, bench.metrics))
    if file is not None:
        more = details(records) if bench.save_detailed else {}
        with open(file, "a" if bench.append_result else "w") as out:
            out.write(json.dumps(result | more) + "\n")


def result_of(
    bench: ServeBench, model: str, date: str, records: Sequence[Record], duration_s: float
) -> dict[str, Any]:
    result = {
        "date": date,
        "endpoint_type": bench.backend,
        "backend": bench.backend,
        "label": bench.label,
        "model_id": model,
        "tokenizer_id": None,
        "num_prompts": len(records),
        **bench.more,
        "request_rate": bench.request_rate if bench.request_rate < inf else "inf",
        "burstiness": bench.burstiness,
        "max_concurrency": bench.max_concurrency,
        **summary(records, duration_s, bench.goodput_ms),
    }
    for name in bench.metrics:
        result |= spread_of(name, records, bench.percentages)
    return result


def find_model(client: Client, timeout_s: float) -> str:
    """The server's first model, once there is a server."""
    end_s = time.perf_counter() + timeout_s
    while True:
        try:
            return client.first_model()
        except RequestFailedError:
            if time.perf_counter() >= end_s:
                raise
            time.sleep(0.25)


def parse(argv: list[str]) -> ServeBench:
    parser = Parser(
        prog="nanovllm bench serve",
        usage="nanovllm bench serve [flags]",
        description="Send requests to a server that speaks OpenAI's API, and time the answers.",
    )
    add_flags(parser, ServeBench, skip=list(PAIRS))
    texts = field_texts(ServeBench)
    for name, form in PAIRS.items():
        dest = f"ServeBench.{name}"
        options: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
        parser.add_argument(flag(name), dest=dest, metavar=form, help=texts[name], **options)
    return ServeBench(**given(parser.parse_args(argv), ServeBench))


def plan(bench: ServeBench) -> list[TraceRequest]:
    """When requests come and how long they are, by time of arrival."""
    if bench.dataset_path is not None:
        trace = read_trace(bench.dataset_path, bench.num_prompts)
        return [replace(one, arrival_s=one.arrival_s / bench.trace_speed) for one in trace]
    count, prefix_len = bench.num_prompts, bench.random_prefix_len
    rng, ratio = Random(bench.seed), bench.random_range_ratio
    inputs = [draw_length(rng, bench.random_input_len, ratio) for _ in range(count)]
    outputs = [draw_length(rng, bench.random_output_len, ratio) for _ in range(count)]
    times_s = arrival_times(count, bench.request_rate, bench.burstiness, bench.seed)
    shared = (("prefix", prefix_len),) if prefix_len else ()
    return [
        TraceRequest(time_s, prefix_len + num_input, num_output, shared)
        for time_s, num_input, num_output in zip(times_s, inputs, outputs, strict=True)
    ]


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which requests come: sums of gamma-distributed gaps, scaled so that the last is
    count / rate. The same as vLLM's for the same seed."""
    if rate == inf:
        return [0.0] * count
    if burstiness == inf:
        gaps_s = np.full(count, 1 / rate)
    else:
        gaps_s = np.random.RandomState(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    times_s = np.cumsum(gaps_s)
    return [float(time_s) for time_s in times_s * (count / rate / times_s[-1])]


def build(
    bench: ServeBench, model: str, planned: Sequence[TraceRequest], kind: str
) -> "list[Request]":
    """Requests as they are sent. Equal settings make equal ones.

    Args:
        kind: sets their tokens and ids apart from those of others.
    """
    from nanovllm.cli.bench_requests import Request

    prefix = bench.request_id_prefix
    prefix = f"bench-{uuid4().hex[:8]}-" if prefix is None else prefix
    common: dict[str, Any] = {
        "model": bench.served_model_name or model,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name in SAMPLING if (value := getattr(bench, name)) is not None},
    }
    if bench.ignore_eos:
        common["ignore_eos"] = True
    return [
        Request(
            arrival_s=request.arrival_s,
            body=json.dumps(common | fields_of(bench, request, f"{kind}{index}")).encode(),
            request_id=f"{prefix}{kind}{index}",
            num_input=request.num_prompt_tokens,
            min_output=request.num_output_tokens if bench.ignore_eos else 0,
        )
        for index, request in enumerate(planned)
    ]


def fields_of(bench: ServeBench, request: TraceRequest, name: str) -> dict[str, Any]:
    """What the body of one request says that others do not, as its backend has it."""
    own = request.num_prompt_tokens - sum(size for _, size in request.pieces)
    pieces = [(f"shared {piece}", size) for piece, size in request.pieces]
    token_ids = [
        token_id
        for piece, size in [*pieces, (f"own {name}", own)]
        for token_id in draw_ids(f"{bench.seed} {piece}", size, bench.vocab_size)
    ]
    fields: dict[str, Any] = {} if request.priority is None else {"priority": request.priority}
    if request.tenant:
        fields["user"] = request.tenant
    for name in ("ttft", "tpot"):
        if (target_s := getattr(request, f"{name}_target_s")) is not None:
            fields[f"{name}_target_ms"] = 1000 * target_s
    if bench.backend == "openai-chat":
        words = COMMON_WORDS.split()
        content = " ".join(words[token_id % len(words)] for token_id in token_ids)
        fields["messages"] = [{"role": "user", "content": content}]
        fields["max_completion_tokens"] = request.num_output_tokens
        if bench.logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": bench.logprobs}
        return fields
    fields |= {"prompt": token_ids, "max_tokens": request.num_output_tokens}
    return fields if bench.logprobs is None else fields | {"logprobs": bench.logprobs}


def draw_ids(key: str, count: int, vocab_size: int) -> list[int]:
    """Token ids that depend on the key alone; fewer are the first of more."""
    low = FIRST_ID if vocab_size >= 2 * FIRST_ID else 0
    words = array("I", Random(key).randbytes(4 * count))
    return [low + word % (vocab_size - low) for word in words]


def result_file(bench: ServeBench, model: str, date: str) -> str | None:
    """Where the results go; None if nowhere.

    Raises:
        ConfigError: nothing could be written there.
    """
    if not (bench.save_result or bench.append_result):
        return None
    limit = "" if bench.max_concurrency is None else f"-concurrency{bench.max_concurrency}"
    label = bench.label or bench.backend
    name = f"{label}-{bench.request_rate}qps{limit}-{model.rpartition('/')[2]}-{date}.json"
    path = os.path.join(bench.result_dir or "", bench.result_filename or name)
    if bench.result_dir:
        os.makedirs(bench.result_dir, exist_ok=True)
    check_writable("result_filename", path)
    return path


def pairs(words: Sequence[str], name: str) -> dict[str, str]:
    """Words of the form that PAIRS says, as a dictionary.

    Raises:
        ConfigError: a word has another form.
    """
    mark = ":" if ":" in PAIRS[name] else "="
    for word in words:
        if mark not in word:
            raise ConfigError(name, word, f"must be {PAIRS[name]}")
    return dict(word.split(mark, 1) for word in words)


def number(word: str, name: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(name, word, "must be a number") from None
