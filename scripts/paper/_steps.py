"""What the steps of descent do to the balance of layers, beside what theory says."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from homoflow import AbstractLoss, Law, Trajectory

from ._conservation import relative_change

#: What is left over of a change counts as rounding up to this part of ‖w‖².
ROUNDING = 1e-12
#: Half the step does half of the change, within this part.
HALVING = 0.1
#: A mean is as expected within so many standard errors.
ERRORS = 3.0


class BalanceChange(NamedTuple):
    """How laws change in a descent, the worst of all laws and times.

    - `changed`: the largest change of a law since the start.
    - `added`: the largest sum of η²q(g) over the steps, g the (mini)batch gradient.
    - `left`: the largest difference between the two, as a part of the largest ‖w‖².
    """

    changed: Float[Array, ""]
    added: Float[Array, ""]
    left: Float[Array, ""]


def balance_change(run: Trajectory) -> BalanceChange:
    """Of a run with a ledger: what changed, and what q of the steps says."""
    assert run.ledger is not None
    observed = jnp.stack([a.observed for a in run.ledger.values()])
    added = jnp.stack([a.discretization for a in run.ledger.values()])
    size = jnp.max(jnp.stack(list(run.squared_norms.values())).sum(axis=0))
    left = jnp.max(jnp.abs(observed - added)) / size
    return BalanceChange(jnp.max(jnp.abs(observed)), jnp.max(jnp.abs(added)), left)


def change_of(run: Trajectory) -> float:
    """The largest change of a law of a run, as a part of the largest ‖w‖²."""
    return max(float(relative_change(run, name).max()) for name in run.laws)


def ratio(norms: Float[np.ndarray, "... layers"]) -> Float[np.ndarray, "..."]:
    """Largest over smallest squared norm of a network's layers."""
    return np.asarray(norms.max(axis=-1) / norms.min(axis=-1))


def norms_by_start(
    start: Float[np.ndarray, "... layers"], end: Float[np.ndarray, "... layers"]
) -> Float[np.ndarray, "... layers"]:
    """The squared norms that the laws say: the start's differences, the end's sum."""
    gain = (end.sum(axis=-1) - start.sum(axis=-1)) / start.shape[-1]
    return start + gain[..., None]


class Additions(NamedTuple):
    """What single steps added to one law, against the mean over batches.

    - `observed`: η²q(g), summed over the recorded steps.
    - `expected`: likewise η²(q(ḡ) + tr AΣ), the mean over batches at the same weights.
    - `of_mean`: the part of q(ḡ), what descent without noise would add.
    - `error`: the standard error of `observed`.
    """

    observed: float
    expected: float
    of_mean: float
    error: float

    @property
    def off(self) -> float:
        """How many standard errors lie between what is observed and expected."""
        return abs(self.observed - self.expected) / self.error

    @property
    def off_without_noise(self) -> float:
        return abs(self.observed - self.of_mean) / self.error


def additions(
    run: Trajectory,
    law: Law,
    data: tuple[Array, Array],
    loss: AbstractLoss,
    rate: float,
    batch_size: int,
) -> Additions:
    """Of SGD with a ledger and its models kept: the recorded steps, each on its own.

    tr AΣ comes from every sample's gradient at the recorded weights, and knows nothing
    of batches; Σ = S(m − B)/(B(m − 1)), S their covariance, as batches have B of the m
    samples, all different.
    """
    assert run.ledger is not None
    batch = run.ledger[law.name].batch
    assert batch is not None
    observed = np.asarray(batch.mean + batch.cross + batch.noise)
    # There is no step after the last recorded time.
    of_mean, of_each = (rate**2 * q[:-1] for q in _quadratics(run, law, data, loss))
    count = len(data[0])
    noise = (of_each - of_mean) * (count - batch_size) / (batch_size * (count - 1))
    expected = of_mean + noise
    error = np.std(observed - expected) * np.sqrt(observed.size)
    return Additions(
        float(observed.sum()), float(expected.sum()), float(of_mean.sum()), float(error)
    )


def _quadratics(
    run: Trajectory, law: Law, data: tuple[Array, Array], loss: AbstractLoss
) -> tuple[Float[np.ndarray, " times"], Float[np.ndarray, " times"]]:
    """q of the mean gradient, and the mean of q over samples, at every recorded time."""
    arrays, rest = eqx.partition(run.models, eqx.is_array)

    def at(arrays):
        def of_sample(model, x, y):
            return loss(model(x), y)

        model = eqx.combine(arrays, rest)
        each = jax.vmap(eqx.filter_grad(of_sample), (None, 0, 0))(model, *data)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), each)
        return law.quadratic(mean), jnp.mean(jax.vmap(law.quadratic)(each))

    of_mean, of_each = jax.jit(lambda a: jax.lax.map(at, a))(arrays)
    return np.asarray(of_mean), np.asarray(of_each)
