"""How sure a fraction of random starts is."""

from typing import NamedTuple

from scipy.stats import binomtest

CONFIDENCE = 0.95


class Fraction(NamedTuple):
    """`count` of `total`, between `low` and `high` with 95 % confidence."""

    count: int
    total: int
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.count:,} of {self.total:,} "
            f"({self.low:.1%} to {self.high:.1%} with {CONFIDENCE:.0%} confidence)"
        )


def fraction(count: int, total: int) -> Fraction:
    """A fraction with its exact (Clopper–Pearson) confidence interval."""
    interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return Fraction(count, total, float(interval.low), float(interval.high))
