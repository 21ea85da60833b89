"""A study: people who chat share one L40S with documents. Who goes first, and how large is a step?

    python examples/study.py [--picture examples/study.svg]

A team serves Llama 3.1 8B to people who chat, all behind one system prompt, and wants batch jobs to
send it documents as well, 8,000 tokens long. A chat must begin to answer within 500 ms, 99 times in
100, and a document be begun within 10 s. Documents are computed in chunks, between the tokens of
the chats. How many can it take, with which policy and which chunks, and what do the chats pay?
"""

import argparse
from collections.abc import Iterator, Sequence
from heapq import merge
from pathlib import Path
from random import Random
from typing import Any

from nanovllm.sim.deployment import Deployment
from nanovllm.sim.run import simulate
from nanovllm.sim.stats import difference, in_words, interval
from nanovllm.traces import TraceRequest

# Policy, and tokens that a step computes at most; colours told apart by all eyes (Okabe and Ito).
SETTINGS = {
    ("fcfs", 512): "#CC79A7",
    ("fcfs", 2048): "#E69F00",
    ("priority", 512): "#56B4E9",
    ("priority", 2048): "#0072B2",
    ("priority", 8192): "#000000",
}
RATES = (0.3, 0.6, 0.9, 1.2, 1.5)  # documents a second
CHAT_MS, DOCUMENT_MS = 500, 10_000  # what the 99th percentile of the TTFT may be

# 99th percentiles of a run in ms, and all runs: (setting, rate) -> one for each seed
Run = dict[str, float]
Runs = dict[tuple[tuple[str, int], float], list[Run]]


def chats(rng: Random, duration_s: float) -> Iterator[TraceRequest]:
    """Three a second; only what follows the system prompt has to be computed."""
    now_s = rng.expovariate(3.0)
    while now_s < duration_s:
        lengths = 1000 + rng.randint(20, 400), rng.randint(50, 250)
        yield TraceRequest(now_s, *lengths, (("system prompt", 1000),), 0, "chat")
        now_s += rng.expovariate(3.0)


def documents(rng: Random, duration_s: float, rate: float) -> Iterator[TraceRequest]:
    now_s = rng.expovariate(rate)
    while now_s < duration_s:
        lengths = rng.randint(4000, 12000), rng.randint(100, 300)
        yield TraceRequest(now_s, *lengths, (), 1, "documents")
        now_s += rng.expovariate(rate)


def measure(setting: tuple[str, int], rate: float, seed: int, duration_s: float) -> Run:
    """What chats and documents see; the same seed is the same workload under all settings."""
    engine = Deployment(
        hardware="l40s",
        model="llama-3.1-8b",
        max_num_seqs=128,
        scheduling_policy=setting[0],
        max_num_batched_tokens=setting[1],
    )
    parts = chats(Random(seed), duration_s), documents(Random(1000 + seed), duration_s, rate)
    workload = merge(*parts, key=lambda request: request.arrival_s)
    tenants = simulate(workload, engine.engine(), engine.cost()).result()["fairness"]["tenants"]
    chat, other = (tenants["groups"][name] for name in ("chat", "documents"))
    return {
        "chat TTFT": chat["ttft_ms"]["p99"],
        "chat TPOT": chat["tpot_ms"]["p99"],
        "document TTFT": other["ttft_ms"]["p99"],
    }


def upper(runs: list[Run], name: str) -> float:
    """The end of the interval over seeds: a promise should hold on other days too."""
    found = interval([run[name] for run in runs])
    return found.mean + (found.half or 0.0)


def most(runs: Runs, setting: tuple[str, int]) -> float:
    """The highest rate up to which both targets are kept; 0 if there is none."""
    kept = 0.0
    for rate in sorted(rate for one, rate in runs if one == setting):
        some = runs[setting, rate]
        if upper(some, "chat TTFT") > CHAT_MS or upper(some, "document TTFT") > DOCUMENT_MS:
            break
        kept = rate
    return kept


def conclusion(runs: Runs) -> str:
    lines = ["policy, chunk   documents/s   chat TTFT p99, ms   chat TPOT p99, ms"]
    for setting in SETTINGS:
        rate, cells = most(runs, setting), ["-", "-"]
        if rate:
            values = (
                [run[name] for run in runs[setting, rate]] for name in ("chat TTFT", "chat TPOT")
            )
            cells = [f"{one.mean:.0f} ± {one.half or 0.0:.0f}" for one in map(interval, values)]
        name = f"{setting[0]} {setting[1]}"
        lines.append(f"{name:<16}{rate or 'none':>11}{cells[0]:>20}{cells[1]:>20}")
    best = max(SETTINGS, key=lambda one: most(runs, one))  # of equals the smallest chunk
    if not most(runs, best):
        return "\n".join([*lines, "\nNo setting keeps the targets."])
    first, last = (runs[best, rate] for rate in (min(rate for _, rate in runs), most(runs, best)))
    paid = difference(*([run["chat TPOT"] for run in some] for some in (first, last)))
    lines += [
        f"\nTake {best[0]} with chunks of {best[1]} tokens, for up to {most(runs, best)} documents",
        f"a second. For that, chats pay {in_words(paid)} at the 99th percentile of TPOT.",
    ]
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 10}):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        title = "Llama 3.1 8B on an L40S, for 3 chats a second and more and more documents"
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        left, right = figure.subplots(1, 2)
        panel(left, runs, "chat TTFT", "Chats: ms to the first token, p99", (30, 30_000))
        panel(right, runs, "chat TPOT", "Chats: ms for each token after it, p99", (20, 300))
        left.axhline(CHAT_MS, color="#555555", lw=1, ls=":")
        x = right.get_xlim()[1]
        left.text(x, CHAT_MS * 1.06, f"target: {CHAT_MS} ms", ha="right", color="#555555", size=9)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def panel(axes: Any, runs: Runs, name: str, title: str, limits: tuple[float, float]) -> None:
    """A line and its band for each setting, named at its end."""
    rates, free = sorted({rate for _, rate in runs}), 0.0
    ends = []
    for setting, color in SETTINGS.items():
        found = [interval([run[name] for run in runs[setting, rate]]) for rate in rates]
        low = [max(one.mean - (one.half or 0.0), limits[0]) for one in found]
        high = [one.mean + (one.half or 0.0) for one in found]
        means, dashes = [one.mean for one in found], "--" if setting[0] == "fcfs" else "-"
        axes.plot(rates, means, color=color, ls=dashes, marker="o", ms=4)
        axes.fill_between(rates, low, high, color=color, alpha=0.12, lw=0)
        ends.append((means[-1], f"{setting[0]}, chunks of {setting[1]}", color))
    axes.set(yscale="log", ylim=limits, xlabel="documents a second", xticks=rates)
    step = (limits[1] / limits[0]) ** 0.055
    for end, text, color in sorted(ends):
        free = max(end, free * step)  # names do not hide one another
        axes.annotate(text, (rates[-1] * 1.03, free), color=color, va="center", size=9)
    axes.set_xlim(rates[0] - 0.05, rates[-1] + 0.55 * (rates[-1] - rates[0]))
    ticks = [
        y * 10**e for e in (1, 2, 3, 4) for y in (1, 2, 5) if limits[0] <= y * 10**e <= limits[1]
    ]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, loc="left", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.7)


def study(rates: Sequence[float], num_seeds: int, duration_s: float) -> Runs:
    return {
        (setting, rate): [measure(setting, rate, seed, duration_s) for seed in range(num_seeds)]
        for setting in SETTINGS
        for rate in rates
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("study.svg"))
    picture = parser.parse_args().picture
    runs = study(RATES, num_seeds=4, duration_s=60.0)
    print(conclusion(runs))
    draw(runs, picture)


if __name__ == "__main__":
    main()
