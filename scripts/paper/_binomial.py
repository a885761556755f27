"""How sure a fraction of random starts is."""

from typing import NamedTuple

from scipy.stats import binomtest

from ._report import Claim

CONFIDENCE = 0.95


class Fraction(NamedTuple):
    """`successes` of `trials`, between `low` and `high` with 95 % confidence."""

    successes: int
    trials: int
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.successes:,} of {self.trials:,} "
            f"({self.low:.1%} to {self.high:.1%} with {CONFIDENCE:.0%} confidence)"
        )


def probable(text: str, found: Fraction, detail: str) -> Claim:
    """That something has a high probability: above 0.9, with 95 % confidence."""
    return Claim(
        text,
        f"{found}; {detail}",
        found.low > 0.9,
        printed="with high probability",
        seeds=found.trials,
    )


def fraction(successes: int, trials: int) -> Fraction:
    """A fraction with its exact (Clopper–Pearson) confidence interval."""
    interval = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="exact")
    return Fraction(successes, trials, float(interval.low), float(interval.high))
