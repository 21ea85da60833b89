"""`nanovllm bench`: how fast the engine is here. Flags, JSON keys and the line that `throughput`
prints have vLLM's names; the defaults are smaller, so that a CPU is done in a minute or two."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil, floor
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.checks import check_fields, ranged
from nanovllm.cli.flags import Parser, add_flags, flag, given
from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError, NanoVLLMError, RequestFailedError
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM
    from nanovllm.outputs import RequestOutput

PERCENTAGES = (10, 25, 50, 75, 90, 99)
MANY = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all benchmarks share.

    Args:
        output_json: the file to write results to.

    Raises:
        ConfigError: a value is impossible.
    """

    output_json: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        check_writable("output_json", self.output_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput(Settings):
    """Settings of `throughput`.

    Args:
        num_prompts: requests, all there from the start.
        input_len: tokens of a prompt. output_len: tokens generated for it.
        random_range_ratio: lengths are drawn from (1 - this) to (1 + this) times --input-len and
            --output-len.
        disable_detokenize: make no text.
        profile: show where the time of a step goes; the timing itself costs a few percent.
        output_json: the file to write results to.
    """

    num_prompts: int = ranged(64, 1, MANY)
    input_len: int = ranged(128, 1, MANY)
    output_len: int = ranged(128, 1, MANY)
    random_range_ratio: float = ranged(0.0, 0.0, 0.999)
    disable_detokenize: bool = False
    profile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency(Settings):
    """Settings of `latency`.

    Args:
        input_len: tokens of a prompt. output_len: tokens generated for it.
        batch_size: prompts that run at once.
        num_iters_warmup, num_iters: batches that are not timed, then batches that are.
        disable_detokenize: make no text.
        output_json: the file to write results to.
    """

    input_len: int = ranged(32, 1, MANY)
    output_len: int = ranged(128, 1, MANY)
    batch_size: int = ranged(8, 1, MANY)
    num_iters_warmup: int = ranged(2, 0, MANY)
    num_iters: int = ranged(10, 1, MANY)
    disable_detokenize: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup(Settings):
    """Settings of `startup`.

    Args:
        num_iters_cold: starts that find no compiled kernels.
        num_iters_warmup, num_iters_warm: starts that are not timed, then starts that are.
        output_json: the file to write results to.
    """

    num_iters_cold: int = ranged(1, 0, MANY)
    num_iters_warmup: int = ranged(1, 0, MANY)
    num_iters_warm: int = ranged(3, 1, MANY)


S = TypeVar("S", bound=Settings)


def run(argv: list[str]) -> int:
    listing = "".join(f"\n  {name:<12}{text}" for name, (_, text) in KINDS.items())
    parser = Parser(
        prog="nanovllm bench",
        description="Measure the engine on this machine, or a server.",
        epilog=f"kinds:{listing}\n\n`nanovllm bench KIND --help` shows the flags of a kind.",
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help="one of those below")
    bench, _ = KINDS[parser.parse_args(argv[:1]).kind]
    bench(argv[1:])
    return 0


def throughput(argv: list[str]) -> None:
    engine, bench = parse("throughput", Throughput, argv, enable_prefix_caching=False)
    rng = Random(engine.get("seed", 0))
    ratio, count = bench.random_range_ratio, range(bench.num_prompts)
    inputs = [draw_length(rng, bench.input_len, ratio) for _ in count]
    outputs = [draw_length(rng, bench.output_len, ratio) for _ in count]

    from nanovllm.llm import LLM
    from nanovllm.profile import profile

    with LLM(**engine) as llm:
        check_fit(llm, max(inputs), max(outputs))
        params = [sampling(length, bench.disable_detokenize) for length in outputs]
        complete(llm, [random_ids(rng, llm, 16)] * 2, [sampling(2, False)] * 2)  # warms up
        prompts = [random_ids(rng, llm, length) for length in inputs]
        with profile(llm) if bench.profile else nullcontext() as parts:
            start_s = time.perf_counter()
            finished = complete(llm, prompts, params, use_tqdm=sys.stderr.isatty())
            elapsed_s = time.perf_counter() - start_s
    num_input = sum(len(output.prompt_token_ids) for output in finished)
    num_output = sum(len(sample.token_ids) for output in finished for sample in output.outputs)
    total = num_input + num_output
    print(
        f"Throughput: {len(finished) / elapsed_s:.2f} requests/s, "
        f"{total / elapsed_s:.2f} total tokens/s, {num_output / elapsed_s:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {num_input}\nTotal num output tokens:  {num_output}"
    )
    result: dict[str, Any] = {
        "elapsed_time": elapsed_s,
        "num_requests": len(finished),
        "total_num_tokens": total,
        "requests_per_second": len(finished) / elapsed_s,
        "tokens_per_second": total / elapsed_s,
    }
    if parts:
        print("\n" + parts.table())
        result["profile"] = {"num_steps": parts.num_steps, "parts": parts.rows()}
    write(bench.output_json, result)


def latency(argv: list[str]) -> None:
    engine, bench = parse("latency", Latency, argv, enable_prefix_caching=False)
    rng = Random(engine.get("seed", 0))

    from nanovllm.llm import LLM

    latencies_s = []
    with LLM(**engine) as llm:
        check_fit(llm, bench.input_len, bench.output_len)
        prompts = [random_ids(rng, llm, bench.input_len) for _ in range(bench.batch_size)]
        params = [sampling(bench.output_len, bench.disable_detokenize)] * bench.batch_size
        for _ in range(bench.num_iters_warmup + bench.num_iters):
            start_s = time.perf_counter()
            complete(llm, prompts, params)
            latencies_s.append(time.perf_counter() - start_s)
    latencies_s = latencies_s[bench.num_iters_warmup :]
    result = {
        "avg_latency": statistics.fmean(latencies_s),
        "std_latency": statistics.pstdev(latencies_s),
        "latencies": latencies_s,
        "percentiles": percentiles(latencies_s),
    }
    print(f"Avg latency: {result['avg_latency']:.4f} seconds")
    print(f"Std latency: {result['std_latency']:.4f} seconds")
    for percentage, latency_s in percentiles(latencies_s).items():
        print(f"{percentage}% percentile latency: {latency_s:.4f} seconds")
    write(bench.output_json, result)


def startup(argv: list[str]) -> None:
    skip = ["skip_tokenizer_init"]  # a prompt of words is what people start with
    engine, bench = parse("startup", Startup, argv, skip=skip)
    words = [word for name, value in engine.items() for word in as_flag(name, value)]
    result: dict[str, Any] = {}
    cold_s = []
    for _ in range(bench.num_iters_cold):
        with TemporaryDirectory() as folder:
            empty = {"NANOVLLM_KERNEL_CACHE": folder, "NUMBA_CACHE_DIR": folder}
            cold_s.append(first_token_s(words, empty))
    for _ in range(bench.num_iters_warmup):
        first_token_s(words, {})
    warm_s = [first_token_s(words, {}) for _ in range(bench.num_iters_warm)]
    for phase, times_s in {"cold": cold_s, "warm": warm_s}.items():
        if times_s:
            result[f"avg_{phase}_startup_time"] = statistics.fmean(times_s)
            result[f"{phase}_startup_times"] = times_s
            result[f"{phase}_startup_percentiles"] = percentiles(times_s)
            least, most = min(times_s), max(times_s)
            print(
                f"Avg {phase} startup time: {statistics.fmean(times_s):.2f} seconds from command "
                f"to first token ({least:.2f} to {most:.2f})"
            )
    write(bench.output_json, result)


def serve(argv: list[str]) -> None:
    from nanovllm.cli import bench_serve

    bench_serve.run(argv)


KINDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "throughput": (throughput, "many requests at once: tokens and requests per second"),
    "latency": (latency, "one batch, again and again: seconds until it is done"),
    "startup": (startup, "seconds from command to first token, in new processes"),
    "serve": (serve, "requests to a server, as they would come: latency, throughput, goodput"),
}


def parse(
    name: str, kind: type[S], argv: list[str], *, skip: Sequence[str] = (), **defaults: Any
) -> tuple[dict[str, Any], S]:
    """The settings of the engine that were given, and those of a benchmark, both checked."""
    parser = Parser(
        prog=f"nanovllm bench {name}",
        usage=f"nanovllm bench {name} [flags]",
        description=f"{KINDS[name][1].capitalize()}.",
    )
    add_flags(parser, kind)
    add_flags(parser, EngineConfig, skip=skip, defaults=defaults)
    args = parser.parse_args(argv)
    engine, bench = given(args, EngineConfig), kind(**given(args, kind))
    EngineConfig.make(**engine)  # so that a bad value is found before torch is imported
    return engine, bench


def draw_length(rng: Random, length: int, ratio: float) -> int:
    """Evenly from (1 - ratio) to (1 + ratio) times `length`, and at least 1."""
    return rng.randint(max(floor(length * (1 - ratio)), 1), ceil(length * (1 + ratio)))


def random_ids(rng: Random, llm: "LLM", count: int) -> list[int]:
    return rng.choices(range(llm.engine.vocab_size), k=count)


def sampling(num_tokens: int, disable_detokenize: bool) -> SamplingParams:
    """So many tokens, whichever they are, drawn as vLLM's benchmarks draw them."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=not disable_detokenize)


def check_fit(llm: "LLM", num_input: int, num_output: int) -> None:
    """Refuse lengths of which the engine would cut the output.

    Raises:
        ConfigError: names the most tokens of output that fit.
    """
    most = llm.engine.core.max_num_tokens
    if num_input + num_output > most:
        why = f"with prompts of up to {num_input} tokens, {most} is the most for both together"
        raise ConfigError("output_len", num_output, f"{why} (see --max-model-len)")


def complete(
    llm: "LLM",
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    *,
    use_tqdm: bool = False,
) -> "list[RequestOutput]":
    """Run requests to their end.

    Raises:
        RequestFailedError: one of them failed, so that the time of all says nothing.
    """
    outputs = llm.generate(prompts, params, use_tqdm=use_tqdm)
    for output in outputs:
        for sample in output.outputs:
            if sample.finish_reason == "error":
                raise RequestFailedError(f"request {output.request_id}: {sample.stop_reason}")
    return outputs


def first_token_s(words: list[str], environment: dict[str, str]) -> float:
    """Seconds from the start of a `nanovllm generate` until it prints the only token it makes.

    Raises:
        NanoVLLMError: the command failed.
    """
    command = [sys.executable, "-m", "nanovllm", "generate", "Hello", "--json"]
    command += ["--max-tokens", "1", "--ignore-eos", *words]
    start_s = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.readline()
        elapsed_s = time.perf_counter() - start_s
        _, errors = process.communicate()
    if process.returncode or not printed:
        last = (errors.splitlines() or [f"exit status {process.returncode}"])[-1]
        raise NanoVLLMError(last.removeprefix("nanovllm: error: "))
    return elapsed_s


def as_flag(name: str, value: Any) -> list[str]:
    """A setting as the words that give it on a command line."""
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    return [flag(name), "none" if value is None else str(value)]


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """PERCENTAGES of the values, linear between neighbours, as numpy.percentile has them."""
    ranked, last = sorted(values), len(values) - 1
    result = {}
    for percentage in PERCENTAGES:
        low, part = divmod(percentage * last, 100)
        high = min(low + 1, last)
        result[percentage] = ranked[low] + (ranked[high] - ranked[low]) * part / 100
    return result


def check_writable(name: str, path: str | None) -> None:
    """Refuse a file that could not be written at the end.

    Args:
        name: of the setting that names it. path: None is no file.
    """
    if path is None:
        return
    if os.path.isdir(path or ".") or not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(name, path, "name a file in a folder that exists")


def write(path: str | None, result: dict[str, Any]) -> None:
    """Write results as JSON, where a file was named."""
    if path is not None:
        with open(path, "w") as file:
            json.dump(result, file, indent=4)
