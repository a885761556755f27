"""`ExponentialAdams`: order, stiff decay, dense output, and what JAX does with it.

Oracles: closed forms, SciPy's Radau and DOP853 (other methods, other code), finite
differences; a wrong J, which must not change what the solutions converge to; and Adams
methods without J, which must fail where it does not.
"""

import functools
from collections import Counter

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from problems import flat
from scipy.integrate import solve_ivp

import homoflow as hf
from homoflow._jax._masked_vmap import masked_vmap
from homoflow._solvers.exponential_adams import (
    _jacobian_update,
    _order_control,
)
from homoflow._solvers.exponential_adams._jacobian_update import num_rows
from homoflow._solvers.exponential_adams._low_rank import LowRank, from_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


def descent(t, y, args):
    """Gradient flow of L = (ab + a²b² − 1)²/2 + cosh(c − a), on a tree, forced."""
    del args

    def loss(y):
        (a, b), c = y["ab"], y["c"]
        return 0.5 * (a * b + (a * b) ** 2 - 1) ** 2 + jnp.cosh(c[0, 0] - a)

    slope = jax.tree.map(jnp.negative, jax.grad(loss)(y))
    return slope | {"c": slope["c"] + jnp.sin(2 * t)}


TREE = {"ab": (jnp.array(1.3), jnp.array(-0.4)), "c": jnp.array([[0.2]])}
#: Off the grid of every step, but for the end.
TIMES = np.append((np.arange(40) + 0.37) / 20.25, 2.0)


def reference(field, y0, ts, **options) -> np.ndarray:
    flattened, unravel = jax.flatten_util.ravel_pytree(y0)
    slope = jax.jit(
        lambda t, y: jax.flatten_util.ravel_pytree(field(t, unravel(y), None))[0]
    )
    options = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-14, **options}
    return solve_ivp(slope, (0, ts[-1]), flattened, t_eval=ts, **options).y.T


def rows(ys, count) -> np.ndarray:
    return np.concatenate(
        [np.reshape(leaf, (count, -1)) for leaf in jax.tree.leaves(ys)], axis=1
    )


def solve(solver, field, y0, t1, ts=None, args=None, t0=0.0, j=None, **options):
    """By the solver's own controller; with `j` to begin with, if given."""
    term = dfx.ODETerm(field)
    state = solver.init(term, t0, t1, y0, args)
    if j is not None:
        state = state._replace(
            jacobian=j,
            state_coordinates=j.coordinates(state.states),
            slope_coordinates=j.coordinates(state.slopes),
        )
    options = {"stepsize_controller": solver.controller(), **options}
    return dfx.diffeqsolve(
        term, solver, t0, t1, 1e-3 * (t1 - t0), y0, args, max_steps=2000,
        saveat=dfx.SaveAt(t1=True) if ts is None else dfx.SaveAt(ts=ts),
        solver_state=state, throw=False, **options,
    )  # fmt: skip


WRONG = jnp.array([[3.0, 1.0, -2.0], [1.0, -1.0, 0.5], [-2.0, 0.5, -4.0]])


def low_rank(matrix) -> LowRank:
    rates, vectors = jnp.linalg.eigh(matrix)
    order = jnp.argsort(-jnp.abs(rates))
    size, room = len(rates), num_rows(len(rates)) - len(rates)
    return LowRank(
        jnp.pad(vectors[:, order].T, ((0, room), (0, 0))),
        jnp.pad(jnp.eye(size), (0, room)),
        jnp.pad(rates[order], (0, room)),
        jnp.asarray(size),
    )


@pytest.mark.parametrize("order", [5, 12])
def test_order_of_steps_and_dense_output_whatever_j_is(order):
    exact = reference(descent, TREE, TIMES)

    @jax.jit
    def run(rtol, matrix):
        solver = hf.ExponentialAdams(rtol, rtol, max_order=order)
        return solve(solver, descent, TREE, 2.0, jnp.asarray(TIMES), j=low_rank(matrix))

    for matrix in (jnp.zeros((3, 3)), WRONG):
        steps, at_end, between = [], [], []
        for rtol in 10.0 ** -np.arange(4, 8):
            found = run(rtol, matrix)
            error = np.abs(rows(found.ys, len(TIMES)) - exact).max(axis=1)
            steps.append(float(found.stats["num_accepted_steps"]))
            at_end.append(error[-1])
            between.append(error[:-1].max())
        for errors in (at_end, between):
            assert errors[0] < 1e-2
            slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
            # The corrector is of one order more than the predictor, and the error
            # estimate holds for the latter.
            if order < 6:
                assert order - 0.3 < -slope < order + 3, (steps, errors)
            else:
                assert -slope > 6, (steps, errors)
            # Errors fall in proportion to the tolerance.
            assert 1e2 < errors[0] / errors[-1] < 1e5


def test_what_j_holds_is_solved_exactly():
    """Whatever the step: decay at rates to 1e4, growth, and forcing by a polynomial."""
    rates = jnp.array([-1e4, -50.0, -1e-3, 2.0])
    start = jnp.array([1.0, -2.0, 0.5, 0.3])
    rotation = jnp.linalg.qr(jr.normal(jr.key(0), (4, 4)))[0]
    matrix = rotation @ jnp.diag(rates) @ rotation.T
    y0, solver = rotation @ start, hf.ExponentialAdams(1.0, 1.0)
    term = dfx.ODETerm(lambda t, y, args: matrix @ y + rotation[:, 1])

    @jax.jit
    def step(j, h):
        state = solver.init(term, 0.0, h, y0, None)
        state = state._replace(
            jacobian=j,
            state_coordinates=j.coordinates(state.states),
            slope_coordinates=j.coordinates(state.slopes),
        )
        y1, _, dense, *_ = solver.step(term, 0.0, h, y0, None, state, False)
        return y1, solver.interpolation_cls(t0=0.0, t1=h, **dense).evaluate(h / 3)

    def exact(t):
        forced = jnp.zeros(4).at[1].set(jnp.expm1(-50 * t) / -50)
        return rotation @ (start * jnp.exp(rates * t) + forced)

    exactly = low_rank(matrix)
    for h in (1e-7, 0.1, 3.0):
        y1, between = step(exactly, h)
        np.testing.assert_allclose(y1, exact(h), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(between, exact(h / 3), rtol=1e-10, atol=1e-10)
    plain = exactly._replace(rates=0 * exactly.rates)
    assert np.abs(step(plain, 0.1)[0] - exact(0.1)).max() > 1e3


def test_j_learns_what_is_stiff():
    """Prothero & Robinson: rates of 1 to 1e6, of what follows cos t."""
    rates = jnp.array([1.0, 10.0, 1e3, 1e4, 1e6])
    rotation = jnp.linalg.qr(jr.normal(jr.key(0), (5, 5)))[0]

    def field(t, y, args):
        del args
        away = rotation.T @ y - jnp.cos(t)
        return rotation @ (-rates * away - jnp.sin(t))

    ts = jnp.linspace(0.1, 10.0, 30)

    def run(rank):
        solver = hf.ExponentialAdams(1e-7, 1e-7, rank=rank)
        return jax.jit(lambda: solve(solver, field, rotation @ jnp.ones(5), 10.0, ts))()

    found = run(None)
    assert found.result == dfx.RESULTS.successful
    assert found.stats["num_steps"] < 400
    followed = np.asarray(found.ys @ rotation)
    np.testing.assert_allclose(
        followed, np.cos(ts)[:, None] * np.ones(5), rtol=0, atol=2e-5
    )
    assert run(0).result == dfx.RESULTS.max_steps_reached


class Student(eqx.Module):
    """A softplus network without structure that homoflow knows."""

    v: jax.Array
    w: jax.Array
    b: jax.Array

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
    solver = hf.ExponentialAdams()
    return hf.flow(model, DATA, T1, rtol=RTOL, solver=solver, **END)


@pytest.fixture(scope="module")
def flow():
    return followed(student(0))


def test_stiff_flow_against_radau(flow):
    start, unravel = jax.flatten_util.ravel_pytree(student(0))

    def loss(w):
        return 0.5 * jnp.mean((jax.vmap(unravel(w))(DATA[0]) - DATA[1]) ** 2)

    slope, slopes = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    expected = reference(
        lambda t, w, args: -slope(w), start, np.asarray(END["ts"]), method="Radau",
        jac=lambda t, w: -slopes(w), rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(
        flat(flow.model), expected[-1], rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    # In the middle of a step, by the dense output.
    losses = [float(loss(w)) for w in expected]
    np.testing.assert_allclose(flow.losses, losses, rtol=1e-5)
    # The problem is stiff: an explicit method takes 20 times as many gradients.
    rate = float(jnp.linalg.eigvalsh(slopes(expected[-1]))[-1])
    assert rate * T1 / int(flow.stats["steps"]) > 10
    assert flow.stats["gradient_evaluations"] < 320


def test_batch_of_seeds_is_the_loop_over_them(flow):
    models = eqx.filter_vmap(student)(jnp.arange(2))
    batch = eqx.filter_vmap(followed)(models)
    for i in range(2):
        alone = flow if i == 0 else followed(student(i))
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batch.model)
        # Decisions that hang on rounding differ, within the tolerance.
        np.testing.assert_allclose(flat(one), flat(alone.model), rtol=0, atol=3e-5)
        assert abs(int(batch.stats["steps"][i]) - int(alone.stats["steps"])) < 5


@pytest.mark.parametrize("variance", [2.0, 4.0])
def test_stiff_flow_far_from_balance_is_stable_at_loose_tolerances(
    variance, monkeypatch
):
    """Linear layers of several times the usual size come to the least squares."""
    init = hf.Gaussian(variance=variance)
    model = hf.MLP((6, 5, 4, 3), activation="linear", init=init, key=jr.key(5))
    x, y = jr.normal(jr.key(1), (30, 6)), jr.normal(jr.key(2), (30, 3))
    least = np.linalg.lstsq(np.asarray(x), np.asarray(y))[1].sum() / (2 * len(x))

    def run(rtol, **options):
        return hf.flow(
            model, (x, y), 2000.0, ts=[0.0, 2000.0], laws=(), rtol=rtol,
            solver=hf.ExponentialAdams(), throw=False, **options,
        )  # fmt: skip

    rtols = 1e-3, 1e-4
    for rtol in rtols:
        stable = run(rtol)
        assert stable.result == hf.RESULTS.successful
        np.testing.assert_allclose(stable.losses[-1], least, rtol=rtol)
        assert stable.stats["steps"] < 200
    # Of orders as the errors alone would have them.
    monkeypatch.setattr(_order_control, "STABLE", ())
    # Another number of steps is another program.
    results = [run(rtol, max_steps=5000).result for rtol in rtols]
    assert any(result != hf.RESULTS.successful for result in results)


def test_of_a_batch_each_learns_as_often_as_alone(monkeypatch):
    """Also where some are at their end long before the others."""
    lessons = Counter()

    def counted(*given, update=_jacobian_update.secant_update, **options):
        jax.debug.callback(lambda: lessons.update(["learned"]))
        return update(*given, **options)

    monkeypatch.setattr(_jacobian_update, "secant_update", counted)
    start, unravel = jax.flatten_util.ravel_pytree(student(0))

    def loss(w):
        return jnp.mean((jax.vmap(unravel(w))(DATA[0]) - DATA[1]) ** 2)

    def end(t1):
        solver = hf.ExponentialAdams(1e-4, 1e-4)
        return solve(solver, lambda t, w, args: -jax.grad(loss)(w), start, t1).ys

    def how_many(run, t1) -> int:
        lessons.clear()
        jax.block_until_ready(jax.jit(run)(t1))
        jax.effects_barrier()
        return lessons["learned"]

    ends = jnp.array([0.01, 0.1, 0.5, 2.0, 10.0])
    alone = [how_many(end, t1) for t1 in ends]
    assert alone[0] < alone[2] <= alone[-1]
    assert how_many(jax.vmap(end), ends) == sum(alone)


@pytest.mark.parametrize("wanted", [[True, False, True], [False] * 3, [True] * 3])
def test_masked_vmap_computes_what_is_selected(wanted):
    def function(a, b):
        return {"sum": a + b, "root": jnp.sqrt(a)}

    wanted, a, b = jnp.array(wanted), jnp.array([1.0, 4.0, 9.0]), jnp.array(2.0)
    batched = jax.jit(jax.vmap(masked_vmap(function), in_axes=(0, 0, None)))
    got, expected = batched(wanted, a, b), function(a, b)
    for name in expected:
        np.testing.assert_array_equal(got[name], jnp.where(wanted, expected[name], 0))
    # Asked of all alike, it is the function.
    alike = jax.vmap(masked_vmap(function), in_axes=(None, 0, None))(
        jnp.array(True), a, b
    )
    np.testing.assert_array_equal(alike["root"], expected["root"])


def test_a_batch_of_batches_is_one_batch():
    models = eqx.filter_vmap(student)(jnp.arange(4))
    flat_batch = eqx.filter_vmap(followed)(models)
    squared = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), models)
    batches = eqx.filter_vmap(eqx.filter_vmap(followed))(squared)
    # The four learn at different steps.
    steps = np.asarray(flat_batch.stats["steps"])
    assert len(set(steps)) > 1
    np.testing.assert_array_equal(batches.stats["steps"].ravel(), steps)
    np.testing.assert_allclose(
        batches.losses.reshape(4, -1), flat_batch.losses, rtol=1e-9
    )


def test_float32_stays_float32(flow):
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), student(0))
    single = hf.flow(start, DATA, T1, rtol=1e-5, solver=hf.ExponentialAdams(), **END)
    assert {leaf.dtype for leaf in jax.tree.leaves(single.model)} == {np.dtype("f4")}
    np.testing.assert_allclose(single.losses, flow.losses, rtol=1e-3)
    assert single.stats["steps"] < 150


@pytest.mark.parametrize(("count", "least"), [(2, 1.0), (5, 1.0), (3, 1e-2)])
def test_j_of_the_rows_of_a_matrix(count, least):
    rows, x = jr.normal(jr.key(0), (count, 4)), jr.normal(jr.key(1), (3, 4))
    left, values, right = jnp.linalg.svd(rows, full_matrices=False)
    rows = (left * values.at[-1].mul(least)) @ right
    j = from_rows(rows, 7)
    assert int(j.num_used) == min(count, 4)
    np.testing.assert_allclose(
        j.combine(j.rates * j.coordinates(x)), -x @ rows.T @ rows, atol=1e-13
    )
    directions = j.combine(jnp.eye(7))[: int(j.num_used)]
    np.testing.assert_allclose(
        directions @ directions.T, jnp.eye(int(j.num_used)), atol=1e-14
    )


#: Rates of (1, 1e2, 1e4)/8, twice each, and 0.
MANY_SCALES = jnp.diag(jnp.array([1.0, 10.0, 100.0, 0.0]))[:3]
LINEAR = (jnp.concatenate([MANY_SCALES, -MANY_SCALES]), jr.normal(jr.key(3), (6, 2)))


@functools.cache
def linear_run(curvature):
    model = hf.MLP((4, 2), activation="linear", key=jr.key(0))
    solver = hf.ExponentialAdams(curvature=curvature)
    return model, hf.flow(model, LINEAR, 100.0, rtol=1e-8, solver=solver, **END_OF_100)


END_OF_100 = {"ts": [0.0, 100.0], "laws": (), "throw": False}


def nonsense(t, y, args):
    """Rates of 1 to 10 where there are none."""
    return [jr.normal(jr.key(0), (2, *leaf.shape), leaf.dtype) for leaf in y]


def test_few_residuals_tell_what_is_stiff():
    (x, y), (model, run) = LINEAR, linear_run(None)
    start = model.layers[0].weight
    hessian = x.T @ x / 6
    decay = jax.scipy.linalg.expm(-100.0 * hessian)
    end = jnp.linalg.pinv(x, rtol=1e-6) @ y
    # Nothing moves along the fourth input, which is always 0.
    exact = end.T + (start - end.T) @ decay
    np.testing.assert_allclose(run.model.layers[0].weight, exact, rtol=0, atol=1e-6)
    # Gauss–Newton's matrix is the Hessian: N is constant, and steps double to the end.
    assert run.stats["steps"] < 70
    assert 1 <= run.stats["jacobian_evaluations"] < 10
    # From what is wrong secants have to find it: with more steps, and the errors of each
    # add up along what does not move.
    _, other = linear_run(nonsense)
    np.testing.assert_allclose(other.model.layers[0].weight, exact, rtol=0, atol=1e-4)
    assert other.stats["steps"] > 1.5 * run.stats["steps"]


def test_stats_count_gradients():
    calls, ts = Counter(), [0.0, 0.5]

    def objective(w, data):
        jax.debug.callback(lambda: calls.update(gradients=1))
        return jnp.sum((w**2 - data) ** 2)

    run = hf.flow(
        jnp.array([3.0, 0.1]), jnp.array([1.0, 2.0]), 2.0,
        objective=objective, rtol=1e-4, solver=hf.ExponentialAdams(), ts=ts, laws=(),
    )  # fmt: skip
    jax.effects_barrier()
    assert run.stats["rejected_steps"] > 0
    assert run.stats["gradient_evaluations"] == calls["gradients"]


def test_derivatives_in_both_modes_against_finite_differences():
    def field(t, y, args):
        a, b = y
        return -jnp.stack([30 * (a - jnp.cos(args * t)) + a**3, 0.5 * (b - a)])

    def end(args, adjoint):
        solver = hf.ExponentialAdams(1e-7, 1e-7, rank=2, max_order=4)
        y0 = jnp.stack([args, jnp.sin(args)])
        solution = solve(solver, field, y0, 1.0, args=args, adjoint=adjoint)
        assert solution.ys is not None
        return solution.ys[-1, 1]

    at = jnp.array(1.3)
    value = jax.jit(lambda args: end(args, dfx.RecursiveCheckpointAdjoint()))
    reverse = jax.jit(jax.grad(end), static_argnums=1)(
        at, dfx.RecursiveCheckpointAdjoint()
    )
    forward = jax.jit(jax.jacfwd(lambda args: end(args, dfx.ForwardMode())))(at)
    eps = 1e-3
    expected = float(value(at + eps) - value(at - eps)) / (2 * eps)
    assert abs(expected) > 1e-2
    assert float(forward) == pytest.approx(expected, rel=1e-4)
    assert float(reverse) == pytest.approx(float(forward), rel=1e-10)
    # In a batch, of which each learns at its own steps.
    several = jnp.stack([at, 0.4 * at, 2 * at])
    alone = [
        jax.jit(jax.grad(end), static_argnums=1)(a, dfx.RecursiveCheckpointAdjoint())
        for a in several
    ]
    for derivative, adjoint in (
        (jax.grad, dfx.RecursiveCheckpointAdjoint()),
        (jax.jacfwd, dfx.ForwardMode()),
    ):
        each = jax.vmap(derivative(lambda args, of=adjoint: end(args, of)))
        np.testing.assert_allclose(jax.jit(each)(several), alone, rtol=1e-9)


def test_jumps_of_the_field_and_time_that_runs_back():
    def field(t, y, args):
        del args
        return jnp.where(t < 0.5, 1.0, -3.0) * y

    solver = hf.ExponentialAdams(1e-8, 1e-8, max_order=4)

    def run(t0, t1):
        controller = dfx.ClipStepSizeController(
            solver.controller(), jump_ts=jnp.array([0.5])
        )
        return jax.jit(
            lambda: solve(
                solver, field, jnp.array(2.0), t1, t0=t0, stepsize_controller=controller
            )
        )()

    forth, back = run(0.0, 1.0), run(1.0, 0.0)
    assert float(forth.ys[-1]) == pytest.approx(2 * np.exp(-1.0), rel=1e-6)
    assert float(back.ys[-1]) == pytest.approx(2 * np.exp(1.0), rel=1e-6)
    assert forth.stats["num_rejected_steps"] < 5


def test_weights_that_blow_up_are_a_failure_and_not_an_answer():
    run = hf.flow(
        jnp.array(1.0), jnp.array(0.0), 2.0, objective=lambda w, _: -(w**3) / 3,
        rtol=1e-6, solver=hf.ExponentialAdams(), throw=False,
    )  # fmt: skip
    assert run.result != hf.RESULTS.successful
    # w = 1/(1 − t)
    assert float(run.stats["time_reached"]) == pytest.approx(1.0, abs=1e-4)
    assert np.isnan(run.losses[-1])


def test_what_it_refuses():
    with pytest.raises(ValueError, match="`rank` must be at least 0; got -1"):
        hf.ExponentialAdams(rank=-1)
    with pytest.raises(ValueError, match="`max_order` must be between 1 and 12"):
        hf.ExponentialAdams(max_order=13)

    def init(y0, solver):
        return solver.init(dfx.ODETerm(descent), 0.0, 1.0, y0, None)

    mixed = (jnp.ones(2), jnp.ones(2, jnp.float32))
    with pytest.raises(ValueError, match="one floating-point dtype; got float32, fl"):
        init(mixed, hf.ExponentialAdams(1e-3, 1e-3))
    with pytest.raises(ValueError, match=r"ExponentialAdams\(rtol, atol\)"):
        init(jnp.ones(2), hf.ExponentialAdams(1e-3))
    with pytest.raises(ValueError, match="leave `stepsize_controller` out"):
        hf.flow(
            student(0), DATA, 1.0, solver=hf.ExponentialAdams(),
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
        )  # fmt: skip
    with pytest.raises(ValueError, match="Give `rtol` and `atol` to `flow`"):
        hf.flow(student(0), DATA, 1.0, solver=hf.ExponentialAdams(1e-3, 1e-3))


def test_projection_takes_what_is_remembered_along():
    """Laws to rounding, in as many steps and as accurately as without."""
    init = hf.Gaussian(variance=0.2)
    model = hf.MLP((3, 6, 6, 1), activation=hf.Power(2), init=init, key=jr.key(1))
    x = jr.normal(jr.key(2), (20, 3))
    data = x, jnp.sin(x[:, :1])

    def run(**options):
        return hf.flow(model, data, 2.0, solver=hf.ExponentialAdams(), **options)

    exact = flat(hf.flow(model, data, 2.0, solver=dfx.Dopri8(), rtol=1e-12).model)
    free, kept = run(rtol=1e-6), run(rtol=1e-6, project=True)
    size = sum(float(norm[-1]) for norm in kept.squared_norms.values())

    def drift(run):
        return max(float(abs(law - law[0]).max()) for law in run.laws.values()) / size

    assert drift(kept) < 1e-14 < 1e-8 < drift(free)
    assert int(kept.stats["steps"]) < 1.2 * int(free.stats["steps"])
    errors = [np.linalg.norm(flat(r.model) - exact) for r in (free, kept)]
    assert errors[1] < 3 * errors[0]
