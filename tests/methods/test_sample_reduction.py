"""Few samples in place of many: where it is the same, and where it must not be done."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tasks import task_of

import homoflow as hf
from homoflow._jaxpr import Degree, degree_in, inner_jaxprs
from homoflow._methods._sample_reduction import _few_samples, reduce_samples
from homoflow._problem._problem import make_problem

SAMPLES = 200
KEY = jr.key(0)


def normal(seed, *shape):
    return jr.normal(jr.key(seed), shape)


def plain_squared_loss(prediction, target):
    """Not known to be what it is: nothing is done about the samples."""
    return 0.5 * jnp.sum((prediction - target) ** 2)


def posed(model, x, y, loss=hf.SquaredLoss()):  # noqa: B008
    return make_problem(model, (x, y), loss=loss)


def reduced(problem):
    """The problem with fewer samples, and what is said of it."""
    task = reduce_samples(task_of(problem, laws=()))
    return task.problem, task.sample_reduction


class Residual(eqx.Module):
    """x + Wx + b, by operations of many kinds."""

    w: jax.Array
    b: jax.Array

    def __call__(self, x):
        rows = jnp.stack([jnp.sum(row * x) for row in self.w])
        moved = jnp.where(jnp.arange(4) > 1, x, -x)[::-1] / jnp.exp(self.b)
        padded = jnp.pad(jnp.concatenate([x[:2], moved]), (1, 0))
        return x + rows + jax.checkpoint(jnp.negative)(padded[3:]) + self.b


def with_biases(model):
    where = lambda m: [layer.bias for layer in m.layers]  # noqa: E731
    drawn = [normal(20 + i, *b.shape) for i, b in enumerate(where(model))]
    return eqx.tree_at(where, model, drawn)


LINEAR = functools.partial(hf.MLP, activation="linear", key=KEY)
CASES = {
    "deep linear": (LINEAR((6, 5, 4, 3)), (6,), 9),
    "biases": (with_biases(LINEAR((6, 5, 3), use_bias=True)), (6,), 10),
    "convolution": (
        hf.ConvNet((1, 7), (2,), 3, kernel_size=3, activation="linear", key=KEY),
        (1, 7),
        10,
    ),
    "residual": (Residual(normal(1, 4, 4), normal(2, 4)), (4,), 9),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_same_to_rounding(name):
    model, shape, few = CASES[name]
    x = normal(3, SAMPLES, *shape) + 10.0  # A mean far from zero is what cancels.
    y = normal(4, SAMPLES, *jax.eval_shape(model, x[0]).shape)
    problem = posed(model, x, y)
    smaller, note = reduced(problem)
    assert smaller.data[0].shape == (few, *shape)
    assert f"200 samples as {few}" in note
    weights = jax.tree.map(lambda w: 1.5 * w + 0.1, problem.weights)
    value, gradient = jax.value_and_grad(problem.loss)(weights)
    value_of_few, gradient_of_few = jax.value_and_grad(smaller.loss)(weights)
    np.testing.assert_allclose(value_of_few, value, rtol=1e-13)
    for few_, all_ in zip(
        jax.tree.leaves(gradient_of_few), jax.tree.leaves(gradient), strict=True
    ):
        scale = float(jnp.max(jnp.abs(all_)))
        np.testing.assert_allclose(few_, all_, rtol=0, atol=1e-12 * scale)


def test_a_loss_of_zero_stays_zero_to_rounding_squared():
    """Where a Gram matrix of the data would leave 1e-16 of ‖Y‖²."""
    model = LINEAR((6, 3))
    x = normal(3, SAMPLES, 6)
    problem = posed(model, x, x @ model.layers[0].weight.T)
    smaller, _ = reduced(problem)
    assert abs(smaller.loss(problem.weights)) < 1e-28


@jax.custom_jvp
def doubled(z):
    return 2 * z


@doubled.defjvp
def _(primals, tangents):
    return 2 * primals[0], 3 * tangents[0]


@pytest.mark.parametrize(
    ("name", "fn"),
    {
        "relu": lambda x, w: jax.nn.relu(w @ x),
        "square": lambda x, w: (w @ x) ** 2,
        "product with itself": lambda x, w: x * (w @ x),
        "attention": lambda x, w: x @ (w @ x) * x,
        "normalized": lambda x, w: w @ (x / jnp.sum(x)),
        "absolute value": lambda x, w: w @ jnp.abs(x),
        "softplus": lambda x, w: jax.nn.softplus(w @ x),
        "sorted": lambda x, w: w @ jnp.sort(x),
        "largest": lambda x, w: w @ x * jnp.max(x),
        "sign decides": lambda x, w: jnp.where(x > 0, w @ x, 2 * x),
        "rounded to half precision": lambda x, w: (w @ x).astype(jnp.float16) * 1.0,
        "truth as a number": lambda x, w: w @ (x > 0).astype(x.dtype),
        "an index from x": lambda x, w: w[x[0].astype(int)],
        "a derivative rule of its own": lambda x, w: doubled(w @ x),
        "a stopped derivative": lambda x, w: w @ jax.lax.stop_gradient(w @ x),
        "a loop": lambda x, w: jax.lax.fori_loop(0, 2, lambda i, z: w @ z, x),
    }.items(),
)
def test_what_is_not_proved_linear_is_not(name, fn):
    assert degree_in(fn, normal(0, 4), normal(1, 4, 4)) is Degree.UNKNOWN, name


def test_degrees_are_told_apart():
    def degree(fn):
        return degree_in(fn, normal(0, 4), normal(1, 4, 4))

    assert degree(lambda x, w: jnp.tanh(w)) is Degree.CONSTANT
    assert degree(lambda x, w: jnp.tanh(w) @ x + 0.0) is Degree.LINEAR
    assert degree(lambda x, w: w @ x + jnp.sum(w)) is Degree.AFFINE
    assert degree(lambda x, w: jnp.pad(x, 1)) is Degree.LINEAR
    assert degree(lambda x, w: jnp.pad(x, 1, constant_values=1)) is Degree.AFFINE


def test_samples_stay_where_it_does_not_pay_or_is_not_the_same():
    x, y, linear = normal(3, SAMPLES, 6), normal(4, SAMPLES, 3), LINEAR((6, 5, 3))
    with_bias = LINEAR((6, 5, 3), use_bias=True)
    stay = (
        posed(hf.MLP((6, 5, 3), key=KEY), x, y),
        posed(hf.MLP((6, 5, 3), activation=hf.Power(2), key=KEY), x, y),
        posed(linear, x, y, hf.HuberLoss()),
        posed(linear, x, y, plain_squared_loss),
        posed(with_bias, x, y, hf.SquaredLoss("sum")),
        posed(linear, x[:11], y[:11]),
    )
    for problem in stay:
        same, note = reduced(problem)
        assert same is problem
        assert note is None
    moved, _ = reduced(posed(linear, x, y, hf.SquaredLoss("sum")))
    weights = moved.weights
    expected = posed(linear, x, y, hf.SquaredLoss("sum")).loss(weights)
    np.testing.assert_allclose(moved.loss(weights), expected, rtol=1e-13)


@pytest.mark.parametrize("rank", [6, 3], ids=["full rank", "dependent columns"])
def test_derivatives_with_respect_to_data(rank):
    """What a derivative through a flow is made of: d/d(X, Y) of ∇L(w)."""
    model = with_biases(LINEAR((6, 3), use_bias=True))
    x = normal(3, SAMPLES, rank) @ normal(5, rank, 6)
    y = normal(4, SAMPLES, 3)
    direction = normal(6, SAMPLES, 6), normal(7, SAMPLES, 3)

    def velocity(data, prepare):
        problem = prepare(posed(model, *data))
        return jax.tree.leaves(jax.grad(problem.loss)(problem.weights))

    def derivatives(prepare):
        def moved(data):
            return jax.jvp(lambda d: velocity(d, prepare), (data,), (direction,))[1]

        def pulled(data):
            return sum(jnp.sum(jnp.sin(g)) for g in velocity(data, prepare))

        return moved((x, y)), jax.grad(pulled)((x, y))

    all_, few = map(derivatives, (lambda p: p, lambda p: reduced(p)[0]))
    for a, b in zip(jax.tree.leaves(all_), jax.tree.leaves(few), strict=True):
        np.testing.assert_allclose(
            b, a, rtol=0, atol=1e-12 * float(jnp.max(jnp.abs(a)))
        )


def test_second_derivatives_with_respect_to_data():
    model = LINEAR((2, 1))

    def loss(x, prepare):
        problem = prepare(posed(model, x, jnp.sin(x[:, :1])))
        return jnp.exp(problem.loss(problem.weights))

    x = normal(3, 9, 2)
    expected = jax.hessian(loss)(x, lambda p: p)
    np.testing.assert_allclose(
        jax.hessian(loss)(x, lambda p: reduced(p)[0]), expected, atol=1e-12
    )


def test_what_is_not_finite_stays_so():
    y = normal(4, SAMPLES, 3)
    for bad in (jnp.nan, jnp.inf):
        x = normal(3, SAMPLES, 6).at[7, 2].set(bad)
        few = _few_samples(x, y, True, True)
        assert not np.all(np.isfinite(np.concatenate(few, axis=1)))


X, Y = normal(3, SAMPLES, 4), normal(4, SAMPLES, 2)


def biased(key):
    return hf.MLP((4, 3, 2), activation="linear", use_bias=True, key=key)


def run(model, data, loss):
    # Adaptive steps answer to rounding in an error estimate of 1e-12.
    return hf.flow(
        model, data, 3.0, ts=[0.0, 1.0, 3.0], loss=loss,
        solver=dfx.Heun(), stepsize_controller=dfx.ConstantStepSize(), dt0=0.1,
        adjoint=dfx.ForwardMode(),
    )  # fmt: skip


def test_flows_and_their_derivatives_are_the_same():
    """And the losses' derivative along a change of the data."""

    @eqx.filter_jit
    def moved(x, loss):
        def losses(x):
            trajectory = run(biased(KEY), (x, Y), loss)
            return trajectory.losses, trajectory

        _, *answer = jax.jvp(losses, (x,), (jnp.cos(x),), has_aux=True)
        return answer

    few_moved, few = moved(X, hf.SquaredLoss())
    all_moved, all_ = moved(X, plain_squared_loss)
    assert few.stats["sample_reduction"].startswith("200 samples as 7")
    assert all_.stats["sample_reduction"] is None
    assert np.all(np.abs(all_moved[1:]) > 1e-4)
    compared = lambda r: (r.losses, r.grad_norms, r.laws, r.squared_norms, r.model)  # noqa: E731
    for a, b in zip(
        jax.tree.leaves(eqx.filter((compared(all_), all_moved), eqx.is_array)),
        jax.tree.leaves(eqx.filter((compared(few), few_moved), eqx.is_array)),
        strict=True,
    ):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


def factorizations(jaxpr, inside=()):
    """Shapes that QR factorizations of a program take, and what they stand inside of."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("geqrf", "qr"):
            yield eqn.invars[0].aval.shape, inside
        for body in inner_jaxprs(eqn):
            yield from factorizations(body.jaxpr, (*inside, eqn.primitive.name))


def test_one_factorization_before_the_loop_for_all_seeds():
    models = eqx.filter_vmap(biased)(jr.split(KEY, 2))

    def sweep(x, y):
        one = lambda model: run(model, (x, y), hf.SquaredLoss()).losses  # noqa: E731
        return eqx.filter_vmap(one)(models)

    program = jax.make_jaxpr(sweep)(X, Y)
    ((shape, inside),) = factorizations(program.jaxpr)
    assert shape == (SAMPLES, 4 + 2 + 1)
    assert not {"while", "scan"} & set(inside)


def test_float32():
    model = hf.MLP((6, 3), activation="linear", key=KEY, dtype=jnp.float32)
    problem = posed(model, normal(3, SAMPLES, 6), normal(4, SAMPLES, 3))
    smaller, _ = reduced(problem)
    assert smaller.data[0].dtype == smaller.data[1].dtype == jnp.float32
    weights = problem.weights
    np.testing.assert_allclose(smaller.loss(weights), problem.loss(weights), rtol=1e-6)
