"""How decoding grows: tokens a second against the number of sequences, and the time of a token
against the tokens of context that it attends to.

    python benchmarks/growth.py [--quantization int8] [--output growth.svg]

Prints two tables in Markdown and draws them. Prompts are random ids and go into the prefix cache
first, so that no prefill falls into what is timed: the steps from the first token of all sequences
to their last. Figures are medians of --rounds, in which the sizes take turns.
"""

import argparse
import statistics
import sys
from pathlib import Path
from random import Random
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestOutput

Size = tuple[int, int]  # sequences, and tokens of context of each


def decode_s(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds of a step in which all sequences decode."""
    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=num_tokens)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    check(outputs, num_tokens)
    timings = [output.timing for output in outputs]
    return (timings[0].last_token_s - timings[0].first_token_s) / (num_tokens - 1)


def check(outputs: list[RequestOutput], num_tokens: int) -> None:
    """All sequences took part in the same steps, so that none of these computed a prompt."""
    whole = all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
    together = len({(o.timing.first_token_s, o.timing.last_token_s) for o in outputs}) == 1
    if not (whole and together):
        raise SystemExit("the KV cache is too small for so many sequences to decode together")


def measure(llm: LLM, sizes: list[Size], num_tokens: int, rounds: int) -> dict[Size, float]:
    """Seconds of a step, the median of the rounds, for each size."""
    rng, params = Random(0), SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompts = {
        (count, length): [rng.choices(range(llm.engine.vocab_size), k=length) for _ in range(count)]
        for count, length in sizes
    }
    for group in prompts.values():
        llm.generate(group, params, use_tqdm=False)
    found: dict[Size, list[float]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size, group in prompts.items():
            found[size].append(decode_s(llm, group, num_tokens))
            shown = f"{size[0]} x {size[1]}: {found[size][-1] * 1000:.2f} ms a step"
            print(f"round {number + 1}: {shown}", file=sys.stderr)
    return {size: statistics.median(values) for size, values in found.items()}


def table(columns: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(by_count: dict[Size, float], by_context: dict[Size, float]) -> str:
    first = [
        [f"{count:,}", f"{count / step_s:,.1f}", f"{step_s * 1000:.2f}"]
        for (count, _), step_s in by_count.items()
    ]
    second, before = [], None
    for (_, length), step_s in by_context.items():
        added_us = "" if before is None else f"{slope_us(before, (length, step_s)):,.0f}"
        second.append([f"{length:,}", f"{1 / step_s:,.1f}", f"{step_s * 1000:.2f}", added_us])
        before = length, step_s
    one = table(["sequences", "tok/s", "ms a step"], first)
    added = "us per 1,000 tokens more"
    return f"{one}\n\n" + table(["tokens of context", "tok/s", "ms a step", added], second)


def slope_us(before: tuple[int, float], after: tuple[int, float]) -> float:
    """Microseconds that 1,000 tokens of context add: attention's share, as all else stays."""
    return (after[1] - before[1]) * 1e6 / (after[0] - before[0]) * 1000


def draw(by_count: dict[Size, float], by_context: dict[Size, float], title: str, to: Path) -> None:
    """Both tables as a picture; its kind is that of the file's name."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    counts = [count for count, _ in by_count]
    left.plot(counts, [count / step_s for (count, _), step_s in by_count.items()], marker="o")
    left.set_xscale("log", base=2)
    left.set_xticks(counts, [str(count) for count in counts])
    left.set(xlabel="sequences", ylabel="output tok/s")
    contexts = [length for _, length in by_context]
    right.plot(contexts, [step_s * 1000 for step_s in by_context.values()], marker="o")
    right.set_xticks(contexts, [f"{length:,}" for length in contexts], rotation=30)
    right.set(xlabel="tokens of context, 1 sequence", ylabel="ms a token")
    for axes in (left, right):
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none"}):  # the same file each time
        figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", help="int8, int4 or gguf")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-threads", type=int, help="default: the cores of this process")
    parser.add_argument("--sequences", type=numbers, default="1,4,16,64,256", metavar="N,N,...")
    parser.add_argument("--context", type=int, default=128, help="tokens of each of these")
    contexts = "256,1024,2048,4096,8128"
    parser.add_argument("--contexts", type=numbers, default=contexts, help="of 1 sequence")
    parser.add_argument("--num-tokens", type=int, default=64, help="tokens made by each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("growth.svg"))
    args = parser.parse_args()
    if args.num_tokens < 2 or args.rounds < 1:
        parser.error("--num-tokens must be at least 2, --rounds at least 1")
    by_count = [(count, args.context) for count in args.sequences]
    by_context = [(1, length) for length in args.contexts]
    settings: dict[str, Any] = {
        "max_model_len": max(args.context, *args.contexts) + args.num_tokens,
        "max_num_seqs": max(args.sequences),
        "dtype": args.dtype,
        "quantization": args.quantization,
        "num_threads": args.num_threads,
    }
    with LLM(args.model, **settings) as llm:
        found = measure(llm, [*by_count, *by_context], args.num_tokens, args.rounds)
    parts = {size: found[size] for size in by_count}, {size: found[size] for size in by_context}
    print(tables(*parts))
    title = f"{args.model}, {args.quantization or args.dtype}"
    try:
        draw(*parts, title, args.output)
    except ImportError:
        print("matplotlib is missing, so nothing is drawn: pip install 'nano-vllm[bench]'")
    else:
        print(f"\ndrawn: {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
