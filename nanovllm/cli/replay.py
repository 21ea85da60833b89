"""`nanovllm replay`: a recording's requests under another policy, settings or hardware."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nanovllm.checks import check_fields, ranged
from nanovllm.cli.bench import check_writable, write
from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.cli.simulate import event_file
from nanovllm.core.policy import make_policy
from nanovllm.errors import ConfigError
from nanovllm.sim.deployment import Deployment

if TYPE_CHECKING:
    from nanovllm.core.events import Sink
    from nanovllm.recording import Header, Record
    from nanovllm.sim.cost import CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is not as it was recorded.

    Args:
        scheduling_policy: a built-in policy, or "module:Class". max_num_seqs: sequences that run at
            once. max_num_batched_tokens: tokens that a step computes at most. num_kv_blocks: blocks
            in the pool; on other hardware, what fits. block_size: tokens in a block.
        enable_prefix_caching: share the blocks of equal prefixes.
        hardware: as `simulate` takes it. Without it, steps take what a fit to those recorded says.
        model: for hardware; None is the recorded one. tensor_parallel_size: for hardware.
        calibration: a file that `nanovllm calibrate` wrote, instead of the fit or for hardware.

    Raises:
        ConfigError: a value is impossible.
    """

    scheduling_policy: str | None = None
    max_num_seqs: int | None = ranged(None, 1, 2**16)
    max_num_batched_tokens: int | None = ranged(None, 1, 2**24)
    num_kv_blocks: int | None = ranged(None, 1, 2**26)
    block_size: int | None = ranged(None, 1, 1024)
    enable_prefix_caching: bool | None = None
    hardware: str | None = None
    model: str | None = None
    tensor_parallel_size: int | None = ranged(None, 1, 1024)
    calibration: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.scheduling_policy is not None:
            make_policy(self.scheduling_policy)
        for name in ("model", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and self.hardware is None:
                raise ConfigError(
                    name, value, "the recording has no step times of it: add hardware"
                )

    def applied(self, header: "Header") -> "Header":
        """The header of an engine with these settings."""
        from msgspec.structs import replace

        changed = {
            "policy": self.scheduling_policy,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "num_blocks": self.num_kv_blocks,
            "block_size": self.block_size,
            "enable_prefix_caching": self.enable_prefix_caching,
        }
        header = replace(header, **{k: v for k, v in changed.items() if v is not None})
        if self.hardware is not None and self.num_kv_blocks is None:
            header = replace(header, num_blocks=self.deployment(header).engine().num_kv_blocks)
        if header.max_num_batched_tokens < header.max_num_seqs:
            why = f"each of max_num_seqs={header.max_num_seqs} needs a token"
            raise ConfigError("max_num_batched_tokens", header.max_num_batched_tokens, why)
        return header

    def deployment(self, header: "Header") -> Deployment:
        return Deployment(
            hardware=str(self.hardware),
            model=self.model or header.model,
            tensor_parallel_size=self.tensor_parallel_size or 1,
            max_num_batched_tokens=header.max_num_batched_tokens,
            max_num_seqs=header.max_num_seqs,
            block_size=header.block_size,
        )

    def cost(self, header: "Header", fitted: "CostModel") -> "CostModel":
        """The step times of the other engine.

        Args:
            fitted: to the recording.
        """
        from nanovllm.sim.calibrate import read_calibration
        from nanovllm.sim.steps import StepTimes

        found = read_calibration(self.calibration) if self.calibration else None
        if self.hardware is None:
            if found is not None and not isinstance(found, StepTimes):
                raise ConfigError("calibration", self.calibration, "is for hardware: add it")
            return found or fitted
        return self.deployment(header).cost(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is told of it.

    Args:
        ttft_target_ms, tpot_target_ms: what counts as good for requests that bring no targets.
        json: the file to write the reports to.
        events: the file to write the new event log to, as JSON lines.
        record: the file to write the new recording to, for `nanovllm explain`.

    Raises:
        ConfigError: a value is impossible.
    """

    ttft_target_ms: float | None = ranged(None, 1e-3, 1e9)
    tpot_target_ms: float | None = ranged(None, 1e-3, 1e9)
    json: str | None = None
    events: str | None = None
    record: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("json", "events", "record"):
            check_writable(name, getattr(self, name))


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm replay",
        description="Serve a recording's requests again, in virtual time, and compare.",
    )
    parser.add_argument("recording", help="a file that --record wrote")
    add_flags(parser, Changes)
    add_flags(parser, Outcome)
    args = parser.parse_args(argv)
    changes, outcome = Changes(**given(args, Changes)), Outcome(**given(args, Outcome))

    from nanovllm.recording import Arrival, Header, read_recording
    from nanovllm.sim.rerun import report_of
    from nanovllm.sim.steps import fit_steps

    records = list(read_recording(args.recording))
    header = records[0]
    assert isinstance(header, Header)
    if not any(isinstance(record, Arrival) for record in records):
        raise ConfigError("recording", args.recording, "has no requests")
    fitted, other = fit_steps(records), changes.applied(header)
    cost = changes.cost(other, fitted)
    targets = [ms and ms / 1000 for ms in (outcome.ttft_target_ms, outcome.tpot_target_ms)]
    results = {"recorded": report_of(records, *targets).result()}
    results["modelled"], _ = serve(records, header, fitted, targets, None)
    with event_file(outcome.events) as sink:
        results["replayed"], again = serve(records, other, cost, targets, outcome.record, sink)
    print(side_by_side(results))
    for note in notes(changes, records, again):
        print(note)
    write(outcome.json, results)
    return 0


def serve(
    records: "Sequence[Record]",
    header: "Header",
    cost: "CostModel",
    targets: "Sequence[float | None]",
    path: str | None,
    sink: "Sink | None" = None,
) -> "tuple[dict[str, Any], list[Record]]":
    """The report of a rerun, and its recording, which is kept if it has a path."""
    from nanovllm.recording import read_recording
    from nanovllm.sim.rerun import report_of, rerun

    with TemporaryDirectory() as folder:
        part = os.path.join(folder, "again.jsonl") if path is None else f"{path}.part"
        num_cut = rerun(records, header, cost, part, sink)
        again = list(read_recording(part))
        if path is not None:
            os.replace(part, path)
    report = report_of(again, *targets)
    report.num_truncated = num_cut
    return report.result(), again


METRICS = (
    ("num_finished",),
    ("output_throughput",),
    *(
        (kind, point)
        for kind in ("ttft_ms", "tpot_ms", "e2e_ms")
        for point in ("mean", "p50", "p99")
    ),
    ("itl_ms", "p99"),
    ("queue_ms", "mean"),
    ("goodput",),
    ("num_preemptions",),
    ("recomputed_tokens",),
    ("prefix_cache_hit_rate",),
    ("kv_usage", "mean"),
)


def side_by_side(results: Mapping[str, Mapping[str, Any]]) -> str:
    """As recorded, the same by the model and how far that is off, and the other engine with its
    difference to the model. A difference that the model's own error exceeds is none."""
    from nanovllm.sim.sweep import dig, digits

    head = f"{'recorded':>12}{'modelled':>12}{'error':>9}{'replayed':>12}{'change':>9}"
    lines = [f"{'':<24}{head}"]
    for path in METRICS:
        was, same, other = (
            dig(results[name], path) for name in ("recorded", "modelled", "replayed")
        )
        if was is None and other is None:
            continue
        error, change = share(was, same), share(same, other)
        texts = ["-" if value is None else digits(value) for value in (was, same, other)]
        name = " ".join(path)
        line = f"{name:<24}{texts[0]:>12}{texts[1]:>12}{signed(error):>9}{texts[2]:>12}"
        line += f"{signed(change):>9}"
        if change and error is not None and abs(change) <= abs(error):
            line += "  within the model's error"
        lines.append(line)
    return "\n".join(lines)


def share(base: float | None, other: float | None) -> float | None:
    """By how much `other` is above `base`; None if that cannot be said."""
    if base is None or other is None or (not base and other):
        return None
    return other / base - 1 if base else 0.0


def signed(value: float | None) -> str:
    return "-" if value is None else "0" if abs(value) < 5e-4 else f"{value:+.1%}"


def notes(changes: Changes, records: "Sequence[Record]", again: "Sequence[Record]") -> list[str]:
    """What a reader should know before believing it."""
    texts = ["One recording: no interval."]
    if changes.hardware is not None:
        texts.append("Step times are the data sheet's, which the model's error says nothing of.")
        return texts
    for what, count in (("sequences", num_rows), ("tokens", num_tokens)):
        seen, wanted = count(records), count(again)
        if wanted > seen:
            texts.append(
                f"Steps of up to {wanted} {what}; the recording knows up to {seen}: the rest is "
                "extrapolated."
            )
    return texts


def num_rows(records: "Sequence[Record]") -> int:
    """The most sequences in a step."""
    from nanovllm.recording import Step

    return max((len(step.seq_ids or ()) for step in records if isinstance(step, Step)), default=0)


def num_tokens(records: "Sequence[Record]") -> int:
    """The most tokens in a step."""
    from nanovllm.recording import Step

    return max(
        (
            len(step.seq_ids or ()) - len(step.tokens) + sum(step.tokens.values())
            for step in records
            if isinstance(step, Step)
        ),
        default=0,
    )
