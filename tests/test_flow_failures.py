"""A flow that cannot finish says so, names the time reached, and hands over no number."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_regression, relu_regression, saved

import homoflow as hf

#: For every run of `regression_flow` below: too few for the stiff problem only.
FEW_STEPS = 90


def observables(trajectory: hf.Trajectory) -> np.ndarray:
    """Everything recorded over time, one row for each time."""
    t = trajectory
    recorded = (t.losses, t.laws, t.grad_norms, t.squared_norms, t.models)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(recorded)]
    return np.concatenate([leaf.reshape(len(t.ts), -1) for leaf in leaves], axis=1)


def assert_known_until_failure(trajectory: hf.Trajectory, result) -> None:
    """Numbers up to the time reached, NaN after it, and a result that is no success."""
    assert trajectory.result == result
    reached = float(trajectory.stats["time_reached"])
    assert 0 < reached < trajectory.ts[-1]
    known = np.asarray(trajectory.ts) <= reached
    values = observables(trajectory)
    assert np.all(np.isfinite(values[known]))
    assert np.all(np.isnan(values[~known]))


def stiff_regression(stiffness: float):
    """Linear regression whose Hessian has eigenvalues 1, √stiffness and stiffness."""
    model, (x, y) = linear_regression()
    directions = np.linalg.qr(np.asarray(x))[0] * np.sqrt(len(x))
    x = directions * stiffness ** np.array([0, 0.25, 0.5])
    return model, (jnp.asarray(x), y)


def exact_weights(stiffness: float, ts) -> np.ndarray:
    model, (x, y) = stiff_regression(stiffness)
    x, y = np.asarray(x), np.asarray(y)
    optimum = (np.linalg.pinv(x) @ y).T
    gap = np.asarray(model.layers[0].weight) - optimum
    rates = np.diag(x.T @ x) / len(x)  # The columns are orthogonal.
    return optimum + gap * np.exp(-rates * np.asarray(ts)[:, None, None])


def regression_flow(stiffness: float = 1.0, t1: float = 5.0, **options):
    options = {
        "max_steps": FEW_STEPS,
        "save_models": True,
        "ts": np.geomspace(1e-6, t1, 20),
        **options,
    }
    return hf.flow(*stiff_regression(stiffness), t1, **options)


def test_too_few_steps_for_a_stiff_problem_without_throw():
    flow = regression_flow(stiffness=1e6, throw=False)
    assert_known_until_failure(flow, hf.RESULTS.max_steps_reached)
    assert flow.stats["steps"] + flow.stats["rejected_steps"] == FEW_STEPS
    known = np.asarray(flow.ts) <= float(flow.stats["time_reached"])
    assert np.sum(known) > 5
    weights = np.asarray(saved(flow).layers[0].weight)[known]
    exact = exact_weights(1e6, np.asarray(flow.ts)[known])
    np.testing.assert_allclose(weights, exact, rtol=0, atol=1e-5)


def test_too_few_steps_with_throw_raises_and_keeps_what_was_computed():
    with pytest.raises(hf.TrajectoryError, match="Kvaerno5") as caught:
        regression_flow(stiffness=1e6)
    kept = caught.value.trajectory
    assert_known_until_failure(kept, hf.RESULTS.max_steps_reached)
    assert f"t = {float(kept.stats['time_reached']):.6g}" in str(caught.value)


def test_implicit_solver_finishes_where_the_explicit_one_ran_out_of_steps():
    # An explicit one would need about 1e6 · 5 / 3.3 steps.
    flow = regression_flow(
        stiffness=1e6, solver=dfx.Kvaerno5(), rtol=1e-6, max_steps=1000
    )
    exact = exact_weights(1e6, [5.0])[0]
    np.testing.assert_allclose(flow.model.layers[0].weight, exact, rtol=0, atol=1e-5)
    assert flow.stats["gradient_evaluations"] is None


def test_error_estimate_is_nan_when_one_of_the_two_solves_fails():
    def flow(**options):
        return regression_flow(stiffness=30.0, estimate_error=True, **options)

    known = flow(rtol=1e-6)
    assert known.stats["error_estimate"] > 0
    assert known.stats["loss_error_estimate"] > 0
    unknown = flow(rtol=1e-13, throw=False)
    assert unknown.result == hf.RESULTS.max_steps_reached
    assert np.isnan(unknown.stats["error_estimate"])
    assert np.isnan(unknown.stats["loss_error_estimate"])


def falling_quartic(w, scale):
    return -scale * jnp.sum(w**4) / 4


@pytest.mark.parametrize("start", [1.0, 2.0])
def test_blow_up_in_finite_time_is_named_with_its_time(start):
    # dw/dt = w³ from w₀ is w₀ / √(1 − 2w₀²t): it ends at t = 1 / (2w₀²).
    end = 0.5 / start**2
    with pytest.raises(hf.TrajectoryError) as caught:
        hf.flow(jnp.array([start]), jnp.ones(()), 1.0, objective=falling_quartic)
    kept = caught.value.trajectory
    # Rounding decides which comes first: weights that overflow, or steps that the clock
    # cannot resolve.
    overflows = kept.result == hf.RESULTS.nonfinite
    assert overflows or kept.result == hf.RESULTS.step_size_too_small
    assert "run off to infinity" in str(caught.value)
    assert kept.stats["rejected_steps"] < 1000
    reached = float(kept.stats["time_reached"])
    assert abs(reached - end) < 1e-3 * end
    assert f"t = {reached:.6g}" in str(caught.value)
    before = np.asarray(kept.ts) < 0.99 * end
    exact = -(start**4) / (4 * (1 - 2 * start**2 * np.asarray(kept.ts)[before]) ** 2)
    np.testing.assert_allclose(kept.losses[before], exact, rtol=1e-4)
    assert np.all(np.isnan(np.asarray(kept.losses)[np.asarray(kept.ts) > end]))


def test_the_same_objective_ends_well_before_its_blow_up():
    flow = hf.flow(jnp.array([1.0]), jnp.ones(()), 0.4, objective=falling_quartic)
    np.testing.assert_allclose(flow.model, [1 / np.sqrt(0.2)], rtol=1e-7)


def euler_flow(dt0: float, **options) -> hf.Trajectory:
    t1 = 1000 * dt0
    return regression_flow(
        t1=t1, solver=dfx.Euler(), dt0=dt0, ts=np.linspace(0, t1, 1001),
        max_steps=1001, **options,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [3.0, 1e6])
def test_constant_step_beyond_stability_is_reported_as_non_finite(factor):
    # On a quadratic with λ_max = 1 Euler's error is multiplied by 1 − h each step.
    dt0 = 1 + factor
    flow = euler_flow(dt0, throw=False)
    assert_known_until_failure(flow, hf.RESULTS.nonfinite)
    # The loss, the error's square, overflows first.
    steps_to_overflow = np.log(np.finfo(float).max) / (2 * np.log(factor))
    steps = float(flow.stats["time_reached"]) / dt0
    assert 0.9 * steps_to_overflow < steps < 1.1 * steps_to_overflow


def test_constant_step_within_stability_finishes():
    flow = euler_flow(1.5)
    optimum = exact_weights(1.0, [np.inf])[0]
    np.testing.assert_allclose(flow.model.layers[0].weight, optimum, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_default_method_never_stalls_on_kinks():
    # An adaptive solver chatters on sliding kinks, with steps of about rtol: here that
    # would be 1e12 of them.
    flow = hf.flow(*relu_regression(), 10.0, rtol=1e-12, solver=hf.Averaged())
    assert flow.stats["steps"] + flow.stats["rejected_steps"] <= 100_000
    assert np.all(np.isfinite(observables(flow)))


def test_compare_says_that_a_run_did_not_finish():
    finished = regression_flow()
    failed = regression_flow(stiffness=1e6, throw=False)
    (note,) = hf.compare(finished, failed).notes
    reached = float(failed.stats["time_reached"])
    assert note.startswith(f"b did not finish (it got to t = {reached:g}).")
    assert hf.compare(finished, finished).notes == ()
