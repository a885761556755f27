"""Where an expansion in the learning rate holds, and the warning where it does not.

Heavy ball (v ← μv + λw, w ← w − ηv) on the quadratic λw²/2 multiplies w by the roots r
of r² − (1 + μ − ηλ)r + μ = 0.

- It is stable for ηλ < 2(1 + μ), where the root at −1 is met.
- The larger root, which is the flow's, is analytic in η up to ηλ = (1 − √μ)², where the
  two meet and become complex: the radius of convergence of any expansion of the path.
- A sum over all of its steps is analytic up to the stability limit: Σ_k v_k² = λw₀² /
  (2η(1−μ)(1 − ηλ/(2(1+μ)))), so that leading order is wrong by a factor 1/(1 − r), with
  r the fraction of the stability limit.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._jax._tracing import is_concrete
from .._problem._problem import Problem
from .._results._status import RESULTS
from .._results._trajectory import Trajectory


def start_of_slow_motion(
    problem: Problem, learning_rate: Float[Array, ""], momentum: Float[Array, ""]
) -> PyTree:
    """Where the slow motion that heavy ball settles to has its start.

    From rest, v_k = ∇L (1−μᵏ)/(1−μ) to leading order: Σ_k η(v_∞ − v_k) is missing.
    """
    behind = learning_rate * momentum / (1 - momentum) ** 2
    gradient = jax.grad(problem.loss)(problem.weights)
    return jax.tree.map(lambda w, g: w + behind * g, problem.weights, gradient)


def error_in_descent(
    learning_rate: Float[Array, ""], momentum: Float[Array, ""]
) -> RESULTS:
    """What is wrong with the numbers of a descent, where they are traced."""
    is_valid = (momentum >= 0) & (momentum < 1)
    error = RESULTS.where(is_valid, RESULTS.successful, RESULTS.bad_coefficient)
    is_valid = jnp.isfinite(learning_rate) & (learning_rate > 0)
    return RESULTS.where(is_valid, error, RESULTS.bad_learning_rate)


def warn_unless_trajectory_expands(
    trajectory: Trajectory, learning_rate: Any, momentum: Any
) -> None:
    """A warning if η λ_max leaves the radius in which a path can be expanded in η."""
    radius = (1 - np.sqrt(momentum)) ** 2 if is_concrete(momentum) else None
    _warn_beyond(
        trajectory,
        learning_rate,
        momentum,
        radius,
        "the expansion in the learning rate converges only up to {bound}, where the "
        "steps begin to overshoot, and the modified flow does not follow them in the "
        "sharpest directions",
        "`homoflow.central_flow` with `order=2` goes on through that edge, for smooth models",
        stacklevel=4,
    )


def warn_unless_drift_expands(
    trajectory: Trajectory, learning_rate: Any, momentum: Any
) -> None:
    """A warning if η λ_max is more than half of what is stable."""
    half = 1 + momentum if is_concrete(momentum) else None
    _warn_beyond(
        trajectory,
        learning_rate,
        momentum,
        half,
        "beyond half of the stability limit, {bound}, the leading order in the learning "
        "rate is wrong by more than a factor of 2 in the sharpest directions: the "
        "expansion fails",
        "`homoflow.predict_drift` with `edge=True` predicts the drift through that edge, "
        "for smooth models",
        stacklevel=5,  # Equinox wraps methods once.
    )


def _warn_beyond(
    trajectory: Trajectory,
    learning_rate: Any,
    momentum: Any,
    bound: Any,
    meaning: str,
    beyond: str,
    *,
    stacklevel: int,
) -> None:
    sharpness = trajectory.observed["sharpness"].values
    if not is_concrete((sharpness, learning_rate, momentum)) or sharpness.ndim != 2:
        return
    values = np.asarray(sharpness[:, 0], float)
    # Where a run failed its losses are NaN too.
    missed = np.isnan(values) & ~np.isnan(np.asarray(trajectory.losses))
    if np.any(missed):
        warnings.warn(
            "The sharpness could not be measured at every recorded time: whether the "
            "learning rate is small enough is not known.",
            stacklevel=stacklevel,
        )
    if np.all(np.isnan(values)):
        return
    worst = int(np.nanargmax(values))
    reached = float(learning_rate) * values[worst]
    if reached <= bound:
        return
    limit = 2 * (1 + float(momentum))
    advice = f": {beyond}." if reached > limit else "."
    warnings.warn(
        f"learning_rate·λ_max reaches {reached:.3g} at t = "
        f"{float(trajectory.ts[worst]):.3g} (measured sharpness λ_max = "
        f"{values[worst]:.4g}): {meaning.format(bound=f'{float(bound):.3g}')}. The steps "
        f"are unstable above {limit:.3g}{advice}",
        stacklevel=stacklevel,
    )
