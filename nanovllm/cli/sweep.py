"""`nanovllm sweep`: a grid of settings, simulated on all cores, as a table, JSON and pictures."""

import os
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nanovllm.checks import check_fields, one_of, ranged
from nanovllm.cli.bench import write
from nanovllm.cli.flags import Parser, add_flags, field_texts, flag, flag_type, given
from nanovllm.errors import ConfigError
from nanovllm.sim.deployment import Deployment

if TYPE_CHECKING:
    from nanovllm.sim.experiment import Load
    from nanovllm.sim.workload import Synthetic

AXES = (
    "hardware",
    "model",
    "tensor_parallel_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "scheduling_policy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is run and what becomes of it.

    Args:
        output_dir: the folder for table.md, results.json and pictures; made if it is not there.
        workload: a trace, or "synthetic:name=value,...", as `simulate` takes it.
        calibration: a file that `nanovllm calibrate` wrote; it is used for all settings.
        seeds: workloads that each setting serves; a trace is one.
        seed: of the first workload.
        ttft_target_ms, tpot_target_ms: what counts as good for requests that bring no targets.
        price: NAME=USD, of an hour of one device of that hardware; can be repeated.
        plots: "svg", "png" or "none".
        num_workers: processes; None is one for each core that may be used.

    Raises:
        ConfigError: a value is impossible.
    """

    output_dir: str | None = None
    workload: str = "synthetic"
    calibration: str | None = None
    seeds: int | None = ranged(None, 1, 10_000)
    seed: int = ranged(0, 0, 2**62)
    ttft_target_ms: float | None = ranged(None, 1e-3, 1e9)
    tpot_target_ms: float | None = ranged(None, 1e-3, 1e9)
    price: Sequence[str] | None = None
    plots: str = one_of("svg", "png", "none")
    num_workers: int | None = ranged(None, 1, 4096)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.output_dir is not None:
            check_folder(self.output_dir)


def run(argv: list[str]) -> int:
    from nanovllm.sim.workload import Synthetic

    parser = Parser(
        prog="nanovllm sweep",
        description="Simulate a grid of settings under the same workloads and compare them.",
    )
    add_flags(parser, Sweep)
    add_lists(parser, Deployment, AXES)
    add_lists(parser, Synthetic, ["request_rate"])
    add_flags(parser, Deployment, skip=AXES)
    add_flags(parser, Synthetic, skip=["request_rate"])
    args = parser.parse_args(argv)
    how, synthetic = Sweep(**given(args, Sweep)), given(args, Synthetic)
    if how.output_dir is None:
        raise ConfigError("output_dir", None, "name a folder for the results")
    grid, others = split(given(args, Deployment))
    rates = synthetic.pop("request_rate", [])

    from nanovllm.sim import plots
    from nanovllm.sim.experiment import usable_cores
    from nanovllm.sim.sweep import as_json, deployments, sweep, table

    if how.plots != "none":
        plots.require_matplotlib()
    targets = how.ttft_target_ms, how.tpot_target_ms
    load = checked_load(how.workload, Synthetic(**synthetic), rates, *targets)
    candidates, prices = deployments(grid, others), read_prices(how.price or ())
    check_prices(prices, candidates)
    check_calibration(how.calibration)
    first, count = how.seed, how.seeds or (3 if load.drawn else 1)
    seeds = range(first, first + count)
    axes = [name for name in AXES if name in grid] or ["hardware", "model"]
    tasks = len(candidates) * max(len(rates), 1) * count
    with progress_bar(tasks, "simulations") as progress:
        rows = sweep(
            candidates,
            axes,
            load,
            rates,
            seeds,
            prices,
            how.calibration,
            how.num_workers or usable_cores(),
            progress.update,
        )
    about = {"workload": how.workload, "seeds": list(seeds), "prices_per_hour": prices}
    text = table(rows)
    try:
        os.makedirs(how.output_dir, exist_ok=True)
        write(os.path.join(how.output_dir, "results.json"), as_json(rows, seeds, about))
        with open(os.path.join(how.output_dir, "table.md"), "w", encoding="utf-8") as file:
            print(text, file=file)
        written, left_out = list[str](), list[str]()
        if how.plots != "none":
            written, left_out = plots.draw_all(rows, how.output_dir, how.plots)
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
        raise ConfigError("output_dir", how.output_dir, why) from error
    print(text)
    for why in left_out:
        print(why)
    names = ("table.md", "results.json", *map(os.path.basename, written))
    print(f"in {how.output_dir}: {', '.join(names)}")
    return 0


def progress_bar(total: int, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", disable=None)  # silent where nobody looks


def add_lists(parser: Parser, kind: type, names: Iterable[str]) -> None:
    """A flag for each of some fields that takes several values with commas between."""
    group = parser.add_argument_group(f"{kind.__name__}, several values with commas between")
    entries, texts = {entry.name: entry for entry in fields(kind)}, field_texts(kind)
    for name in names:
        form = flag_type(entries[name])
        default = f" (default: {entries[name].default})"
        group.add_argument(
            flag(name),
            dest=f"{kind.__name__}.{name}",
            default=SUPPRESS,
            type=listed(form["type"]),
            metavar=f"{form['metavar']},...",
            help=(texts[name] + default).replace("%", "%%"),
        )


def listed(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A function from a word with commas to a list."""

    def read_all(word: str) -> list[Any]:
        return list(dict.fromkeys(read(part) for part in word.split(",")))

    read_all.__name__ = f"list of {read.__name__}"
    return read_all


def split(found: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The lists of a grid, and what is one for all."""
    grid = {name: found[name] for name in AXES if name in found}
    return grid, {name: value for name, value in found.items() if name not in grid}


def checked_load(
    workload: str,
    synthetic: "Synthetic",
    rates: Sequence[float],
    ttft_target_ms: float | None,
    tpot_target_ms: float | None,
) -> "Load":
    """The load, once it is known that it can be read, at all of its rates.

    Raises:
        ConfigError: it cannot.
    """
    from nanovllm.sim.experiment import Load
    from nanovllm.sim.workload import find_workload, with_spec

    kind, _, spec = workload.partition(":")
    if kind == "synthetic":
        workload, synthetic = kind, with_spec(synthetic, spec)
    else:
        find_workload(workload, synthetic, 0)
    ttft_s, tpot_s = (ms and ms / 1000 for ms in (ttft_target_ms, tpot_target_ms))
    load = Load(workload=workload, synthetic=synthetic, ttft_target_s=ttft_s, tpot_target_s=tpot_s)
    for rate in rates:
        load.at(rate)
    return load


def read_prices(words: Iterable[str]) -> dict[str, float]:
    """Hardware -> US dollars an hour, from NAME=USD.

    Raises:
        ConfigError: a word is not of this form, or the hardware unknown.
    """
    from nanovllm.sim.hardware import find_hardware

    prices = {}
    for word in words:
        name, _, usd = word.partition("=")
        try:
            prices[name] = float(usd)
        except ValueError:
            raise ConfigError("price", word, "write it as h100=2.5, US dollars an hour") from None
        if not 0 < prices[name] < 1e9:
            raise ConfigError("price", word, "must be above 0 and below a billion")
        find_hardware(name)
    return prices


def check_prices(prices: dict[str, float], candidates: Iterable[Deployment]) -> None:
    """Refuse prices for some hardware and not for other: it would look as if that were free."""
    for deployment in candidates:
        if prices and deployment.hardware not in prices:
            why = f"none for {deployment.hardware}; give --price {deployment.hardware}=USD too"
            raise ConfigError("price", prices, why)


def check_calibration(path: str | None) -> None:
    from nanovllm.sim.calibrate import read_calibration

    if path is not None:
        read_calibration(path)


def check_folder(path: str) -> None:
    """Refuse a folder that could not be written to at the end."""
    parent = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        able = os.access(path, os.W_OK | os.X_OK)
    else:
        able = not os.path.exists(path) and os.path.isdir(parent) and os.access(parent, os.W_OK)
    if not able:
        why = "name a folder that can be written to, or a new one in such a folder"
        raise ConfigError("output_dir", path, why)
