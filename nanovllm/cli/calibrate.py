"""`nanovllm calibrate`: fit the simulator to what an engine was seen to do."""

import os
from dataclasses import dataclass

from nanovllm.checks import check_fields
from nanovllm.cli.bench import check_writable, write
from nanovllm.cli.flags import Parser, add_flags, given
from nanovllm.cli.simulate import Deployment
from nanovllm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is fitted to.

    Args:
        requests: JSON lines of input_toks, output_toks, queued_ts, first_token_ts, last_token_ts.
        output: the file to write the calibration to.

    Raises:
        ConfigError: a value is impossible.
    """

    requests: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for name in ("requests", "output"):
            if getattr(self, name) is None:
                raise ConfigError(name, None, "name a file")
        check_writable("output", self.output)


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm calibrate",
        description="Fit efficiency, bandwidth and overhead to measured requests, by searching\n"
        "over simulations. The other flags say how the engine was set up.",
    )
    add_flags(parser, Fit, skip=["output"])
    parser.add_argument("-o", "--output", dest="Fit.output", metavar="FILE", help="to write")
    add_flags(parser, Deployment)
    args = parser.parse_args(argv)
    deployment, fit = Deployment(**given(args, Deployment)), Fit(**given(args, Fit))

    from nanovllm.sim.calibrate import calibrate, read_requests
    from nanovllm.sim.hardware import find_hardware
    from nanovllm.sim.shape import find_shape

    engine = deployment.engine().caching_if(False)
    deployment.cost()  # what is impossible is found before the search
    measured = read_requests(str(fit.requests))
    size = deployment.tensor_parallel_size
    parts = engine, find_hardware(deployment.hardware), find_shape(deployment.model), size
    fitted, found = calibrate(measured, *parts)
    for name, value in fitted.as_dict().items():
        print(f"{name:<24}{value:>12.6g}")
    print("\nsigned errors that are left")
    for name, error in found.items():
        print(f"{name:<24}{error:>+12.2%}")
    about = {"hardware": deployment.hardware, "model": os.path.basename(deployment.model)}
    write(fit.output, {**fitted.as_dict(), **about, "errors": found})
    return 0
