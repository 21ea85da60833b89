"""What serving costs: the same 64 requests through HTTP and without, and beside vLLM's server.

    python benchmarks/serving.py [--arms offline,nanovllm,vllm] [--rounds 3] [--json FILE]

`offline` is LLM in a process of its own; the others are servers, to which `nanovllm bench serve`
sends the requests of benchmarks/compare.py all at once, each as a stream. "idle" is the time to the
first token of a request of 16 tokens that comes when there is no other: offline the engine's own,
at a server as its client sees it. The client runs on the same cores. For vLLM see compare.py.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from compare import CONTEXT, Work, environment, missing, spread, table, workloads

COLUMNS = {
    "rate": "output tok/s",
    "ttft50": "TTFT p50, ms",
    "ttft99": "TTFT p99, ms",
    "itl50": "ITL p50, ms",
    "itl99": "ITL p99, ms",
    "idle": "idle TTFT p50, ms",
}
NUM_IDLE, START_LIMIT_S = 31, 300


def offline(work: Work) -> dict[str, float]:
    """The engine without a server; makes text, as a server does."""
    from nanovllm import LLM, SamplingParams

    llm = LLM("smollm2-135m", dtype="bfloat16", max_model_len=CONTEXT)
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for _, n in work]
    prompts = [prompt for prompt, _ in work]
    short = [[token_id + 1 for token_id in prompt[:32]] for prompt in prompts]
    llm.generate(short, SamplingParams(max_tokens=4), use_tqdm=False)
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start_s
    ttft_ms = [1000 * (output.timing.ttft_s or 0) for output in outputs]
    idle_ms = []
    for i in range(NUM_IDLE):
        start_s = time.perf_counter()
        for _ in llm.stream(list(range(20_000 + 16 * i, 20_016 + 16 * i)), params[0]):
            break
        idle_ms.append(1000 * (time.perf_counter() - start_s))
    return {
        "rate": sum(count for _, count in work) / elapsed_s,
        "ttft50": statistics.median(ttft_ms),
        "ttft99": statistics.quantiles(ttft_ms, n=100)[98],
        "idle": statistics.median(idle_ms),
    }


def served(name: str, peers: Path, work: Work) -> dict[str, float]:
    """A server, from its start to its end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    if name == "vllm":
        command = [str(peers / "bin/python"), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(peers / "model"), "--disable-uvicorn-access-log"]
    else:
        command = [sys.executable, "-m", "nanovllm", "serve", "smollm2-135m"]
    command += ["--port", port, "--dtype", "bfloat16", "--max-model-len", str(CONTEXT)]
    with TemporaryDirectory() as folder, running(command, environment(name, peers), folder):
        wait_until_ready(f"http://127.0.0.1:{port}/health")
        trace = Path(folder) / "trace.jsonl"
        lines = [
            {"arrival_s": 0, "prompt_tokens": len(prompt), "output_tokens": count}
            for prompt, count in work
        ]
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
        replay = ["--dataset-name", "trace", "--dataset-path", str(trace), "--num-warmups", "4"]
        many = bench(port, folder, *replay)
        lengths = ["--random-input-len", "16", "--random-output-len", "2", "--seed", "7"]
        one = bench(
            port, folder, "--num-prompts", str(NUM_IDLE), "--max-concurrency", "1", *lengths
        )
    return {
        "rate": many["output_throughput"],
        "ttft50": many["p50_ttft_ms"],
        "ttft99": many["p99_ttft_ms"],
        "itl50": many["p50_itl_ms"],
        "itl99": many["p99_itl_ms"],
        "idle": one["p50_ttft_ms"],
    }


def bench(port: str, folder: str, *flags: str) -> dict[str, float]:
    """The results of one `nanovllm bench serve`."""
    command = [sys.executable, "-m", "nanovllm", "bench", "serve", "--port", port, "--save-result"]
    command += ["--result-dir", folder, "--result-filename", "result.json", "--temperature", "0"]
    command += ["--metric-percentiles", "50,99", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, float] = json.loads((Path(folder) / "result.json").read_text())
    assert found["failed"] == 0
    return found


@contextmanager
def running(command: list[str], env: dict[str, str], folder: str) -> Iterator[None]:
    with (Path(folder) / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def wait_until_ready(url: str) -> None:
    limit_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit_s:
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url):
            return
        time.sleep(0.2)
    raise TimeoutError(f"{url} is not ready after {START_LIMIT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default="offline,nanovllm,vllm", help="names between commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default="~/.cache/peers", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--offline", type=int, metavar="SEED", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline is not None:
        print(json.dumps(offline(workloads(args.offline)["batch"])))
        return
    peers, names = args.peers.expanduser().absolute(), args.arms.split(",")
    if how := missing("vllm", peers) if "vllm" in names else "":
        print(f"vllm is skipped; to have it: {how}", file=sys.stderr)
        names.remove("vllm")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            if name == "offline":
                command = [sys.executable, __file__, "--offline", str(number)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                figures = json.loads(done.stdout.splitlines()[-1])
            else:
                figures = served(name, peers, workloads(number)["batch"])
            rounds[name].append(figures)
            shown = "  ".join(f"{column} {value:,.1f}" for column, value in figures.items())
            print(f"round {number + 1}: {name:<10}{shown}", file=sys.stderr)
    report(rounds)
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=2))


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, and what they mean for the server."""
    medians = {
        name: {
            column: f"{statistics.median(one[column] for one in found):,.1f}"
            if column in found[0]
            else ""
            for column in COLUMNS
        }
        for name, found in rounds.items()
    }
    print(table("median", medians, COLUMNS) + "\n")
    own = rounds.get("nanovllm", [])
    for peer in [name for name in rounds if name != "nanovllm" and own]:
        ratios = [a["rate"] / b["rate"] for a, b in zip(own, rounds[peer], strict=True)]
        more = [a["idle"] - b["idle"] for a, b in zip(own, rounds[peer], strict=True)]
        print(f"output tok/s, nanovllm / {peer}: {spread(ratios)}")
        print(f"idle TTFT, nanovllm - {peer}, ms: {spread(more)}")


if __name__ == "__main__":
    main()
