"""What repeated runs say: a mean with its interval, and the difference between two settings that
served the same workloads."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

# Student's t (1908), two-sided 95%, for 1 to 30 degrees of freedom; beyond, the last is a bit wide.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and where the true one lies in 95 of 100 such experiments; `half` is None if there
    was one run, which says nothing of others."""

    mean: float
    half: float | None

    @property
    def sure(self) -> bool:
        """True if it does not hold 0."""
        return self.half is not None and abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent runs, and half the width of its interval."""
    count = len(values)
    if count < 2:
        return Interval(mean(values), None)
    return Interval(mean(values), T95[min(count - 1, 30) - 1] * stdev(values) / sqrt(count))


def difference(base: Sequence[float | None], other: Sequence[float | None]) -> Interval | None:
    """By what share `other` is above `base`, seed by seed, so that what a seed does to both
    cancels.

    Returns:
        None if a run has no such number, or a base of 0.
    """
    shares = [b / a - 1 for a, b in zip(base, other, strict=True) if a and b is not None]
    return interval(shares) if shares and len(shares) == len(base) else None


def in_words(found: Interval | None) -> str:
    """A difference for a table."""
    if found is None:
        return "-"
    if found.half is None:
        return f"{found.mean:+.1%}"
    if max(abs(found.mean), found.half) < 5e-4:
        return "the same"
    shown = f"{found.mean:+.1%} ± {100 * found.half:.1f}"
    return shown if found.sure else f"{shown}, within the noise"
