"""What a device can do at most, from its maker's data sheet."""

from dataclasses import dataclass

from nanovllm.checks import check_fields, ranged
from nanovllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Attributes:
        flops: dense bfloat16 FLOP/s of the matrix units, accumulating in float32.
        bandwidth: of its memory, bytes/s.
        memory: bytes that a program sees.
        link: bytes/s to its peers, one way.

    Raises:
        ConfigError: a number is impossible.
    """

    flops: float = ranged(1e12, 1e6, 1e19)
    bandwidth: float = ranged(1e11, 1e6, 1e17)
    memory: float = ranged(1e10, 1e6, 1e16)
    link: float = ranged(1e10, 1e6, 1e16)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)


PCIE4, PCIE5 = 32e9, 64e9  # 16 lanes, one way

# GeForce and RTX PRO cards accumulate in float32 at half the rate that adverts quote. Memory is
# what the driver reports, a little below the sheet. Sources, in order: NVIDIA's Ada white paper,
# appendix A; RTX PRO 6000 Blackwell sheets (server edition; the workstation's memory is faster);
# the L4, L40S, A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 sheets (half of the sparse figures);
# AMD's MI300X sheet; "cpu": two cores with AVX-512 BF16, a guess to be calibrated.
HARDWARE = {
    "rtx4090": Hardware(165.2e12, 1008e9, 25.25e9, PCIE4),
    "rtx-pro-6000": Hardware(252e12, 1597e9, 101.9e9, PCIE5),
    "rtx-pro-6000-workstation": Hardware(252e12, 1792e9, 101.9e9, PCIE5),
    "l4": Hardware(121e12, 300e9, 23.6e9, PCIE4),
    "l40s": Hardware(362e12, 864e9, 47.7e9, PCIE4),
    "a100": Hardware(312e12, 2039e9, 85.1e9, 300e9),
    "h100": Hardware(989e12, 3350e9, 85.0e9, 450e9),
    "h200": Hardware(989e12, 4800e9, 150.1e9, 450e9),
    "b200": Hardware(2250e12, 8000e9, 191.5e9, 900e9),
    "mi300x": Hardware(1307e12, 5300e9, 206.1e9, 448e9),
    "cpu": Hardware(0.5e12, 20e9, 8e9, 10e9),
}


def find_hardware(name: str) -> Hardware:
    """The device called `name`.

    Raises:
        ConfigError: it is not in the table.
    """
    if name not in HARDWARE:
        raise ConfigError("hardware", name, f"choose one of {', '.join(HARDWARE)}")
    return HARDWARE[name]
