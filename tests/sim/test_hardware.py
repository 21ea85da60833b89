"""The table of devices."""

import re

import pytest

from nanovllm.sim import hardware
from nanovllm.sim.hardware import HARDWARE


def test_each_row_says_where_its_numbers_come_from() -> None:
    assert re.findall(r"^([a-z0-9-]+): ", hardware.__doc__ or "", re.MULTILINE) == list(HARDWARE)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("rtx4090", 164),
        ("rtx-pro-6000", 158),
        ("l4", 403),
        ("l40s", 419),
        ("a100", 153),
        ("h100", 295),
        ("h200", 206),
        ("b200", 292),
        ("mi300x", 247),
    ],
)
def test_tokens_that_a_device_computes_while_it_reads_their_weights(name: str, tokens: int) -> None:
    """A sparse rate, or the bandwidth of another edition, would be far off."""
    device = HARDWARE[name]
    assert round(device.flops / device.bandwidth) == tokens
