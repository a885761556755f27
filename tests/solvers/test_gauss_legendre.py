"""`GaussLegendre`: orders, quadratic laws at any step size, stiff decay, failure.

Oracles: Butcher's simplifying assumptions, SciPy's DOP853, closed forms, finite
differences; and an explicit method that must not conserve what this one does.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import homoflow as hf
from homoflow._solvers._gauss_legendre import _tableau

ALL = [hf.GaussLegendre(s) for s in (1, 2, 3)]
FIXED = hf.GaussLegendre(2, iteration="fixed point")


def driven(t, y, args):
    """Nonlinear, dependent on time, with a Jacobian that is not symmetric, on a tree."""
    del args
    u, v = y["u"], y["v"][0]
    slope = jnp.cos(3 * t) * v - u**3, jnp.sin(u) * jnp.exp(-t) - 2 * v
    return {"u": slope[0], "v": slope[1][None]}


START = {"u": jnp.array(1.0), "v": jnp.array([0.7])}


def solved(field, solver, y0, t1, h, ts=None, **options):
    saveat = dfx.SaveAt(t1=True) if ts is None else dfx.SaveAt(ts=ts)
    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver, 0.0, t1, h, y0, saveat=saveat, **options
    )


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_coefficients_are_those_of_gauss(stages):
    nodes, a, b, *_ = _tableau(stages)
    k = np.arange(1, 2 * stages + 1)
    np.testing.assert_allclose(b @ nodes[:, None] ** (k - 1), 1 / k, rtol=1e-14)
    k = np.arange(1, stages + 1)
    powers = nodes[:, None] ** k / k
    np.testing.assert_allclose(
        a @ nodes[:, None] ** (k - 1), powers, rtol=0, atol=1e-15
    )
    # What conserves quadratic quantities.
    m = b[:, None] * a + (b[:, None] * a).T - np.outer(b, b)
    np.testing.assert_allclose(m, 0, atol=1e-16)


@pytest.mark.parametrize("solver", [*ALL, FIXED], ids=["1", "2", "3", "2 fixed point"])
def test_orders(solver):
    ts = np.append((np.arange(16) + 0.37) / 16.5, 1.0)
    exact = solve_ivp(
        lambda t, y: [
            np.cos(3 * t) * y[1] - y[0] ** 3,
            np.sin(y[0]) * np.exp(-t) - 2 * y[1],
        ],
        (0, 1), [1.0, 0.7], "DOP853", t_eval=ts, rtol=1e-13, atol=1e-15,
    ).y  # fmt: skip
    run = jax.jit(lambda h: solved(driven, solver, START, 1.0, h, jnp.asarray(ts)).ys)
    at_end, between = [], []
    for steps in (4, 8, 16):
        ys = run(1.0 / steps)
        errors = np.abs(np.stack([ys["u"], ys["v"][:, 0]]) - exact).max(axis=0)
        at_end.append(errors[-1])
        between.append(errors[:-1].max())
    slopes = [
        np.polyfit(np.log([4, 8, 16]), np.log(e), 1)[0] for e in (at_end, between)
    ]
    assert abs(-slopes[0] - 2 * solver.stages) < 0.3
    assert abs(-slopes[1] - min(solver.stages + 1, 2 * solver.stages)) < 0.4


def network_flow(dtype=jnp.float64):
    model = hf.MLP((3, 4, 4, 2), activation="linear", key=jr.key(0), dtype=dtype)
    x = jr.normal(jr.key(1), (20, 3), dtype)
    y = jnp.sin(x[:, :2])

    def field(t, w, args):
        del t, args
        loss = lambda m: jnp.mean((jax.vmap(m)(x) - y) ** 2)  # noqa: E731
        return jax.tree.map(jnp.negative, jax.grad(loss)(w))

    return model, field


def drift_at(solver, h, dtype=jnp.float64) -> float:
    model, field = network_flow(dtype)
    t1, h = jnp.asarray(30 * h, dtype), jnp.asarray(h, dtype)
    end = jax.jit(lambda w: solved(field, solver, w, t1, h).ys)(model)
    laws = hf.laws(model)
    size = sum(float(jnp.sum(layer.weight**2)) for layer in model.layers)
    pairs = (
        (law.value(model), law.value(jax.tree.map(lambda a: a[0], end))) for law in laws
    )
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) / size


@pytest.mark.parametrize("solver", ALL, ids=["1", "2", "3"])
def test_laws_hold_to_rounding_at_large_steps(solver):
    assert drift_at(solver, 0.1) < 2e-15


def test_what_is_not_gauss_does_not_conserve_and_float32_has_its_own_rounding():
    assert drift_at(dfx.Heun(), 0.1) > 1e-4
    assert drift_at(FIXED, 0.1) < 2e-15
    assert drift_at(hf.GaussLegendre(2), 0.1, jnp.float32) < 5e-6


#: Numerators of their stability functions N(z) / N(−z), which are Padé's.
PADE = {1: (1, 1 / 2), 2: (1, 1 / 2, 1 / 12), 3: (1, 1 / 2, 1 / 10, 1 / 120)}


@pytest.mark.parametrize("solver", ALL, ids=["1", "2", "3"])
def test_decay_is_pades_also_far_beyond_the_stability_of_explicit_methods(solver):
    rates = jnp.array([1e4, 1.0])
    run = jax.jit(
        lambda y: solved(lambda t, y, _: -rates * y, solver, y, 2.0, 0.1).ys[0]
    )
    numerator = np.polynomial.Polynomial(PADE[solver.stages])
    factor = numerator(-0.1 * rates) / numerator(0.1 * rates)
    assert np.all(np.abs(factor) < 1)
    np.testing.assert_allclose(run(jnp.ones(2)), factor**20, rtol=1e-9)


def test_adaptive_steps_meet_the_tolerance_and_batches_are_their_runs():
    controller = dfx.PIDController(rtol=1e-6, atol=1e-6)

    def end(y):
        solver = hf.GaussLegendre(3)
        return solved(driven, solver, y, 1.0, None, stepsize_controller=controller).ys

    starts = {"u": jnp.array([1.0, 0.2]), "v": jnp.array([[0.7], [-1.0]])}
    batch = jax.jit(jax.vmap(end))(starts)
    exact = jax.jit(lambda y: solved(driven, dfx.Dopri8(), y, 1.0, 0.01).ys)(START)
    np.testing.assert_allclose(batch["u"][0], exact["u"], atol=1e-6)
    np.testing.assert_allclose(batch["v"][0], exact["v"], atol=1e-6)


def test_an_iteration_that_fails_is_reported():
    """Fixed-point iteration diverges beyond 1/λ; u' = u² + 100 has poles."""
    stiff = lambda t, y, _: -1e3 * y  # noqa: E731
    run = solved(stiff, FIXED, jnp.ones(2), 1.0, 0.1, throw=False)
    assert run.result == dfx.RESULTS.nonlinear_divergence
    blows_up = lambda t, y, _: y**2 + 100.0  # noqa: E731
    run = solved(blows_up, hf.GaussLegendre(2), jnp.ones(1), 1.0, 0.5, throw=False)
    assert run.result == dfx.RESULTS.nonlinear_divergence
    # With steps of its own it goes on, where there is a solution.
    controller = dfx.PIDController(rtol=1e-6, atol=1e-6)
    run = solved(stiff, FIXED, jnp.ones(2), 0.01, 0.01, stepsize_controller=controller)
    np.testing.assert_allclose(run.ys[0], np.exp(-10.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", [ALL[1], FIXED], ids=["newton", "fixed point"])
def test_derivatives(solver):
    def end(c):
        field = lambda t, y, c: c * jnp.cos(y) - jnp.flip(y)  # noqa: E731
        y0 = jnp.array([0.3, 1.0])
        return solved(field, solver, y0, 1.0, 0.25, args=c, max_steps=4).ys[0] @ y0

    run, h = jax.jit(end), 1e-5
    by_differences = (run(1.0 + h) - run(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(end))(1.0), by_differences, rtol=1e-8)


def test_flow_takes_it_and_nothing_is_projected():
    model, _ = network_flow()
    x = jr.normal(jr.key(1), (20, 3))
    run = hf.flow(
        model, (x, jnp.sin(x[:, :2])), 3.0, solver=hf.GaussLegendre(2), dt0=0.1,
        stepsize_controller=dfx.ConstantStepSize(), ts=[0.0, 1.0, 3.0],
    )  # fmt: skip
    assert run.stats["projection"].startswith("off: your solver")
    for values in run.laws.values():
        np.testing.assert_allclose(values[-1], values[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"stages": 4}, "must be 1, 2 or 3"), ({"iteration": "secant"}, "'newton' or")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hf.GaussLegendre(**arguments)


def test_bad_states_are_refused():
    term = dfx.ODETerm(driven)

    def start(y, **options):
        return hf.GaussLegendre(2, **options).init(term, 0, 1, y, None)

    with pytest.raises(
        ValueError, match="one floating-point dtype; got float32, float64"
    ):
        start((jnp.ones(1), jnp.ones(1, jnp.float32)))
    with pytest.raises(ValueError, match=r"20,002 × 20,002.*fixed point"):
        start(jnp.ones(10_001))
    assert start(jnp.ones(10_001), iteration="fixed point") is None
