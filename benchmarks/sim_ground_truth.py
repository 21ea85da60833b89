"""How far the simulator is from measured runs of vLLM on GPUs.

    python benchmarks/sim_ground_truth.py FOLDER

FOLDER holds rtx4090-llama-3.1-8b/requests.jsonl and rtxpro6000-llama-3.1-8b/requests.jsonl (300
ShareGPT requests, 10 a second, vLLM 0.19.0; from LLMServingSim's bench/examples, MIT licence).
Fits each run, then predicts the second GPU from its data sheet with the numbers of the first.
"""

import sys
import time
from pathlib import Path

from nanovllm.sim.calibrate import calibrate, errors, read_requests
from nanovllm.sim.cost import Calibration, Roofline, num_blocks_in
from nanovllm.sim.hardware import find_hardware
from nanovllm.sim.run import Engine, simulate
from nanovllm.sim.shape import find_shape


def show(title: str, fitted: Calibration, found: dict[str, float], wall_s: float) -> None:
    print(f"{title} ({wall_s:.0f} s)\n  {fitted}")
    for name, error in found.items():
        print(f"  {name:<14}{error:>+8.2%}")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder, shape = Path(sys.argv[1]), find_shape("llama-3.1-8b")
    first, second = find_hardware("rtx4090"), find_hardware("rtx-pro-6000")
    engines = (
        Engine(num_kv_blocks=2588, max_model_len=32768, enable_prefix_caching=False),
        Engine(
            num_kv_blocks=num_blocks_in(second, shape, 16, 2048),
            max_model_len=shape.max_model_len,
            max_num_seqs=128,
            enable_prefix_caching=False,
        ),
    )
    runs = [
        read_requests(str(folder / f"{name}-llama-3.1-8b" / "requests.jsonl"))
        for name in ("rtx4090", "rtxpro6000")
    ]
    start = time.perf_counter()
    fitted, found = calibrate(runs[0], engines[0], first, shape)
    show("RTX 4090, fitted", fitted, found, time.perf_counter() - start)
    start = time.perf_counter()
    cost = Roofline(second, shape, 1, fitted)
    predicted = simulate(runs[1].requests, engines[1], cost).result()
    found = errors(predicted, runs[1].report)
    show("RTX PRO 6000, predicted", fitted, found, time.perf_counter() - start)
    start = time.perf_counter()
    fitted, found = calibrate(runs[1], engines[1], second, shape)
    show("RTX PRO 6000, fitted", fitted, found, time.perf_counter() - start)


if __name__ == "__main__":
    main()
