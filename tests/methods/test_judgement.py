"""Runs that say of themselves that they are no answer, and those that are one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relu_regression

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
#: Two classes that a line separates, with room to spare.
X = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
X = X + 0.5 * jnp.sign(X[:, :1]) * jnp.array([[1.0, 0.0]])
LABELS = jnp.sign(X[:, :1])


def classifier(seed: int = 0) -> hf.MLP:
    init = hf.Gaussian(std=0.1)
    return hf.MLP((2, 8, 1), init=init, key=jax.random.key(seed))


def averaged(t1, **options):
    return hf.flow(
        classifier(), (X, LABELS), t1, loss=hf.LogisticLoss(), ts=[t1 / 2, t1],
        solver=hf.Averaged(), **options,
    )  # fmt: skip


@pytest.mark.parametrize("t1", [1e6, 1e7])
def test_averaging_to_long_times_is_refused_with_its_remedy(t1):
    with pytest.raises(hf.TrajectoryError, match=r"Filippov\(\)") as raised:
        averaged(t1)
    result = raised.value.trajectory.result
    assert bool((result == hf.RESULTS.inaccurate) | (result == hf.RESULTS.nonfinite))


@pytest.mark.parametrize(
    ("activation", "loss", "t1"),
    [
        ("leaky_relu", hf.LogisticLoss(), 1e8),
        (jax.nn.hard_tanh, hf.SquaredLoss(), 1e7),
        ("abs", hf.ExponentialLoss(), 1e6),
    ],
)
def test_a_long_time_is_right_or_said_to_be_none(activation, loss, t1):
    """Beside many small steps to a time that both can reach."""
    model = hf.MLP((2, 5, 1), activation=activation, key=jax.random.key(2))
    run = hf.flow(
        model, (X, LABELS), t1, loss=loss, ts=[2.0, t1], solver=hf.Averaged(),
        throw=False,
    )  # fmt: skip
    assert run.result != hf.RESULTS.successful
    assert np.all(np.isnan(run.losses)) or not run.stats["error_estimate"] < 0.1
    short = hf.flow(model, (X, LABELS), 2.0, loss=loss, solver=hf.Averaged())
    gd = hf.descend(model, (X, LABELS), 20_000, learning_rate=1e-4, loss=loss)
    np.testing.assert_allclose(short.losses[-1], gd.losses[-1], rtol=2e-3)


def test_a_failed_estimate_is_seen_inside_jit():
    run = eqx.filter_jit(lambda t1: averaged(t1, throw=False))(1e6)
    assert np.isnan(run.stats["error_estimate"])
    assert bool(run.result == hf.RESULTS.inaccurate)
    # A short time with the same program: an answer.
    run = eqx.filter_jit(lambda t1: averaged(t1, throw=False))(1.0)
    assert bool(run.result == hf.RESULTS.successful)


def test_an_estimate_above_the_tolerance_asked_for_warns():
    model, data = relu_regression()
    with pytest.warns(UserWarning, match=r"times `rtol`") as told:
        run = hf.flow(model, data, 3.0, rtol=1e-4, solver=hf.Averaged())
    (message,) = told
    assert f"{float(run.stats['error_estimate']):.2g}" in str(message.message)


class Product(eqx.Module):
    """u·v·x: it conserves u² − v² for any data."""

    u: jax.Array
    v: jax.Array

    def __call__(self, x):
        return self.u * self.v * x


def stepped(model, data):
    """A risk with a step in one weight, so narrow that no random weights meet it."""
    x, y = data
    risk = jnp.mean((jax.vmap(model)(x) - y) ** 2) / 2
    return jnp.sum(risk) + 5 * jnp.sum(jnp.tanh(10 * (model.u - 6)))


def stepped_flow(**options):
    model = Product(jnp.array([2.0]), jnp.array([1.0]))
    x = jnp.ones((4, 1))
    laws = hf.laws(model, x[0])
    return hf.flow(
        model, (x, 80.0 * x), 3.0, objective=stepped, laws=laws, rtol=1e-8, **options
    )


def test_laws_that_break_on_the_way_are_not_restored():
    with pytest.warns(UserWarning, match="broken where this flow goes"):
        found = stepped_flow()
    free = stepped_flow(project=False)
    assert found.stats["projection"].startswith("off")
    np.testing.assert_allclose(found.model.u, free.model.u, rtol=1e-6)
    values = next(iter(free.laws.values()))
    assert abs(float(jnp.ravel(values[-1] - values[0])[0])) > 1e-2


def test_laws_that_break_are_an_error_where_restoring_was_asked_for():
    with pytest.raises(hf.TrajectoryError, match="project=False") as raised:
        stepped_flow(project=True)
    assert bool(raised.value.trajectory.result == hf.RESULTS.law_broken)


# Derivatives over kinks.


def unit(w0, **options):
    """relu(w − 1) on x = 1 and relu(2w − 1) on x = 2: the first switches on on the way."""

    def predict(w, x):
        return jax.nn.relu(w * x - 1)

    class Unit(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return predict(self.w, x)

    x = jnp.array([[1.0], [2.0]])
    y = jnp.array([[3.0], [4.0]])
    return hf.flow(Unit(w0), (x, y), 1.0, throw=False, **options).model.w[0]


def slope_of_the_exact_end(w0: float) -> float:
    """dw(1)/dw0 in closed form: two linear pieces, and the crossing at w = 1.

    On w < 1: dw/dt = −(2w − 5)·2/2 = 5 − 2w; on w > 1: dw/dt = 7 − 2.5w.
    """
    crossing = np.log((2.5 - w0) / 1.5) / 2
    before, after = 3.0, 4.5
    decay = np.exp(-2 * crossing) * np.exp(-2.5 * (1 - crossing))
    return decay * after / before


@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd])
def test_derivatives_of_averaged_flows_are_refused(mode):
    with pytest.raises(ValueError, match="leave out what each jump contributes"):
        mode(lambda w: unit(w, solver=hf.Averaged()))(jnp.array([0.7]))


AVERAGED = {
    "decay": (jax.nn.relu, {"weight_decay": 0.1}),
    "table": (lambda z: jnp.interp(z, jnp.array([-1.0, 0, 2]), jnp.array([0.0, 1, 0])), {}),
    "loop": (lambda z: jax.lax.fori_loop(0, 2, lambda _, h: jnp.abs(h) - 0.2, z), {}),
    "root of a square": (lambda z: jnp.sqrt(z**2), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGED)
@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd])
def test_derivatives_of_flows_that_are_averaged_unasked_are_refused(name, mode):
    activation, options = AVERAGED[name]

    class Net(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return jnp.sum(activation(self.w @ x), keepdims=True)

    weights = jnp.array([[0.5, -1.0], [1.0, 0.3]])

    def end(scale):
        run = hf.flow(Net(scale * weights), (X, LABELS), 0.3, throw=False, **options)
        return jnp.sum(run.model.w**2)

    with pytest.raises(ValueError, match="leave out what each jump contributes"):
        mode(end)(1.0)


def test_derivatives_of_the_exact_flow_have_what_is_left_out():
    exact = jax.jacfwd(lambda w: unit(w, solver=hf.Filippov()))(jnp.array([0.7]))
    np.testing.assert_allclose(exact, slope_of_the_exact_end(0.7), rtol=1e-6)


def test_derivatives_of_smooth_parts_of_kinked_models_are_taken():
    """Only what moves meets kinks: here the layer after them."""
    model, (x, y) = relu_regression()
    last = jax.tree.map(lambda _: False, model)
    last = eqx.tree_at(lambda m: m.layers[-1].weight, last, True)

    def end(scale):
        run = hf.flow(model, (x, scale * y), 0.5, trainable=last, throw=False)
        return run.losses[-1]

    slope = (end(1.001) - end(0.999)) / 0.002
    np.testing.assert_allclose(jax.grad(end)(1.0), slope, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-160])
def test_an_estimate_is_no_less_than_the_error_of_the_same_few_steps(size):
    """Of dw/dt = 2w, by steps of both solves that the first step size makes alike."""

    def objective(w, data):
        return -data * jnp.sum(jnp.where(w > 0, 1.0, 0.5) * w**2)

    start = size * jnp.array([1.0, 2.0])
    run = hf.flow(
        start, jnp.ones(()), 1e-3, objective=objective, rtol=1e-4, solver=hf.Averaged()
    )
    error = jnp.max(jnp.abs(run.model / start / jnp.exp(2e-3) - 1))
    assert error < 3 * run.stats["error_estimate"]
    np.testing.assert_allclose(run.stats["error_estimate"], 1e-4, rtol=1e-6)
