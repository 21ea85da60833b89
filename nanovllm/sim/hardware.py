"""What a device can do at most, from its maker's data sheet.

Dense rates, accumulating in float32: half of a figure "with sparsity". Links one way: half of a
figure "bidirectional". Memory is what torch's total_memory says where users print it; for the l4
and the a100 no sure print was found. Checked in November 2026. A row begins with the sheet that its
figures are from and ends with the address where they were seen: quotes, as no maker's own document
could be opened but NVIDIA's exemplar-performance.

rtx4090: NVIDIA, Ada GPU Architecture v2.1, appendix A: 165.2 TFLOP/s (330.4 sparse; GeForce cards
    accumulate in float32 at half their rate), 1,008 GB/s.
    waredb.com/processor/nvidia-geforce-rtx-4090
rtx-pro-6000: the server edition. NVIDIA's sheet of December 2025: 1,597 GB/s, and of rates
    "1 PFLOP", sparse, which is about 480 TFLOP/s dense. The row holds 252, the card's TF32 rate: a
    run of vLLM reached 292, and square products were measured at 257 (2,048 rows) to 417 (8,192).
    github.com/zzc0721/torch-performance-test-data/issues/162
rtx-pro-6000-workstation: NVIDIA, RTX Blackwell PRO GPU Architecture v1.0, table 4: 503.8 TFLOP/s
    (1,007.6 sparse), 1,792 GB/s. The row holds 252 for the same reason.
    hmc-tech.com/gpu/nvidia-rtx-pro-6000-blackwell-vs-amd-radeon-pro-duo-polaris
l4: NVIDIA's L4 sheet (2023): 242 TFLOP/s sparse, 300 GB/s. grokipedia.com/page/NVIDIA_L4_vs_L40S
l40s: NVIDIA's L40S sheet (2023): 362.05 TFLOP/s (733 sparse, which is not quite twice as much),
    864 GB/s, PCIe 4 of 64 GB/s both ways. www.mullet.se/product.html?product_id=355414
a100: the 80 GB SXM. NVIDIA's A100 sheet: 312 TFLOP/s (624 sparse), 2,039 GB/s, NVLink of 600 GB/s
    both ways. glennklockwood.com/garden/processors/A100
h100: the SXM. NVIDIA, H100 GPU Architecture: 989.4 TFLOP/s (1,978.9 sparse), 3.35 TB/s, NVLink of
    900 GB/s both ways. glennklockwood.com/garden/processors/h100
h200: the SXM. NVIDIA's H200 sheet (2023): computes and links as the h100; 4.8 TB/s.
    aiwiki.ai/wiki/nvidia_h200
b200: of an HGX, 180 GB and 1,000 W (a GB200's has 8 TB/s and computes 9% faster): 2,250 TFLOP/s,
    7.7 TB/s, NVLink of 1.8 TB/s both ways. github.com/NVIDIA/exemplar-performance
mi300x: AMD's MI300X sheet: 1,307.4 TFLOP/s, 5.3 TB/s (as PyTorch's inductor/analysis/device_info.py
    has it); 7 links of 128 GB/s both ways, which a ring uses together only if it is split over all.
    www.wheelersnetwork.com/2024/01/
cpu: measured, on the 2 cores (AMD EPYC, Zen 4) and 24 GiB that this engine was made on: products of
    bfloat16 400 to 440 GFLOP/s, reads 33 to 35 GB/s. The link is a guess. Yours differs:
    `nanovllm calibrate --recording FILE` fits a recording made on it, and needs no row here.
"""

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

HARDWARE = {
    "rtx4090": Hardware(165.2e12, 1008e9, 25.25e9, PCIE4),
    "rtx-pro-6000": Hardware(252e12, 1597e9, 101.97e9, PCIE5),
    "rtx-pro-6000-workstation": Hardware(252e12, 1792e9, 101.97e9, PCIE5),
    "l4": Hardware(121e12, 300e9, 23.6e9, PCIE4),
    "l40s": Hardware(362.05e12, 864e9, 47.8e9, PCIE4),
    "a100": Hardware(312e12, 2039e9, 85.1e9, 300e9),
    "h100": Hardware(989.4e12, 3350e9, 85.0e9, 450e9),
    "h200": Hardware(989.4e12, 4800e9, 150.1e9, 450e9),
    "b200": Hardware(2250e12, 7700e9, 191.5e9, 900e9),
    "mi300x": Hardware(1307.4e12, 5300e9, 206.1e9, 448e9),
    "cpu": Hardware(0.42e12, 34e9, 25.3e9, 10e9),
}


def find_hardware(name: str) -> Hardware:
    """The device called `name`.

    Raises:
        ConfigError: it is not in the table.
    """
    if name not in HARDWARE:
        raise ConfigError("hardware", name, f"choose one of {', '.join(HARDWARE)}")
    return HARDWARE[name]
