"""An error figure from solving twice."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._trajectory import RESULTS, Stats, Trajectory

#: The estimate is this factor times the difference to a coarser solve: with kinks the
#: error does not always fall in proportion, and where the two solves become unrelated
#: their distance may understate the error of either.
SAFETY = 2.0


def with_error_estimate(
    trajectory: Trajectory, coarse: Trajectory, mask: PyTree
) -> Trajectory:
    """Adds the difference to a coarser solve of the same problem to `stats`.

    `mask` marks the trained leaves of the model.
    """
    still = without_derivatives((trajectory, coarse))
    fine, rough = (jax.tree.leaves(eqx.filter(t.model, mask)) for t in still)
    difference = sum(jnp.sum((a - b) ** 2) for a, b in zip(fine, rough, strict=True))
    size = sum(jnp.sum(a**2) for a in fine)
    both = (trajectory.result == RESULTS.successful) & (
        coarse.result == RESULTS.successful
    )
    numbers = dict(trajectory.stats.numbers)
    numbers["error_estimate"] = jnp.where(
        both, SAFETY * jnp.sqrt(difference / size), jnp.nan
    )
    numbers["loss_error_estimate"] = jnp.where(
        both, SAFETY * jnp.max(jnp.abs(still[0].losses - still[1].losses)), jnp.nan
    )
    if "gradient_evaluations" in numbers:
        numbers["gradient_evaluations"] += coarse.stats["gradient_evaluations"]
    stats = Stats(numbers, trajectory.stats.facts)
    return eqx.tree_at(lambda t: t.stats, trajectory, stats)


def without_derivatives(tree: PyTree) -> PyTree:
    """The tree, with derivatives of 0."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, tree
    )
