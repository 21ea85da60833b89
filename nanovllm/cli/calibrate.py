"""`nanovllm calibrate`: fit the simulator to what an engine was seen to do."""

import os
from dataclasses import dataclass
from typing import Any

from nanovllm.checks import check_fields
from nanovllm.cli.bench import check_writable, write
from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.cli.simulate import Deployment
from nanovllm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is fitted to.

    Args:
        requests: JSON lines of input_toks, output_toks, queued_ts, first_token_ts, last_token_ts:
            the roofline is fitted, by searching over simulations.
        recording: a file that --record wrote: its step times are fitted, for this model and
            machine.
        output: the file to write the calibration to.

    Raises:
        ConfigError: a value is impossible.
    """

    requests: str | None = None
    recording: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.requests is None and self.recording is None:
            raise ConfigError("requests", None, "name a file, or a recording")
        if self.requests is not None and self.recording is not None:
            raise ConfigError("recording", self.recording, "give either this or requests")
        if self.output is None:
            raise ConfigError("output", None, "name a file")
        check_writable("output", self.output)


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm calibrate",
        description="Fit the simulator to measured requests or to a recording's step times. The\n"
        "other flags say how the engine was set up; a recording knows that itself.",
    )
    add_flags(parser, Fit, skip=["output"])
    parser.add_argument("-o", "--output", dest="Fit.output", metavar="FILE", help="to write")
    add_flags(parser, Deployment)
    args = parser.parse_args(argv)
    deployment, fit = Deployment(**given(args, Deployment)), Fit(**given(args, Fit))
    if fit.recording is not None:
        result = fit_recording(fit.recording)
    else:
        result = fit_requests(str(fit.requests), deployment)
    write(fit.output, result)
    return 0


def fit_requests(path: str, deployment: Deployment) -> dict[str, Any]:
    """The roofline that serves requests as they were served."""
    from nanovllm.sim.calibrate import as_file, calibrate, read_requests
    from nanovllm.sim.hardware import find_hardware
    from nanovllm.sim.shape import find_shape

    engine = deployment.engine().caching_if(False)
    deployment.cost()  # what is impossible is found before the search
    measured = read_requests(path)
    size = deployment.tensor_parallel_size
    parts = engine, find_hardware(deployment.hardware), find_shape(deployment.model), size
    fitted, found = calibrate(measured, *parts)
    for name, value in fitted.as_dict().items():
        print(f"{name:<24}{value:>12.6g}")
    print("\nsigned errors that are left")
    for name, error in found.items():
        print(f"{name:<24}{error:>+12.2%}")
    about = {"hardware": deployment.hardware, "model": os.path.basename(deployment.model)}
    return {**as_file(fitted), **about, "errors": found}


def fit_recording(path: str) -> dict[str, Any]:
    """The step times of a recording."""
    from nanovllm.recording import Header, read_recording
    from nanovllm.sim.calibrate import as_file
    from nanovllm.sim.steps import check, fit, steps_to_fit

    records = read_recording(path)
    header = next(records)
    assert isinstance(header, Header)
    steps = steps_to_fit(records)
    fitted, found = fit(steps), check(steps)
    for name, value in fitted.as_dict().items():
        if isinstance(value, float):
            print(f"{name:<24}{value:>12.6g}")
    for edge, price_s in zip(fitted.edges, fitted.token_s, strict=True):
        print(f"{f'token_s above {edge}':<24}{price_s:>12.6g}")
    print(f"\n{len(steps)} steps: signed error of their sum, each fifth by a fit to the others")
    for name, error in found.items():
        print(f"{name:<24}{error:>+12.2%}")
    about = {"model": os.path.basename(header.model), "num_kv_blocks": header.num_blocks}
    return {**as_file(fitted), **about, "errors": found}
