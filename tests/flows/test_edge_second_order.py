"""The central flow to second order in the learning rate, and drift predicted through it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edge_net import ETA, LAWS, NET, T1, THRESHOLD, TS, X, Y
from jax.flatten_util import ravel_pytree

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")


def solve(t1=T1, **options):
    defaults = {
        "learning_rate": ETA,
        "ts": TS * t1 / T1,
        "laws": LAWS,
        "save_models": True,
        "estimate_error": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.central_flow(NET, (X, Y), t1, **{**defaults, **options})


def flat_models(run):
    return jax.vmap(lambda m: ravel_pytree(m)[0])(run.models)


def around(middle, h=0.05, **options):
    """A path recorded every `h` around a time at the edge."""
    run = solve(30.0, ts=middle + h * jnp.arange(-5.0, 6), rtol=1e-9, **options)
    assert np.all(run.observed["critical"] == 1)
    return h, run


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_below_the_edge_it_is_the_modified_flow(momentum):
    options = {"learning_rate": ETA, "momentum": momentum, "ts": TS / 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modified = hf.modified_flow(
            NET, (X, Y), 10.0, laws=LAWS, rtol=1e-10, save_models=True, **options
        )
    central = solve(10.0, momentum=momentum, order=2, rtol=1e-8)
    first = solve(10.0, momentum=momentum, rtol=1e-8)
    assert central.stats["edge_events"] == 0
    ends = flat_models(modified)
    assert np.abs(flat_models(central) - ends).max() < 1e-5
    assert np.abs(flat_models(first) - ends).max() > 1e-3
    np.testing.assert_allclose(central.losses, modified.losses, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_at_the_edge_two_derivatives_of_the_path_are_the_mean_gradient(order):
    """w' + (η/2)w″ = −∇L − ½∇⟨∇²L, Σ⟩ to O(η²), by differences of the path itself.

    To first order all of the second derivative is missing.

    Along the edge, where ∇⟨∇²L, Σ⟩ = X∇S drops out: −(w' + ∇L) without its part along ∇S
    is (η/2)w″. The slope ∇S is that of a dense eigenvalue.
    """
    h, run = around(26.0, order=order)
    before, at, after = (np.asarray(w) for w in flat_models(run)[4:7])
    speed = (after - before) / (2 * h)
    acceleration = (after - 2 * at + before) / h**2
    problem = hf.make_problem(NET, (X, Y))
    _, unravel = ravel_pytree(problem.weights)

    def loss(w):
        return problem.loss(unravel(w))

    def sharpness(w):
        return jnp.linalg.eigvalsh(jax.hessian(loss)(w))[-1]

    value, slope = jax.jit(jax.value_and_grad(sharpness))(at)
    np.testing.assert_allclose(value, THRESHOLD, rtol=1e-6)
    missing = -speed - np.asarray(jax.grad(loss)(at))
    bend = ETA / 2 * acceleration

    def along_edge(v):
        return v - (slope @ v) / (slope @ slope) * slope

    left, size = (np.linalg.norm(along_edge(v)) for v in (missing - bend, bend))
    assert size > 1e-4
    assert left < 0.2 * size if order == 2 else left > 0.9 * size


def test_descent_is_closer_to_it_than_to_the_first_order():
    """Until the oscillation sets in, after a start that is violent."""
    descent = hf.descend(
        NET, (X, Y), 200, learning_rate=ETA, save_models=True, laws=LAWS
    )
    mean = hf.smooth(descent, 1.0)
    at = np.linspace(20, 150, 11).astype(int)
    away = [
        np.linalg.norm(flat_models(run) - flat_models(mean)[at], axis=1)
        for run in (solve(20.0, ts=mean.ts[at]), solve(20.0, ts=mean.ts[at], order=2))
    ]
    assert np.all(away[1][-5:] < 0.5 * away[0][-5:])


def test_the_sharpness_stays_at_the_threshold_through_both_events():
    run = solve(order=2)
    assert run.result == hf.RESULTS.successful
    assert run.stats["edge_events"] == 2
    problem = hf.make_problem(NET, (X, Y))
    _, unravel = ravel_pytree(problem.weights)
    hessian = jax.jit(jax.hessian(lambda w: problem.loss(unravel(w))))
    for at, num in zip(flat_models(run), run.observed["critical"], strict=True):
        dense = np.linalg.eigvalsh(hessian(at))[::-1]
        assert dense[0] <= THRESHOLD * (1 + 1e-6)
        np.testing.assert_allclose(dense[: int(num)], THRESHOLD, rtol=1e-6)


def test_velocity_of_the_equation_is_that_of_the_path():
    h, run = around(26.0, order=2)
    before, at, after = flat_models(run)[4:7]
    made = hf.make_problem(NET, (X, Y))
    model = ravel_pytree(made.weights)[1](at)
    seen = (after - before) / (2 * h)

    def off(order):
        dynamics = hf.Central(ETA, order=order)
        velocity = dynamics.velocity(made, jnp.asarray(0.0), model)
        difference = np.linalg.norm(ravel_pytree(velocity)[0] - seen)
        return difference / np.linalg.norm(seen)

    assert off(2) < 1e-4
    assert off(1) > 1e-3  # The tolerance tells one from the other.


@pytest.fixture(scope="module")
def prediction():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.predict_drift(
            NET,
            (X, Y),
            T1,
            edge=True,
            learning_rate=ETA,
            ts=TS,
            laws=LAWS,
            save_models=True,
            estimate_error=False,
        )


def test_drift_through_the_edge_is_that_of_the_oscillation(prediction):
    """Against the identities: of descent's two parts, and the integral at the edge."""
    drift = prediction.drift()["matrix[second]"]
    parts = prediction.edge.parts["matrix[second]"]
    run = prediction.flow
    np.testing.assert_allclose(drift, parts.mean + parts.oscillation, atol=1e-12)
    predicted = run.observed["mean"].laws["matrix[second]"]
    atol = 1e-3 * np.abs(drift).max()  # One by the integral, one by the weights.
    np.testing.assert_allclose(drift, predicted - predicted[0], atol=atol)
    # The mean of the oscillation lies tr(AΣ) above what its motion has done.
    size = np.abs(drift[-1]).max()
    rest = np.abs(parts.oscillation - run.observed["edge_drift"]["matrix[second]"])
    assert np.abs(parts.oscillation[-1]).max() > 0.9 * size
    assert rest.max() < 0.05 * size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leading = hf.predict_drift(NET, (X, Y), T1, laws=LAWS, ts=TS).drift(ETA)
    assert np.abs(leading["matrix[second]"][-1]).max() < 0.05 * size


def test_below_the_edge_it_is_the_leading_order():
    eta = 0.005
    options = {"laws": LAWS, "ts": TS / 20}
    through = hf.predict_drift(
        NET,
        (X, Y),
        2.0,
        edge=True,
        learning_rate=eta,
        rtol=1e-8,
        estimate_error=False,
        save_models=True,
        **options,
    )
    leading = hf.predict_drift(NET, (X, Y), 2.0, **options)
    assert not np.any(through.flow.observed["critical"])
    ours, theirs = (p.drift(eta)["matrix[second]"] for p in (through, leading))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_what_a_prediction_through_the_edge_is_not_of_is_refused(prediction):
    with pytest.raises(ValueError, match=r"learning_rate 0.1, and is of no other"):
        prediction.drift(0.2)
    with pytest.raises(ValueError, match="momentum"):
        prediction.drift(momentum=0.5)
    with pytest.raises(ValueError, match="batch_size"):
        prediction.drift(batch_size=3)
    np.testing.assert_array_equal(
        prediction.drift(ETA, 0.0)["matrix[second]"],
        prediction.drift()["matrix[second]"],
    )
    with pytest.raises(ValueError, match="give `learning_rate`"):
        hf.predict_drift(NET, (X, Y), 1.0, edge=True)
    options = {"edge": True, "learning_rate": ETA}
    for name, value in (("atol", 0.0), ("dt0", 0.0), ("noise", True)):
        with pytest.raises(ValueError, match=f"there is no `{name}`"):
            hf.predict_drift(NET, (X, Y), 1.0, **options, **{name: value})


def test_leading_order_points_to_the_edge_only_beyond_it():
    flow = hf.predict_drift(NET, (X, Y), 2.0, ts=TS / 20, laws=LAWS)
    largest = float(flow.flow.observed["sharpness"].values.max())
    with pytest.warns(UserWarning, match=r"`edge=True` predicts the drift through"):
        flow.drift(2.1 / largest)
    with pytest.warns(UserWarning, match=r"unstable above 2\.$"):
        flow.drift(1.5 / largest)
    with pytest.raises(ValueError, match="to its `drift`"):
        hf.predict_drift(NET, (X, Y), 1.0, learning_rate=0.1)
    with pytest.raises(ValueError, match="no `noise`"):
        hf.predict_drift(NET, (X, Y), 1.0, edge=True, learning_rate=0.1, noise=True)
    with pytest.raises(ValueError, match="`order` must be 1 or 2"):
        hf.central_flow(NET, (X, Y), 1.0, learning_rate=0.1, order=3)
