"""Steps end on recorded times."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from homoflow._methods._landing import LandingController

TIMES = np.linspace(0, 6, 101)
#: Ends some roundings before the first of them.
FIRST_STEP = 0.06 * (1 - 1e-15)


def decay(controller) -> dfx.Solution:
    """y' = −y, with saved steps."""
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -y), dfx.Tsit5(), 0.0, 6.0, FIRST_STEP, jnp.ones(()),
        saveat=dfx.SaveAt(steps=True), stepsize_controller=controller, throw=False,
    )  # fmt: skip


def clipped(factormax) -> dfx.ClipStepSizeController:
    eps = jnp.finfo(jnp.result_type(float)).eps
    inner = dfx.PIDController(1e-6, 1e-6, factormax=factormax, dtmin=6 * eps)
    return dfx.ClipStepSizeController(inner, step_ts=jnp.asarray(TIMES))


@pytest.mark.parametrize("factormax", [1.0, 10.0])
def test_every_time_is_the_end_of_a_step(factormax):
    solution = decay(LandingController(clipped(factormax)))
    assert solution.result == dfx.RESULTS.successful
    ends = np.asarray(solution.ts)[: int(solution.stats["num_steps"])]
    gaps = np.min(np.abs(TIMES[1:, None] - ends), axis=1)
    assert gaps.max() < 1e-15
    assert np.diff(ends).min() > 1e-3
    np.testing.assert_allclose(solution.ys[len(ends) - 1], np.exp(-6.0), rtol=1e-6)


def test_clipping_alone_leaves_a_rounding_to_step_over():
    """The negative control."""
    assert decay(clipped(1.0)).result != dfx.RESULTS.successful


def test_no_step_is_made_much_longer():
    """And of the last time on there is nothing to land on."""
    inner = dfx.PIDController(1e-6, 1e-6, factormax=1.0)
    times = jnp.array([0.0605, 0.2])
    clip = dfx.ClipStepSizeController(inner, step_ts=times)
    ends = np.asarray(decay(LandingController(clip)).ts)[:5]
    np.testing.assert_allclose(ends[:2], [0.0605, 0.121], rtol=1e-12)
    assert ends[3] == pytest.approx(0.2)
    assert ends[4] > 0.2


def test_under_vmap_and_in_single_precision():
    def end(rate):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -rate * y), dfx.Tsit5(), 0.0, 6.0, FIRST_STEP,
            jnp.ones(()), stepsize_controller=LandingController(clipped(1.0)),
        )  # fmt: skip
        return solution.ys[-1]

    rates = jnp.array([0.5, 1.0])
    np.testing.assert_allclose(jax.vmap(end)(rates), jnp.exp(-6 * rates), rtol=1e-6)
