"""`smooth`: a run without its oscillation."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._jax._arguments import check_instance, check_number
from ._single_run import check_single_run
from ._trajectory import Trajectory

#: Half a window has so many standard deviations of the Gaussian.
_DEVIATIONS = 2
#: Steps that differ by more than this part are not equally long.
_EQUAL = 1e-6


def smooth(run: Trajectory, window: float | int) -> Trajectory:
    """Averages over time: what a gradient descent that oscillates is in the mean.

    At the edge of stability weights jump from side to side with each step, by an amount
    that grows and decays over cycles of tens of steps. The midpoints
    (w_{t−1} + 2w_t + w_{t+1})/4, taken twice, are free of the first, a Gaussian over
    `window` of the second. What is left of a quantity that is not linear in the weights is
    the mean over the oscillation: a law D = wᵀAw of the averaged weights lies tr(AΣ) below
    the averaged law, Σ the covariance of the oscillation.

    **Arguments:**

    - `run`: of `homoflow.descend`, with every step recorded (`record_every=1`), one run
        outside of jit and vmap.
    - `window`: a time, in the run's units, longer than a cycle.

    **Returns:** a `homoflow.Trajectory` at those times of `run` that are half a window and
    more away from its ends. `losses`, `laws`, `squared_norms` and whatever of `observed` is
    an array of numbers at all times are means; `grad_norms` are the roots of mean squares;
    `models`, where the run saved them, and `model` have mean weights. Its ledger is left
    out.

    **Raises:** `ValueError` for a batch, for times that are not equally spaced, and for a
    window that is shorter than 8 steps or longer than the run.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    gd = hf.descend(model, (x, x[:, :1]), 400, learning_rate=0.1, save_models=True)
    mean = hf.smooth(gd, window=10.0)
    ```
    """
    check_instance(
        "run", run, Trajectory, "a trajectory, such as `homoflow.descend` has"
    )
    check_number("window", window)
    kernel = _kernel(run, float(window))
    half = kernel.size // 2
    weights = jnp.asarray(kernel, run.losses.dtype)

    def mean(values: PyTree) -> PyTree:
        return jax.tree.map(
            lambda a: _convolve(a, weights) if eqx.is_inexact_array(a) else a, values
        )

    every_time = {
        name: values
        for name, values in run.observed.items()
        if dict(run.observed_every).get(name, 1) == 1
        and all(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(values))
    }
    models, model = None, run.model
    if run.models is not None:
        # Of the models only what has changed along the run has a time axis.
        is_saved = jax.tree.map(_has_more_axes, run.models, run.model)
        moving, still = eqx.partition(run.models, is_saved)
        moving = mean(moving)
        models = eqx.combine(moving, still)
        model = eqx.combine(jax.tree.map(lambda a: a[-1], moving), still)
    return dataclasses.replace(
        run,
        ts=run.ts[half : run.ts.size - half],
        losses=mean(run.losses),
        laws=mean(run.laws),
        grad_norms=jnp.sqrt(mean(run.grad_norms**2)),
        squared_norms=mean(run.squared_norms),
        observed=mean(every_time),
        observed_every=tuple((name, 1) for name in every_time),
        model=model,
        models=models,
        events=None,
        ledger=None,
        continuation=None,
    )


def _kernel(run: Trajectory, window: float) -> np.ndarray:
    """The weights of the mean, an odd number of them."""
    check_single_run("smooth", run)
    steps = np.diff(np.asarray(run.ts, float))
    step = steps.mean()
    if np.any(np.abs(steps - step) > _EQUAL * run.ts.size * step):
        raise ValueError(
            "The times of the run are not equally spaced: record every step of a "
            "descent with a constant learning rate."
        )
    count = round(window / step) // 2
    if count < 4 or 2 * count + 5 > run.ts.size:
        raise ValueError(
            f"`window` must hold at least 8 of the run's times, and be shorter than the "
            f"run; it is {window:g}, and there are {run.ts.size} times, {step:g} apart."
        )
    at = np.arange(-count, count + 1)
    gaussian = np.exp(-0.5 * (at * _DEVIATIONS / count) ** 2)
    midpoint = np.array([1, 2, 1]) / 4
    kernel = np.convolve(np.convolve(midpoint, midpoint), gaussian)
    return kernel / kernel.sum()


def _has_more_axes(saved: PyTree, final: PyTree) -> bool:
    return eqx.is_array(saved) and saved.ndim == final.ndim + 1


def _convolve(
    values: Float[Array, "times ..."], weights: Float[Array, " kernel"]
) -> Float[Array, "fewer ..."]:
    flat = values.reshape(values.shape[0], -1)
    mean = jax.vmap(lambda column: jnp.convolve(column, weights, mode="valid"), 1, 1)(
        flat
    )
    return mean.reshape(-1, *values.shape[1:])
