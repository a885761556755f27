"""Batches of flows whose steps have branches: a CPU makes one run after the other."""

from collections import Counter

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
START, TARGETS = jnp.array([3.0, 0.1]), jnp.array([1.0, 2.0])
ENDS = jnp.array([0.01, 0.3, 3.0])
SOLVERS = [hf.ExponentialAdams(), hf.Rodas5P(), hf.GaussLegendre()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_runs_of_a_batch_cost_what_they_cost_alone(solver):
    calls = Counter()

    def objective(w, data):
        jax.debug.callback(lambda: calls.update(gradients=1))
        return jnp.sum((w**2 - data) ** 2)

    def end(t1):
        run = hf.flow(
            START, TARGETS, t1, objective=objective, rtol=1e-4, solver=solver,
            ts=jnp.stack([0 * t1, t1]), laws=(), estimate_error=False,
        )  # fmt: skip
        return run.losses[-1]

    def how_many(run, t1) -> int:
        calls.clear()
        jax.block_until_ready(jax.jit(run)(t1))
        jax.effects_barrier()
        return calls["gradients"]

    alone = [how_many(end, t1) for t1 in ENDS]
    assert alone[0] < alone[-1]
    # What is recorded at both times may be computed for all runs at once.
    recorded = 2 * len(ENDS)
    assert sum(alone) - recorded <= how_many(jax.vmap(end), ENDS) <= sum(alone)


@pytest.mark.parametrize(
    ("mode", "solver"),
    [
        (jax.grad, hf.Diffrax(hf.Rodas5P())),
        (jax.jacfwd, hf.Diffrax(hf.Rodas5P(), adjoint=dfx.ForwardMode())),
        (jax.grad, hf.Diffrax(dfx.Tsit5())),
    ],
    ids=["implicit, reverse", "implicit, forward", "explicit, reverse"],
)
def test_derivatives_of_a_batch_are_those_of_its_runs(mode, solver):
    """Also where a run that fails would raise: of whole numbers nothing is derived."""

    def end(scale):
        run = hf.flow(
            scale * START, TARGETS, 0.5, rtol=1e-8, laws=(), ts=[0.0, 0.5],
            objective=lambda w, data: jnp.sum((w**2 - data) ** 2),
            solver=solver,
        )  # fmt: skip
        return run.losses[-1]

    scales = jnp.array([0.5, 1.0])
    slopes = jax.jit(jax.vmap(mode(end)))(scales)
    assert np.all(np.abs(slopes) > 1e-6)
    for scale, slope in zip(scales, slopes, strict=True):
        h = 1e-4
        quotient = (end(scale + h) - end(scale - h)) / (2 * h)
        np.testing.assert_allclose(slope, quotient, rtol=1e-4)
