"""The central flow: against closed forms, a dense integration, and gradient descent."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from edge_net import ETA, LAWS, NET, T1, THRESHOLD, TS, X, Y
from jax.flatten_util import ravel_pytree

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")


def products(point):
    """⟨∇L, dw/dτ⟩ + ‖dw/dτ‖², relative to ‖∇L‖²: 0 for a projection of −∇L."""
    g, v = (ravel_pytree(tree)[0] for tree in (point.gradient, point.velocity))
    return (g @ v + v @ v) / (g @ g)


def solve(t1=T1, eta=ETA, **options):
    defaults = {
        "ts": TS * t1 / T1,
        "laws": LAWS,
        "save_models": True,
        "observe": {"products": products},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.central_flow(
            NET, (X, Y), t1, learning_rate=eta, **{**defaults, **options}
        )


@pytest.fixture(scope="module")
def problem():
    made = hf.make_problem(NET, (X, Y))
    _, unravel = ravel_pytree(made.weights)
    loss = jax.jit(lambda w: made.loss(unravel(w)))
    return loss, jax.jit(jax.hessian(loss)), unravel


@pytest.fixture(scope="module")
def run():
    return solve()


def flat_models(run):
    return jax.vmap(lambda m: ravel_pytree(m)[0])(run.models)


def test_the_sharpness_stays_at_the_threshold_and_no_eigenvalue_exceeds_it(
    run, problem
):
    """Against dense eigenvalues; two of them come to the edge on the way."""
    critical = np.asarray(run.observed["critical"])
    assert list(np.unique(critical)) == [0, 1, 2]
    assert run.stats["edge_events"] == 2
    for at, num, known in zip(
        flat_models(run), critical, run.observed["spectrum"], strict=True
    ):
        dense = np.linalg.eigvalsh(problem[1](at))[::-1]
        assert dense[0] <= THRESHOLD * (1 + 1e-6)
        np.testing.assert_allclose(dense[:num], THRESHOLD, rtol=1e-6)
        np.testing.assert_allclose(known[: num + 1], dense[: num + 1], rtol=1e-6)
        assert np.all(np.isnan(known[num + 1 :]))


def test_the_loss_falls_by_the_square_of_the_speed(run):
    assert np.max(np.abs(run.observed["products"])) < 1e-12
    assert np.all(np.diff(run.losses) < 0)


def test_the_oscillation_lives_on_eigenvalues_at_the_edge(run):
    sizes = np.asarray(run.observed["oscillation"])
    for num, at in zip(np.asarray(run.observed["critical"]), sizes, strict=True):
        assert np.all(at[:num] > 0)
        np.testing.assert_allclose(at[num:], 0, atol=1e-12)
    mean = run.observed["mean"]
    np.testing.assert_allclose(
        mean.losses, run.losses + THRESHOLD * sizes.sum(1) / 2, rtol=1e-12
    )


def test_laws_move_by_the_integral_of_the_trace(run):
    """D(τ) − D(0) = ∫2·threshold·tr(AΣ): to the tolerance, at two of them."""

    def defect(run):
        moved = run.laws["matrix[second]"] - run.laws["matrix[second]"][0]
        return np.abs(moved - run.observed["edge_drift"]["matrix[second]"]).max()

    finer = solve(rtol=1e-7, estimate_error=False)
    moved = np.abs(run.laws["matrix[second]"][-1] - run.laws["matrix[second]"][0]).max()
    assert moved > 0.5
    assert defect(run) < 1e-3 * moved
    assert defect(finer) < 0.1 * defect(run)
    error = np.linalg.norm(flat_models(run)[-1] - flat_models(finer)[-1])
    error /= np.linalg.norm(flat_models(finer)[-1])
    assert error < float(run.stats["error_estimate"])


def dense_projected_euler(problem, t1, length):
    """Small steps with dense eigenvalues, each ending at the threshold or below.

    For one eigenvalue there, the sharpest one: v = −∇L − x∇S with the least x ≥ 0 for which
    S + h⟨∇S, v⟩ is at most the threshold. Shares no code with what it tests.
    """
    loss, hessian, _ = problem

    def sharpness(w):
        return jnp.linalg.eigvalsh(hessian(w))[-1]

    def step(w, _):
        top, slope = jax.value_and_grad(sharpness)(w)
        gradient = jax.grad(loss)(w)
        excess = (top - THRESHOLD) / length - slope @ gradient
        x = jnp.maximum(excess / (slope @ slope), 0)
        return w - length * (gradient + x * slope), None

    w0 = ravel_pytree(NET)[0]
    run = jax.jit(lambda w: jax.lax.scan(step, w, None, length=round(t1 / length))[0])
    return run(w0)


def test_small_projected_steps_converge_to_it_at_first_order(problem):
    """Up to t = 25, where one eigenvalue is at the edge."""
    flow = solve(25.0, rtol=1e-7, estimate_error=False)
    assert flow.observed["critical"][-1] == 1
    end = flat_models(flow)[-1]
    errors = [
        np.linalg.norm(dense_projected_euler(problem, 25.0, h) - end)
        for h in (ETA / 2, ETA / 4)
    ]
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert errors[1] < 2e-3 * np.linalg.norm(end)


def test_below_the_edge_it_is_the_gradient_flow():
    flow = hf.flow(NET, (X, Y), 10.0, ts=TS / 4, laws=LAWS, rtol=1e-9)
    central = solve(10.0, rtol=1e-7, estimate_error=False)
    assert central.stats["edge_events"] == 0
    np.testing.assert_allclose(central.losses, flow.losses, rtol=1e-6)
    np.testing.assert_allclose(
        ravel_pytree(central.model)[0], ravel_pytree(flow.model)[0], atol=1e-5
    )
    assert not np.any(central.observed["oscillation"])


def test_momentum_moves_the_threshold(problem):
    central = solve(eta=1.5 * ETA, momentum=0.5)
    dense = np.linalg.eigvalsh(problem[1](flat_models(central)[-1]))
    np.testing.assert_allclose(dense[-1], THRESHOLD, rtol=1e-6)
    # The same flow of the mean: only what each step adds to the laws differs.
    np.testing.assert_allclose(central.losses, solve().losses, rtol=1e-6)


def test_large_momentum_is_warned_of():
    """Its steps are long in units of the oscillation's growth: descent ends elsewhere."""
    mu = 0.9
    eta = ETA * (1 + mu)
    options = {"laws": LAWS, "save_models": True, "observe": {"products": products}}
    with pytest.warns(UserWarning, match="steps fall behind the flow"):
        central = hf.central_flow(
            NET, (X, Y), T1, learning_rate=eta, momentum=mu, ts=TS, **options
        )
    descent = hf.descend(
        NET,
        (X, Y),
        round(T1 * (1 - mu) / eta),
        learning_rate=eta,
        optimizer=functools.partial(optax.sgd, momentum=mu),
        laws=LAWS,
    )
    ends = [ravel_pytree(run.model)[0] for run in (central, descent)]
    assert np.linalg.norm(ends[1] - ends[0]) > 0.2 * np.linalg.norm(ends[0])


def test_too_many_eigenvalues_at_the_edge_end_the_run():
    crowded = solve(max_critical=1, throw=False)
    assert crowded.result == hf.RESULTS.edge_crowded
    known = np.isfinite(crowded.losses)
    assert known[0]
    assert not known[-1]
    np.testing.assert_allclose(crowded.losses[known], solve().losses[known], rtol=1e-6)


class Scalar(eqx.Module):
    x: jax.Array
    y: jax.Array


def scalar_objective(model, _):
    return (model.x * model.y - 10) ** 2 / 2


def scalar_start(threshold):
    """A start below the edge whose gradient flow would end beyond it."""
    law = (np.sqrt(threshold**2 - 400) + threshold - 100 / threshold) / 2
    return Scalar(jnp.full_like(threshold, 1e-3), jnp.sqrt(jnp.asarray(law)))


def test_scalar_factorization_ends_at_the_closed_form():
    """L = (xy − 10)²/2: it ends at xy = 10 and x² + y² = 2/η, where y² − x² is known."""
    thresholds = jnp.asarray([20.5, 21, 22, 24, 28, 32, 40, 50, 60, 80])

    def end(model, threshold):
        run = hf.central_flow(
            model,
            None,
            400.0,
            learning_rate=2 / threshold,
            objective=scalar_objective,
            laws=(),
            ts=[400.0],
            rtol=1e-8,
            estimate_error=False,
        )
        return run.model, run.result == hf.RESULTS.successful

    models, successful = eqx.filter_jit(jax.vmap(end))(
        scalar_start(thresholds), thresholds
    )
    assert np.all(successful)
    law = models.y**2 - models.x**2
    np.testing.assert_allclose(law, np.sqrt(thresholds**2 - 400), atol=1e-7)


def test_what_descent_does_not_follow_is_warned_of():
    """The scalar net is at the edge for three steps: descent ends at another law."""
    threshold = jnp.asarray(22.0)
    options = {"objective": scalar_objective, "laws": (), "ts": [40.0]}
    model, eta = scalar_start(threshold), 2 / 22
    with pytest.warns(UserWarning, match="cycles"):
        central = hf.central_flow(model, None, 40.0, learning_rate=eta, **options)
    del options["ts"]
    descent = hf.descend(model, None, 440, learning_rate=eta, **options)
    laws = [float(m.y**2 - m.x**2) for m in (central.model, descent.model)]
    np.testing.assert_allclose(laws[0], np.sqrt(22**2 - 400), rtol=1e-4)
    assert abs(laws[1] - laws[0]) > 1


def test_linear_regression_beyond_its_edge_has_no_central_flow():
    """Its sharpness is constant: no way leads back below the threshold."""
    model = hf.MLP((2, 2), activation="linear", key=jax.random.key(0))
    top = float(hf.sharpness(model, (X, Y[:, :2])))
    options = {"ts": [1.0], "max_critical": 1, "rtol": 1e-7, "estimate_error": False}
    run = hf.central_flow(
        model, (X, Y[:, :2]), 1.0, learning_rate=2.1 / top, throw=False, **options
    )
    assert run.result == hf.RESULTS.beyond_edge
    with pytest.raises(hf.TrajectoryError, match="beyond the edge"):
        hf.central_flow(model, (X, Y[:, :2]), 1.0, learning_rate=2.1 / top, **options)
    below = hf.central_flow(
        model, (X, Y[:, :2]), 1.0, learning_rate=1.9 / top, **options
    )
    flow = hf.flow(model, (X, Y[:, :2]), 1.0)
    np.testing.assert_allclose(below.losses[-1], flow.losses[-1], rtol=1e-5)


def test_what_cannot_be_done_is_refused():
    relu = hf.MLP((2, 4, 3), key=jax.random.key(0))
    with pytest.raises(ValueError, match="three derivatives"):
        hf.central_flow(relu, (X, Y), 1.0, learning_rate=0.1)
    with pytest.raises(ValueError, match="AlongEdge"):
        hf.flow(NET, (X, Y), 1.0, dynamics=hf.Central(0.1))
    with pytest.raises(ValueError, match="central flow alone"):
        hf.flow(NET, (X, Y), 1.0, solver=hf.AlongEdge())
    with pytest.raises(ValueError, match="project=True"):
        hf.flow(
            NET,
            (X, Y),
            1.0,
            dynamics=hf.Central(0.1),
            solver=hf.AlongEdge(),
            project=True,
        )
    with pytest.raises(ValueError, match="max_critical"):
        hf.Central(0.1, max_critical=0)
    with pytest.raises(ValueError, match="learning"):
        hf.central_flow(NET, (X, Y), 1.0, learning_rate=-0.1)
    with pytest.raises(ValueError, match="finite differences"):
        jax.grad(lambda eta: solve(eta=eta).losses[-1])(0.1)


def test_float32_weights_are_followed_in_float64(run):
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32), NET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = hf.central_flow(
            narrow,
            (X.astype(jnp.float32), Y.astype(jnp.float32)),
            T1,
            learning_rate=ETA,
            ts=TS.astype(jnp.float32),
            laws=LAWS,
            save_models=True,
            observe={"products": products},
        )
    assert again.losses.dtype == jnp.float32
    np.testing.assert_allclose(again.losses, run.losses, rtol=1e-4)
    assert "float64" in again.stats["computed_in"]


def test_velocity_of_the_equation_is_that_of_the_flow(run, problem):
    """Found anew from the weights alone, at each recorded time."""
    made = hf.make_problem(NET, (X, Y))
    velocity = jax.jit(
        lambda w: ravel_pytree(hf.Central(ETA).velocity(made, jnp.asarray(0.0), w))[0]
    )
    for index in (0, 5, 10):
        model = jax.tree.map(lambda a, i=index: a[i], run.models)
        found = velocity(model)
        gradient = jax.grad(problem[0])(ravel_pytree(model)[0])
        num = int(run.observed["critical"][index])
        if num == 0:
            np.testing.assert_allclose(found, -gradient, atol=1e-12)
        speed = float(found @ found)
        mean = run.observed["mean"].grad_norms[index] ** 2
        total = float(np.sum(run.observed["oscillation"][index]))
        np.testing.assert_allclose(speed, mean - THRESHOLD**2 * total, rtol=1e-3)
