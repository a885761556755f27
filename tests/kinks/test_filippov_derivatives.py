"""Forward-mode derivatives through the exact flow, event times included."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array

import homoflow as hf

EXACT = hf.Filippov(max_active=16)


def normal(seed, shape):
    return jr.normal(jr.key(seed), shape)


# A network with crossings, entries and exits, against finite differences.

T1, SAMPLES = 20.0, 14


def network(seed):
    """Flat weights, inputs and targets of a (3, 6, 2) ReLU network."""
    model = hf.MLP((3, 6, 2), key=jr.key(seed))
    w, _ = jax.flatten_util.ravel_pytree(eqx.filter(model, eqx.is_inexact_array))
    return w, normal(6 + seed, (SAMPLES, 3)), normal(70 + seed, (SAMPLES, 2)), T1


def all_outputs(trajectory: hf.Trajectory) -> dict[str, Array]:
    parts = {
        "model": trajectory.model,
        "models": trajectory.models,
        "losses": trajectory.losses,
        "laws": trajectory.laws,
        "grad_norms": trajectory.grad_norms,
        "squared_norms": trajectory.squared_norms,
    }
    arrays = {k: eqx.filter(v, eqx.is_inexact_array) for k, v in parts.items()}
    return {k: jax.flatten_util.ravel_pytree(v)[0] for k, v in arrays.items()}


def flow_of_network(w, x, y, t1, rtol):
    model = hf.MLP((3, 6, 2), key=jr.key(0))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    model = eqx.combine(jax.flatten_util.ravel_pytree(arrays)[1](w), rest)
    trajectory = hf.flow(
        model, (x, y), t1, ts=t1 * jnp.array([0, 0.3, 0.7, 1.0]), rtol=rtol,
        solver=EXACT, save_models=True, throw=False,
    )  # fmt: skip
    return all_outputs(trajectory), trajectory.stats.numbers


@jax.jit
def value_and_derivative(at, direction, rtol):
    """Outputs, their derivative along a direction, and the numbers of events."""
    outputs, change, stats = jax.jvp(
        lambda *at: flow_of_network(*at, rtol), at, direction, has_aux=True
    )
    return outputs, change, stats


def directions(seed) -> dict[str, tuple]:
    at = network(seed)
    still = jax.tree.map(jnp.zeros_like, at)
    drawn = [normal(1000 * seed + i, jnp.shape(a)) for i, a in enumerate(at[:3])]
    moving = zip(("weights", "x", "y", "t1"), (*drawn, 1.0), strict=True)
    return {
        name: (*still[:i], value, *still[i + 1 :])
        for i, (name, value) in enumerate(moving)
    }


def moved(at, direction, by):
    return jax.tree.map(lambda a, d: a + by * d, at, direction)


def difference_quotient(at, direction, step=3e-6, rtol=1e-12):
    """Central finite differences of the outputs; the events must be the same."""
    still = jax.tree.map(jnp.zeros_like, direction)
    (up, _, events_up), (down, _, events_down) = (
        value_and_derivative(moved(at, direction, s * step), still, rtol)
        for s in (1, -1)
    )
    for kind in ("crossings", "entries", "exits"):
        assert events_up[kind] == events_down[kind]
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), up, down)


def errors(change, truth) -> dict[str, float]:
    return {
        k: float(jnp.linalg.norm(change[k] - truth[k]) / jnp.linalg.norm(truth[k]))
        for k in truth
    }


def assert_close(change, truth, tolerance):
    for name, value in truth.items():
        size = 1 + np.linalg.norm(value)
        assert np.linalg.norm(change[name] - value) <= tolerance * size, name


def all_events_happen(stats) -> bool:
    return min(int(stats[k]) for k in ("crossings", "entries", "exits")) > 0


@pytest.mark.parametrize("name", ["weights", "x", "y", "t1"])
def test_derivatives_are_limits_of_difference_quotients(name):
    at, direction = network(0), directions(0)[name]
    _, change, stats = value_and_derivative(at, direction, 1e-11)
    assert all_events_happen(stats)
    assert_close(change, difference_quotient(at, direction), 1e-7)
    # Something to be compared, and the laws know that only weights change them.
    assert np.linalg.norm(change["models"]) > 0.01
    assert (np.linalg.norm(change["laws"]) > 0.01) == (name == "weights")


@pytest.mark.parametrize("seed", [2, 4])
def test_derivative_when_everything_moves(seed):
    at = network(seed)
    direction = jax.tree.map(lambda *a: sum(a), *directions(seed).values())
    _, change, stats = value_and_derivative(at, direction, 1e-11)
    assert all_events_happen(stats)
    assert_close(change, difference_quotient(at, direction), 1e-7)


def test_error_of_a_derivative_falls_with_the_tolerance():
    at, direction = network(0), directions(0)["weights"]
    truth, *found = (
        value_and_derivative(at, direction, rtol)[1]["model"]
        for rtol in (1e-12, 1e-5, 1e-7, 1e-9)
    )
    error = [np.linalg.norm(f - truth) / np.linalg.norm(truth) for f in found]
    assert error[0] < 1e-3
    assert error[1] < error[0] / 10
    assert error[2] < error[1] / 10


def repeated():
    """The network's problem with its first two inputs equal."""
    w, x, y, t1 = network(0)
    return w, x.at[1].set(x[0]), y, t1


def test_equal_inputs_may_move_together_and_not_apart():
    at = repeated()
    still = jax.tree.map(jnp.zeros_like, at)
    way = normal(0, (3,))
    together = (still[0], still[1].at[:2].set(way), *still[2:])
    _, change, stats = value_and_derivative(at, together, 1e-11)
    assert stats["entries"] > 0
    assert_close(change, difference_quotient(at, together), 1e-7)
    apart = (still[0], still[1].at[0].set(way), *still[2:])
    outputs, change, _ = value_and_derivative(at, apart, 1e-11)
    assert np.all(np.isfinite(outputs["model"]))
    assert np.all(np.isnan(change["model"]))


# One weight with one crossing, in closed form. The model and the loss close over two of
# the numbers that derivatives are taken by.

LEAK = 0.2


class Line(eqx.Module):
    w: Array
    gain: Callable = lambda z: z

    def __call__(self, x):
        return jax.nn.leaky_relu(self.gain(self.w * x), LEAK)


def line(w, x, y, t1, b=1.0, c=1.0):
    """The final weight and loss c·(φ(b·wx) − y)²/2, by the solver."""
    model = Line(jnp.reshape(w, 1), lambda z: b * z)
    flow = hf.flow(
        model, (jnp.reshape(x, (1, 1)), jnp.reshape(y, (1, 1))), t1,
        ts=t1 * jnp.array([0, 1.0]), solver=EXACT,
        loss=lambda f, y: 0.5 * c * jnp.sum((f - y) ** 2), throw=False, rtol=1e-10,
    )  # fmt: skip
    return flow.model.w[0], flow.losses[-1]


def line_in_closed_form(w, x, y, t1, b, c):
    """ẇ = −c·s·bx (s·bx·w − y), s = 1 and then LEAK: down from w > 0 to y < 0."""
    x, t1 = b * x, c * t1
    meets = jnp.log(1 - x * w / y) / x**2
    below = y / (LEAK * x) * -jnp.expm1(-((LEAK * x) ** 2) * (t1 - meets))
    above = y / x + (w - y / x) * jnp.exp(-(x**2) * t1)
    end = jnp.where(t1 < meets, above, below)
    slope = jnp.where(end > 0, 1, LEAK)
    return end, 0.5 * c * (slope * end * x - y) ** 2


#: w, x, y, t1, b, c of four problems; the last ends before its kink.
POINTS = tuple(
    jnp.array(values)
    for values in (
        [0.7, 0.4, 1.5, 0.7],
        [1.1, 0.6, 1.3, 1.1],
        [-0.8, -1.2, -0.5, -0.8],
        [2.0, 3.0, 4.0, 0.2],
        [1.0, 1.4, 0.9, 1.0],
        [1.0, 0.7, 1.2, 1.0],
    )
)
BY_ALL = tuple(range(len(POINTS)))


@pytest.fixture(scope="module")
def jacobian():
    """Of `line` for a batch of problems, compiled."""
    return jax.jit(jax.vmap(jax.jacfwd(line, argnums=BY_ALL)))


def true_jacobian(*points):
    return jax.vmap(jax.jacfwd(line_in_closed_form, argnums=BY_ALL))(*points)


def test_jacobian_in_closed_form_under_jit_and_vmap(jacobian):
    found, truth = jacobian(*POINTS), true_jacobian(*POINTS)
    for got, expected in zip(found, truth, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)
    # With event times that do not change, dw/dw₀ would be 1/LEAK times as large.
    w, x, y, t1, b, c = (p[:3] for p in POINTS)
    x, t1 = b * x, c * t1
    meets = jnp.log(1 - x * w / y) / x**2
    fixed = jnp.exp(-(x**2) * meets - (LEAK * x) ** 2 * (t1 - meets))
    np.testing.assert_allclose(truth[0][0][:3], LEAK * fixed, rtol=1e-12)


def test_a_start_on_a_kink_has_the_derivatives_that_exist(jacobian):
    """From w = 0 to the side below: another w₀ may start above, not so another y."""
    points = (0 * POINTS[0], *POINTS[1:])
    (by_w, *found), (_, *truth) = jacobian(*points)[0], true_jacobian(*points)[0]
    assert np.all(np.isnan(by_w))
    np.testing.assert_allclose(found, truth, rtol=1e-7)


def test_a_run_that_fails_has_no_derivative(jacobian):
    bad = POINTS[2].at[0].set(jnp.nan)
    for change in jacobian(*POINTS[:2], bad, *POINTS[3:]):
        assert np.all(np.isnan(change)[:, 0])
        assert np.all(np.isfinite(change)[:, 1:])


# Reverse mode and second derivatives.


def loss_of(model):
    data = jnp.ones((1, 1)), -jnp.ones((1, 1))
    return hf.flow(model, data, 2.0, ts=[0.0, 2.0], solver=EXACT).losses[-1]


def final_loss(w):
    return loss_of(Line(jnp.reshape(w, 1)))


@pytest.mark.parametrize(
    "differentiate",
    [
        jax.grad(final_loss),
        jax.jacrev(final_loss),
        lambda w: jax.vjp(final_loss, w)[1](jnp.ones_like(w)),
        lambda w: jax.vmap(jax.grad(final_loss))(w[None]),
        lambda w: jax.linear_transpose(jax.linearize(final_loss, w)[1], w)(w),
        lambda w: eqx.filter_grad(loss_of)(Line(w[None])),
    ],
    ids=["grad", "jacrev", "vjp", "vmap", "linear_transpose", "filter_grad"],
)
def test_reverse_mode_is_refused(differentiate):
    with pytest.raises(NotImplementedError, match="Forward-mode ones are"):
        jax.eval_shape(differentiate, jnp.asarray(0.7))


def test_samples_that_rest_on_a_kink_do_not_date_the_event():
    """A unit is pinned at the origin for most of the time, until one sample lets it go."""
    model = hf.MLP((2, 3, 1), activation="leaky_relu", key=jr.key(0))
    arrays, frozen = eqx.partition(model, eqx.is_inexact_array)
    _, unravel = jax.flatten_util.ravel_pytree(arrays)
    keys = jr.split(jr.key(8), 3)
    model = eqx.combine(unravel(0.7 * jr.normal(keys[0], (9,))), frozen)
    x, y = jr.normal(keys[1], (6, 2)), jr.normal(keys[2], (6, 1))

    @jax.jit
    def end(scale, rtol):
        run = hf.flow(model, (scale * x, y), 0.6, solver=hf.Filippov(), rtol=rtol)
        return jax.flatten_util.ravel_pytree(eqx.filter(run.model, eqx.is_array))[0]

    at, change = 20.0, 1e-4
    _, slope = jax.jvp(lambda scale: end(scale, 1e-9), (at,), (1.0,))
    plus, minus = (end(at + sign * change, 1e-12) for sign in (1, -1))
    wanted = (plus - minus) / (2 * change)
    assert np.linalg.norm(slope - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("second", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_are_refused(second):
    with pytest.raises(NotImplementedError, match="Second derivatives"):
        jax.eval_shape(second(jax.jacfwd(final_loss)), jnp.asarray(0.7))


def test_integer_labels_are_no_obstacle():
    """They are arrays that nothing is differentiated by, of the trace all the same."""
    model, labels = hf.MLP((3, 4, 3), key=jr.key(0)), jnp.arange(8) % 3
    x = normal(1, (8, 3))

    @jax.jit
    def loss_after(scale, labels):
        scaled = jax.tree.map(lambda w: w * scale, model)
        loss = hf.SoftmaxCrossEntropy()
        return hf.flow(scaled, (x, labels), 1.0, loss=loss, laws=()).losses[-1]

    at, change = 1.3, 1e-4
    _, slope = jax.jvp(lambda s: loss_after(s, labels), (at,), (1.0,))
    plus, minus = (loss_after(at + sign * change, labels) for sign in (1, -1))
    np.testing.assert_allclose(slope, (plus - minus) / (2 * change), rtol=1e-5)
