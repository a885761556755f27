"""Flow time of chains whose steps depend on the run: numbers in place of gradients.

Under a gradient that stays, a step is so many times the gradient. Part after part makes
another such number of it; what remembers starts as if it had seen the first for ever.
"""

import numpy as np
from descent_cases import AHEAD, AROUND, BEHIND, CORE, STEPS, Case

#: β of what adds βᵏ of earlier steps, and the first step at which it does.
TRACES = {
    "average": (0.5, 0),
    "late average": (0.5, 10),
    "average behind": (0.5, 0),
    "heavy ball": (0.9, 0),
    "single precision": (0.5, 0),
    "injected momentum": (0.5, 0),
}
#: What hands a gradient on as it is, so that the next part's multiple is the gradient's.
PLAIN = {"no NaN", "loose clip"}
#: Multiples of the gradient, by its norm.
BY_NORM = {
    "clipped norm": lambda norm: np.minimum(1, 0.4 / norm),
    "normalized": lambda norm: 1 / (norm + 1e-6),
}


def flow_time(case: Case, norms: np.ndarray, plateau: np.ndarray) -> float | None:
    """The sum over steps, given the norms of gradients and what a plateau left of rates.

    `None` where no formula is written down here.
    """
    if any(AROUND[around][1] != 1 for around in case.around):
        return None
    numbers, is_gradient = np.ones(STEPS), True
    for name in (*case.ahead, case.core, *case.behind):
        if name in BY_NORM:
            if not is_gradient:
                return None
            numbers = BY_NORM[name](norms)
        elif name == "plateau":
            numbers = numbers * plateau
        elif name in MEMORIES:
            numbers = MEMORIES[name](numbers)
        else:
            part = CORE[name][1] if name in CORE else (AHEAD | BEHIND)[name].factor
            if part is None:
                return None
            numbers = numbers * part(np.arange(STEPS))
        is_gradient &= name in PLAIN
    return case.rate * float(np.sum(numbers))


def _trace(numbers: np.ndarray, beta: float, first: int) -> np.ndarray:
    after = numbers.copy()
    after[first] = numbers[first] / (1 - beta)
    for k in range(first + 1, STEPS):
        after[k] = numbers[k] + beta * after[k - 1]
    return after


def _nesterov(numbers: np.ndarray) -> np.ndarray:
    return numbers + 0.75 * _trace(numbers, 0.75, 0)


def _average(numbers: np.ndarray) -> np.ndarray:
    return 0.25 * _trace(numbers, 0.75, 0)


def _corrected(numbers: np.ndarray) -> np.ndarray:
    weights = 0.5 ** np.arange(STEPS)
    return np.array(
        [
            numbers[: k + 1] @ weights[k::-1] / np.sum(weights[: k + 1])
            for k in range(STEPS)
        ]
    )


MEMORIES = {
    "Nesterov": _nesterov,
    "average from 0": _average,
    "corrected average": _corrected,
    **{
        name: lambda numbers, beta=beta, first=first: _trace(numbers, beta, first)
        for name, (beta, first) in TRACES.items()
    },
}
