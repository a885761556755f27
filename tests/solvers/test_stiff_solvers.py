"""`Rodas5P`: order, stiff decay, dense output, and what JAX does with it.

Oracles: closed forms, SciPy's Radau and DOP853 (other methods, other code), finite
differences; and an explicit method of the same order that must fail where it does not.
"""

from collections import Counter

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array
from scipy.integrate import solve_ivp

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 2.0 ** np.arange(4, 7)


def descent(t, y, args):
    """Gradient flow of L = (ab + a²b² − 1)²/2 + cosh(c − a), on a tree."""
    del t, args

    def loss(y):
        (a, b), c = y["ab"], y["c"]
        return 0.5 * (a * b + (a * b) ** 2 - 1) ** 2 + jnp.cosh(c[0, 0] - a)

    return jax.tree.map(jnp.negative, jax.grad(loss)(y))


TREE = {"ab": (jnp.array(1.3), jnp.array(-0.4)), "c": jnp.array([[0.2]])}


def driven(t, y, args):
    """Nonlinear, dependent on time, with a Jacobian that is not symmetric."""
    del args
    u, v = y
    return jnp.stack([jnp.cos(3 * t) * v - u**3, jnp.sin(u) * jnp.exp(-t) - 2 * v])


def at_constant_steps(field, y0, t1, h, ts, solver):
    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver, 0.0, t1, h, y0, saveat=dfx.SaveAt(ts=ts)
    ).ys


def reference(field, y0, ts) -> np.ndarray:
    flattened, unravel = jax.flatten_util.ravel_pytree(y0)
    slope = jax.jit(
        lambda t, y: jax.flatten_util.ravel_pytree(field(t, unravel(y), None))[0]
    )
    solution = solve_ivp(
        slope, (0, ts[-1]), flattened, "DOP853", t_eval=ts, rtol=1e-13, atol=1e-14
    )
    return solution.y.T


def orders(errors) -> np.ndarray:
    return -np.diff(np.log2(errors))


@pytest.mark.parametrize(
    ("field", "y0"),
    [(descent, TREE), (driven, jnp.array([1.0, 0.7]))],
    ids=["gradient flow", "driven"],
)
def test_order_is_five_and_that_of_dense_output_four(field, y0):
    # Off the grid of every step size, but for the end.
    ts = np.append((np.arange(40) + 0.37) / 40.5, 1.0)
    exact = reference(field, y0, ts)
    run = jax.jit(
        lambda h: at_constant_steps(field, y0, 1.0, h, jnp.asarray(ts), hf.Rodas5P())
    )
    at_end, between = [], []
    for steps in STEPS:
        states = jax.tree.leaves(run(1 / steps))
        states = np.concatenate([np.reshape(s, (len(ts), -1)) for s in states], axis=1)
        error = np.abs(states - exact).max(axis=1)
        at_end.append(error[-1])
        between.append(error[:-1].max())
    slope = np.polyfit(np.log2(STEPS), np.log2(at_end), 1)[0]
    assert 4.7 < -slope < 5.6, orders(at_end)
    slope = np.polyfit(np.log2(STEPS), np.log2(between), 1)[0]
    assert 3.8 < -slope < 5.2, orders(between)


def test_error_estimate_is_of_fifth_order_in_the_step():
    solver, term = hf.Rodas5P(), dfx.ODETerm(driven)
    y0 = jnp.array([1.0, 0.7])

    @jax.jit
    def estimate(h):
        return jnp.max(jnp.abs(solver.step(term, 0.0, h, y0, None, None, False)[1]))

    estimates = [float(estimate(0.5 / steps)) for steps in STEPS]
    assert 4.6 < orders(estimates)[-1] < 5.4


def errors_at_rates(solver, rates):
    """Of what decays, after one step of 0.1, and of what moves slowly, up to 3.

    y' = −rate·(y − c(t)) + c'(t), with c = 0 and c = cos [Prothero & Robinson 1974].
    """

    def field(t, y, rate):
        target = jnp.stack([jnp.zeros_like(t), jnp.cos(t)])
        return -rate * (y - target) - jnp.stack([jnp.zeros_like(t), jnp.sin(t)])

    ts = jnp.linspace(0.1, 3.0, 30)

    def errors(rate):
        y = dfx.diffeqsolve(
            dfx.ODETerm(field), solver, 0.0, 3.0, 0.1, jnp.ones(2), args=rate,
            saveat=dfx.SaveAt(ts=ts),
        ).ys  # fmt: skip
        assert y is not None
        return jnp.abs(y[0, 0]), jnp.max(jnp.abs(y[:, 1] - jnp.cos(ts)))

    return map(np.asarray, jax.jit(jax.vmap(errors))(rates))


def test_what_is_fast_decays_and_what_is_slow_is_followed_at_any_rate():
    rates = jnp.array([1e3, 1e6, 1e9])
    decayed, followed = errors_at_rates(hf.Rodas5P(), rates)
    # L-stable: R(z) vanishes at infinity as fast as 1/z.
    assert np.all(decayed < 300 / rates)
    assert np.all(followed < 1e-6)
    explicitly_decayed, explicitly_followed = errors_at_rates(dfx.Tsit5(), rates)
    assert np.all(explicitly_decayed > rates)
    assert not np.any(explicitly_followed < 1)


def test_robertson_against_radau():
    """Rates of 0.04 to 3e7, and a Jacobian that is far from symmetric."""

    def field(t, y, args):
        del t, args
        a, b, c = y
        slow, fast, medium = 0.04 * a, 3e7 * b**2, 1e4 * b * c
        return jnp.stack([medium - slow, slow - medium - fast, fast])

    start, t1 = jnp.array([1.0, 0.0, 0.0]), 1e4
    solution = dfx.diffeqsolve(
        dfx.ODETerm(field), hf.Rodas5P(), 0.0, t1, 1e-5, start,
        stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-12),
    )  # fmt: skip
    expected = solve_ivp(
        jax.jit(lambda t, y: field(t, y, None)), (0, t1), start, "Radau",
        rtol=1e-10, atol=1e-14,
    ).y[:, -1]  # fmt: skip
    assert solution.ys is not None
    np.testing.assert_allclose(solution.ys[-1], expected, rtol=1e-6)
    assert solution.stats["num_steps"] < 1000


class Student(eqx.Module):
    """A softplus network without structure that homoflow knows."""

    v: Array
    w: Array
    b: Array

    def __call__(self, x):
        return self.v @ jax.nn.softplus(self.w @ x + self.b)


def student(seed) -> Student:
    k1, k2 = jr.split(jr.key(seed))
    return Student(jr.normal(k1, (4,)), jr.normal(k2, (4, 2)), jnp.zeros(4))


#: Inputs far from 0, so that one direction is hundreds of times as steep as the rest.
X = 4 + 2 * jr.normal(jr.key(1), (20, 2))
DATA = (X, jnp.sin(X[:, 0]) + X[:, 1])
T1, RTOL = 20.0, 1e-7
END = {"ts": [0.0, 7.7, T1], "throw": False, "laws": ()}


@eqx.filter_jit
def followed(model):
    return hf.flow(model, DATA, T1, rtol=RTOL, solver=hf.Rodas5P(), **END)


def weights(model) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model)])


@pytest.fixture(scope="module")
def flow():
    return followed(student(0))


def test_stiff_flow_against_radau(flow):
    start, unravel = jax.flatten_util.ravel_pytree(student(0))

    def loss(w):
        return 0.5 * jnp.mean((jax.vmap(unravel(w))(DATA[0]) - DATA[1]) ** 2)

    slope, slopes = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    expected = solve_ivp(
        lambda t, w: -slope(w), (0, T1), start, "Radau",
        jac=lambda t, w: -slopes(w), t_eval=END["ts"], rtol=1e-10, atol=1e-12,
    ).y.T  # fmt: skip
    np.testing.assert_allclose(
        weights(flow.model), expected[-1], rtol=0, atol=3e-6 * np.abs(expected).max()
    )
    # In the middle of a step, by the dense output.
    losses = [float(loss(w)) for w in expected]
    np.testing.assert_allclose(flow.losses, losses, rtol=1e-5)
    # The problem is stiff: the fast scale is much shorter than the steps.
    rate = float(jnp.linalg.eigvalsh(slopes(expected[-1]))[-1])
    assert rate * T1 / int(flow.stats["steps"]) > 5
    explicit = hf.flow(
        student(0), DATA, T1, rtol=RTOL, solver=dfx.Dopri5(), max_steps=300, **END
    )
    assert int(flow.stats["steps"]) < 200
    assert explicit.result == hf.RESULTS.max_steps_reached


def test_stats_count_gradients_and_jacobians_of_both_solves():
    calls, ts = Counter(), [0.0, 0.5]

    def objective(w, data):
        jax.debug.callback(lambda: calls.update(gradients=1))
        return jnp.sum((w**2 - data) ** 2)

    run = hf.flow(
        jnp.array([3.0, 0.1]), jnp.array([1.0, 2.0]), 2.0,
        objective=objective, rtol=1e-4, solver=hf.Rodas5P(), ts=ts,
        estimate_error=True, laws=(),
    )  # fmt: skip
    jax.effects_barrier()
    jacobians, recorded = int(run.stats["jacobian_evaluations"]), 2 * len(ts)
    assert jacobians > run.stats["steps"] + run.stats["rejected_steps"]
    assert run.stats["gradient_evaluations"] == 8 * jacobians + recorded
    # The callback keeps alive a ninth evaluation, the one behind ∂f/∂t = 0, which XLA
    # drops otherwise.
    assert calls["gradients"] == 9 * jacobians + recorded


def test_batch_of_seeds_is_the_loop_over_them(flow):
    models = eqx.filter_vmap(student)(jnp.arange(2))
    batch = eqx.filter_vmap(followed)(models)
    for i in range(2):
        alone = flow if i == 0 else followed(student(i))
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batch.model)
        np.testing.assert_allclose(weights(one), weights(alone.model), rtol=1e-8)
        assert batch.stats["steps"][i] == alone.stats["steps"]


def test_float32_stays_float32(flow):
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), student(0))
    single = hf.flow(start, DATA, T1, rtol=1e-5, solver=hf.Rodas5P(), **END)
    assert {leaf.dtype for leaf in jax.tree.leaves(single.model)} == {np.dtype("f4")}
    np.testing.assert_allclose(single.losses, flow.losses, rtol=1e-3)


def test_reverse_mode_derivative_against_finite_differences(flow):
    start, unravel = jax.flatten_util.ravel_pytree(flow.model)

    @jax.jit
    @jax.value_and_grad
    def final_loss(w):
        # At constant steps the numerical solution is a smooth function of the start.
        run = hf.flow(
            unravel(w), DATA, 2.0, ts=[2.0], solver=hf.Rodas5P(), dt0=0.25,
            stepsize_controller=dfx.ConstantStepSize(), throw=False, laws=(),
        )  # fmt: skip
        return run.losses[-1]

    along, eps = jr.normal(jr.key(5), start.shape), 1e-5
    ahead, behind = (final_loss(start + e * along)[0] for e in (eps, -eps))
    expected = float(ahead - behind) / (2 * eps)
    reverse = float(final_loss(start)[1] @ along)
    assert abs(expected) > 1e-3
    assert reverse == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_do_not_change_a_step(chunk):
    def step(solver):
        term = dfx.ODETerm(driven)
        y0 = jnp.array([1.0, 0.7])
        return solver.step(term, 0.0, 0.3, y0, None, None, False)[0]

    expected = step(hf.Rodas5P())
    np.testing.assert_allclose(step(hf.Rodas5P(chunk)), expected, rtol=1e-14)


def test_weights_that_blow_up_are_a_failure_and_not_an_answer():
    run = hf.flow(
        jnp.array(1.0), jnp.array(0.0), 2.0, objective=lambda w, _: -(w**3) / 3,
        rtol=1e-6, solver=hf.Rodas5P(), throw=False,
    )  # fmt: skip
    assert run.result != hf.RESULTS.successful
    # w = 1/(1 − t)
    assert float(run.stats["time_reached"]) == pytest.approx(1.0, abs=1e-4)
    assert np.isnan(run.losses[-1])


def test_what_it_refuses():
    with pytest.raises(ValueError, match="at least 1"):
        hf.Rodas5P(chunk=0)

    def init(y0):
        return hf.Rodas5P().init(dfx.ODETerm(driven), 0.0, 1.0, y0, None)

    with pytest.raises(ValueError, match="one floating-point dtype; got float32, fl"):
        init((jnp.ones(2), jnp.ones(2, jnp.float32)))
    with pytest.raises(ValueError, match="got complex128"):
        init(jnp.ones(2, jnp.complex128))
    with pytest.raises(ValueError, match="20,000 × 20,000 Jacobian"):
        init(jnp.ones(20_000))
