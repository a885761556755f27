"""An error figure from solving twice."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._dynamics._base import AbstractDynamics
from .._jax._arrays import tree_norm_of_any_size
from .._jax._compilation import fast_compile_jit
from .._results._stats import DIFFERENCE_SAFETY
from .._results._status import RESULTS
from .._results._trajectory import Trajectory

#: Where a pair of a sample and a unit takes another course than in the true flow, it may
#: do so in two solves alike; rarely in three, the last at 16 times the tolerance. If
#: errors fall in proportion to the tolerance, its difference counts by a quarter.
OF_COARSEST = 0.25


def with_error_estimate(
    trajectory: Trajectory,
    coarse: Trajectory,
    mask: PyTree,
    dynamics: AbstractDynamics,
    coarsest: Trajectory | None = None,
    at_least: Array | None = None,
) -> Trajectory:
    """Adds the difference to a coarser solve of the same problem to `stats`.

    `mask` marks the trained leaves of the model. The difference to the `coarsest` solve,
    if there is one, counts by `OF_COARSEST`, and the larger of the two is taken. What is
    below `at_least` becomes that: two solves may agree by taking the same few steps.
    """
    trajectories = (trajectory, coarse, *([] if coarsest is None else [coarsest]))
    still = without_derivatives((trajectories, at_least))
    numbers, result = _figures(*still, mask, dynamics)
    stats = trajectory.stats.with_numbers(**numbers)
    return dataclasses.replace(trajectory, stats=stats, result=result)


@fast_compile_jit
def _figures(
    trajectories: tuple[Trajectory, ...],
    at_least: Array | None,
    mask: PyTree,
    dynamics: AbstractDynamics,
) -> tuple[dict[str, Array], RESULTS]:
    """The numbers that are added to `stats`, and the result; the finest comes first."""
    fine, *others = trajectories
    numbers = dict(fine.stats.numbers)
    weights, losses = [], []
    for other, counts in zip(others, (1.0, OF_COARSEST), strict=False):
        both = (fine.result == RESULTS.successful) & (
            other.result == RESULTS.successful
        )
        figure = jnp.where(both, DIFFERENCE_SAFETY * counts, jnp.nan)
        weights.append(figure * _distance(fine, other, mask))
        losses.append(figure * jnp.max(jnp.abs(fine.losses - other.losses)))
        for count in {"gradient_evaluations", "jacobian_evaluations"} & numbers.keys():
            numbers[count] += other.stats[count]
    numbers.update(dynamics.error_figures(fine.observed, others[0].observed))
    estimate = jnp.max(jnp.stack(weights))
    if at_least is not None:
        estimate = jnp.maximum(estimate, at_least.astype(estimate.dtype))
    numbers["error_estimate"] = estimate
    numbers["loss_error_estimate"] = jnp.max(jnp.stack(losses))
    # Of those that are known already no copy is made.
    old = fine.stats.numbers
    new = {k: v for k, v in numbers.items() if k not in old or v is not old[k]}
    return new, _judge(fine.result, numbers["error_estimate"])


def _judge(result: RESULTS, estimate: Array) -> RESULTS:
    """The result, or `inaccurate` where the coarser solve failed: then neither holds."""
    judged = RESULTS.where(jnp.isnan(estimate), RESULTS.inaccurate, RESULTS.successful)
    return RESULTS.where(result == RESULTS.successful, judged, result)


def _distance(fine: Trajectory, coarse: Trajectory, mask: PyTree) -> Array:
    """‖w − v‖ / ‖w‖ for the final weights."""
    w, v = (jax.tree.leaves(eqx.filter(t.model, mask)) for t in (fine, coarse))
    difference = [a - b for a, b in zip(w, v, strict=True)]
    return tree_norm_of_any_size(difference) / tree_norm_of_any_size(w)


def without_derivatives(tree: PyTree) -> PyTree:
    """The tree, with derivatives of 0."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, tree
    )
