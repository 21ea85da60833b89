"""What a batch gains: decode tokens a second of 1 stream and of 64 at once, in alternating rounds.

python benchmarks/batching.py [MODEL]
"""

import statistics
import sys
import time

from nanovllm import LLM, SamplingParams

ROUNDS, NUM_TOKENS = 3, 64


def tokens_per_second(llm: LLM, num_prompts: int, first_id: int) -> float:
    prompts = [[first_id + i] * 16 for i in range(num_prompts)]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return num_prompts * NUM_TOKENS / (time.perf_counter() - start)


def main() -> None:
    with LLM(*sys.argv[1:]) as llm:
        tokens_per_second(llm, 2, 1)  # compiles
        rounds = [
            (tokens_per_second(llm, 1, 100 + r), tokens_per_second(llm, 64, 1000 + 100 * r))
            for r in range(ROUNDS)
        ]
    one, many = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = sorted(b / a for a, b in rounds)
    print(f"1 stream    {one:8.1f} output tok/s")
    print(f"64 streams  {many:8.1f} output tok/s")
    print(
        f"ratio       {ratios[len(ratios) // 2]:8.1f}  (from {ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


if __name__ == "__main__":
    main()
