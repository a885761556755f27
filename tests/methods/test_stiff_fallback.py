"""What `flow` does where stability holds up the explicit solver that it began with."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from problems import flat

import homoflow as hf

TS = [0.0, 3.0, 3000.0]
#: Sharp and flat directions of the Hessian: stability asks for 3,000 steps and more.
CURVATURES = np.array([6.0, 1.0, 1e-3])


@pytest.fixture(scope="module")
def problem():
    """A convex quadratic: one linear layer, with a closed-form flow."""
    model = hf.MLP((3, 1), activation="linear", key=jr.key(0))
    x = jnp.diag(jnp.sqrt(3 * CURVATURES))
    return model, (x, jr.normal(jr.key(1), (3, 1)))


def closed_form(model, data, t):
    """w* + e^{−Ht}(w − w*)."""
    x, y = map(np.asarray, data)
    best = np.linalg.solve(x, y)
    w = flat(model)[:, None]
    return (best + scipy.linalg.expm(-t * x.T @ x / len(x)) @ (w - best)).ravel()


@pytest.fixture(scope="module")
def changed(problem):
    return hf.flow(*problem, TS[-1], ts=TS, rtol=1e-8, save_models=True)


def test_a_stiff_flow_is_begun_again(problem, changed):
    assert changed.stats["solver"] == "ExponentialAdams"
    assert changed.stats["solver_reason"].code == "stiff_restart"
    weights = np.asarray(changed.models.layers[0].weight).reshape(3, 3)
    for t, w in zip(TS, weights, strict=True):
        truth = closed_form(*problem, t)
        assert np.linalg.norm(w - truth) < 1e-7 * np.linalg.norm(truth)


def test_it_is_what_would_have_been_asked_for_and_costs_more(problem, changed):
    asked = hf.flow(*problem, TS[-1], ts=TS, rtol=1e-8, solver=hf.ExponentialAdams())
    np.testing.assert_array_equal(flat(changed.model), flat(asked.model))
    first = hf.flow(
        *problem, TS[-1], ts=TS, rtol=1e-8, solver=dfx.Dopri8(),
        max_steps=1000 + len(TS),
        throw=False,
    )  # fmt: skip
    assert first.result == hf.RESULTS.max_steps_reached
    counts = [int(run.stats["gradient_evaluations"]) for run in (changed, first, asked)]
    # Dopri8 was given up long before it had taken all of its steps.
    assert counts[2] < counts[0] < counts[2] + counts[1] / 5
    assert counts[1] > 10_000 > 10 * counts[2]


def test_a_short_flow_ends_with_the_solver_it_began_with(problem):
    short = hf.flow(*problem, 3.0, rtol=1e-8)
    assert short.stats["solver"] == "Dopri8"
    np.testing.assert_allclose(flat(short.model), closed_form(*problem, 3.0), rtol=1e-7)


@pytest.mark.parametrize(("rtol", "solver"), [(1e-5, "Tsit5"), (9e-6, "Dopri8")])
def test_order_by_tolerance(problem, rtol, solver):
    run = hf.flow(*problem, 3.0, rtol=rtol)
    assert run.stats["solver"] == solver
    error = np.linalg.norm(flat(run.model) - closed_form(*problem, 3.0))
    assert error < 10 * rtol


def test_no_number_decides_inside_of_jit_and_vmap(problem):
    model, data = problem

    @eqx.filter_jit
    def inside(model):
        return hf.flow(model, data, TS[-1], ts=TS, rtol=1e-8, throw=False)

    run = inside(model)
    assert run.stats["solver"] == "Dopri8"
    assert run.result == hf.RESULTS.successful
    models = jax.tree.map(lambda a: jnp.stack([a, a]) if eqx.is_array(a) else a, model)
    both = eqx.filter_vmap(inside)(models)
    assert both.stats["solver"] == "Dopri8"


@pytest.mark.parametrize(
    "options", [{"max_steps": 500}, {"solver": dfx.Dopri8(), "max_steps": 1001}]
)
def test_what_was_asked_for_is_not_exceeded(problem, options):
    run = hf.flow(*problem, TS[-1], ts=TS, rtol=1e-8, throw=False, **options)
    assert run.stats["solver"] == "Dopri8"
    assert run.result == hf.RESULTS.max_steps_reached


class DiagonalNet(eqx.Module):
    """β·x with β = u² − v²."""

    u: jax.Array
    v: jax.Array

    def __call__(self, x):
        return jnp.sum((self.u**2 - self.v**2) * x, keepdims=True)


def diagonal_flow(x, y, size, ts):
    """β of the flow from u = v = `size`, and the error that SciPy's tolerance leaves.

    With M = −∫∂L/∂β dt the flow has u = s·e^{2M} and v = s·e^{−2M}. So it is an equation
    for M, whose entries are of order one in the logarithm of 1/s.
    """

    def beta(m):
        return np.exp(2 * np.log(size) + 4 * m) - np.exp(2 * np.log(size) - 4 * m)

    def velocity(t, m):
        return -x.T @ (x @ beta(m) - y) / len(y)

    def jacobian(t, m):
        growth = np.exp(2 * np.log(size) + 4 * m) + np.exp(2 * np.log(size) - 4 * m)
        return -4 * x.T @ x / len(y) * growth

    with np.errstate(over="ignore", invalid="ignore"):  # Radau tries too long steps.
        run = scipy.integrate.solve_ivp(
            velocity, (0, ts[-1]), np.zeros(x.shape[1]), "Radau", t_eval=ts,
            jac=jacobian, rtol=1e-11, atol=1e-11,
        )  # fmt: skip
    return beta(run.y).T


@pytest.mark.parametrize("size", [1e-60, 1e-150])
def test_saddle_to_saddle_from_a_vanishing_start(size):
    """Four weights that differ by up to 300 orders of magnitude."""
    x = np.array([[1, 0.5, 0.7, 0], [0.5, 1, 0.1, 0.7]])
    y = np.array([1.0, 0.0])
    start = jnp.full(4, size)
    # The saddles are left at multiples of log(1/s): here one is, and there another.
    ts = -np.log(size) * np.array([0, 1.03, 3, 5.5, 20])
    problem = DiagonalNet(start, start), (jnp.asarray(x), jnp.asarray(y)[:, None])
    run = hf.flow(*problem, ts[-1], ts=ts, save_models=True)
    assert run.result == hf.RESULTS.successful
    assert run.stats["solver"] == "Rodas5P"
    assert run.stats["solver_reason"].code == "vanishing_start"
    assert run.stats["gradient_evaluations"] < 5_000
    exact = diagonal_flow(x, y, size, ts)
    beta = np.asarray(run.models.u**2 - run.models.v**2)
    np.testing.assert_allclose(beta, exact, atol=1e-6)
    np.testing.assert_array_equal(run.ts, ts)
    misfit = exact @ x.T - y
    np.testing.assert_allclose(run.losses, np.sum(misfit**2, 1) / 4, atol=1e-6)
    # Where states of the weights themselves are looked at they hold up Adams, too.
    seen = {"u": lambda point: point.state.u}
    plain = hf.flow(*problem, ts[-1], ts=ts, observe=seen)
    assert plain.stats["solver_reason"].code == "few_weights_restart"
    np.testing.assert_allclose(plain.observed["u"], run.models.u, atol=1e-6)
    end = hf.flow(*problem, np.inf)
    assert end.stats["solver_reason"].code == "vanishing_start"
    assert end.stats["gradient_evaluations"] < 5_000
    assert end.stats["stationary_kind"] == hf.StationaryKind.minimum
    for model in (run.model, end.model):
        found = model.u**2 - model.v**2
        np.testing.assert_allclose(found, [0, 0, 10 / 7, -10 / 49], atol=1e-8)
