"""Kinks laid open: the transformed function is the model, whatever it is made of."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import homoflow as hf
from homoflow._jaxpr import with_kinks

IN = 4


def square(w):
    return w[: IN * IN].reshape(IN, IN)


#: name: (function of 20 weights and a sample, number of kinks, depth)
FOLLOWED = {
    "relu": (lambda w, x: jax.nn.relu(square(w) @ x), 4, 1),
    "relu under vmap": (lambda w, x: jax.vmap(jax.nn.relu)(square(w) @ x), 4, 1),
    "relu in jit": (jax.jit(lambda w, x: jax.nn.relu(w[:4] * x)), 4, 1),
    "relu in remat": (jax.checkpoint(lambda w, x: jax.nn.relu(w[:4] * x)), 4, 1),
    "leaky relu": (lambda w, x: jax.nn.leaky_relu(w[:4] * x, 0.3), 4, 1),
    "absolute value": (lambda w, x: jnp.abs(w[:4] * x), 4, 1),
    "max with 0": (lambda w, x: jnp.maximum(w[:4] * x, 0.0), 4, 1),
    "0 with max": (lambda w, x: jnp.maximum(0.0, w[:4] * x), 4, 1),
    "min with 0": (lambda w, x: jnp.minimum(w[:4] * x, 0.0), 4, 1),
    "max of multiples": (lambda w, x: lax.max(w[:4] * x, 0.1 * (w[:4] * x)), 0, 0),
    "clip from below": (lambda w, x: jnp.clip(w[:4] * x, 0.0), 4, 1),
    "two layers": (
        lambda w, x: jax.nn.relu(square(w) @ jax.nn.relu(square(w) @ x)), 8, 2,
    ),
    "residual": (lambda w, x: x + jax.nn.relu(square(w) @ (x + jnp.abs(w[:4]))), 8, 2),
    "grid of kinks": (lambda w, x: jax.nn.relu(jnp.outer(w[:3], x)).sum(0), 12, 1),
    "squared relu stays": (lambda w, x: jax.nn.relu(w[:4] * x) ** 2, 0, 0),
    "kink in the data": (lambda w, x: w[:4] * jax.nn.relu(x), 0, 0),
    "softmax": (lambda w, x: jax.nn.softmax(w[:4] * x), 0, 0),
    "relu then softplus": (lambda w, x: jax.nn.softplus(jax.nn.relu(w[:4] * x)), 4, 1),
}  # fmt: skip


def max_of_multiples(w, x):
    z = w[:4] * x
    return jnp.maximum(z, 0.1 * z)


def where_of_multiples(w, x):
    z = w[:4] * x
    return jnp.where(z > 0, 2.0 * z, -0.5 * z)


def where_with_zero(w, x):
    z = w[:4] * x
    return jnp.where(z < 0, 0.0, z) + jnp.where(z <= 0, z, 0)


FOLLOWED["max of multiples"] = (max_of_multiples, 4, 1)
FOLLOWED["where of multiples"] = (where_of_multiples, 4, 1)
FOLLOWED["where with zero"] = (where_with_zero, 8, 1)


@jax.custom_vjp
def own_rule(z):
    return jnp.abs(z)


own_rule.defvjp(lambda z: (jnp.abs(z), None), lambda _, g: (2 * g,))

REFUSED = {
    "relu6": (lambda w, x: jax.nn.relu6(w[:4] * x), "relu6"),
    "hard tanh": (lambda w, x: jax.nn.hard_tanh(w[:4] * x), "select_n"),
    "max with 1": (lambda w, x: jnp.maximum(w[:4] * x, 1.0), "max"),
    "maximum of two": (lambda w, x: jnp.maximum(w[:4], w[1:5] * x), "max"),
    "sort": (lambda w, x: jnp.sort(w[:4] * x), "sort"),
    "largest": (lambda w, x: jnp.max(w[:4] * x), "reduce_max"),
    "max-pool": (
        lambda w, x: eqx.nn.MaxPool1d(2)((w[:4] * x)[None]), "reduce_window_max",
    ),
    "floor": (lambda w, x: w[:4] * jnp.floor(w[:4] * x), "floor"),
    "jump": (lambda w, x: jnp.where(w[:4] * x > 0, x, 2.0 * x), "select_n"),
    "learned slope": (
        lambda w, x: jnp.where(w[:4] * x > 0, w[:4] * x, w[5] * (w[:4] * x)),
        "select_n",
    ),
    "scan": (
        lambda w, x: lax.scan(lambda c, a: (jnp.abs(c) * a, c), w[0], x)[0],
        "abs in scan",
    ),
    "while": (
        lambda w, x: lax.fori_loop(0, x.astype(int)[0], lambda _, c: jnp.abs(c), w),
        "abs in while",
    ),
    "branch of cond": (
        lambda w, x: lax.cond(x[0] > 0, jnp.abs, jnp.sin, w), "abs in cond",
    ),
    "custom derivative": (lambda w, x: own_rule(w[:4] * x), "own_rule"),
}  # fmt: skip


def weights_and_sample(seed=0):
    keys = jr.split(jr.key(seed))
    return jr.normal(keys[0], (20,)), jr.normal(keys[1], (IN,))


def opened(fn, w, x):
    return with_kinks(lambda w, others, x: fn(w, x), w, (), x)


def true_slopes(function, w, others, x):
    """Slopes by the sign of z, from the bottom layer up, and the z they belong to."""
    none = jnp.zeros(function.count)
    low, high = function.slopes(w, others, x)
    slopes = low
    for _ in range(function.depth):
        _, z = function.forward(w, slopes, none, others, x)
        slopes = jnp.where(z > 0, high, low)
    return slopes


@pytest.mark.parametrize(("fn", "kinks", "depth"), FOLLOWED.values(), ids=FOLLOWED)
@pytest.mark.parametrize("seed", [0, 1])
def test_function_and_gradient_at_the_true_slopes(fn, kinks, depth, seed):
    w, x = weights_and_sample(seed)
    function = opened(fn, w, x)
    assert (function.count, function.depth, function.refused) == (kinks, depth, ())
    none = jnp.zeros(kinks)
    slopes = true_slopes(function, w, (), x) if kinks else none

    def transformed(w):
        return function.forward(w, slopes, none, (), x)[0]

    np.testing.assert_allclose(transformed(w), fn(w, x), rtol=1e-14, atol=1e-14)
    ours, truth = jax.jacobian(transformed)(w), jax.jacobian(fn)(w, x)
    np.testing.assert_allclose(ours, truth, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("fn", "name"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_named(fn, name):
    function = opened(fn, *weights_and_sample())
    assert name in function.refused


def test_slopes_of_each_kind():
    w, x = weights_and_sample()
    expected = {
        "relu": (0, 1), "leaky relu": (0.3, 1), "absolute value": (-1, 1),
        "min with 0": (1, 0), "max of multiples": (0.1, 1),
        "where of multiples": (-0.5, 2),
    }  # fmt: skip
    for name, (low, high) in expected.items():
        function = opened(FOLLOWED[name][0], w, x)
        lows, highs = function.slopes(w, (), x)
        np.testing.assert_array_equal(lows, low)
        np.testing.assert_array_equal(highs, high)


def test_operations_are_named_in_order_of_evaluation():
    def fn(w, x):
        z = jax.nn.leaky_relu(jax.nn.relu(jnp.outer(w[:3], x)), 0.1)
        return jnp.where(z > 0, 2.0 * z, -z).sum() + jnp.abs(w[0]) + max_of(w, x)

    def max_of(w, x):
        return jax.jit(lambda z: jnp.clip(z, 0.0))(w[:4] * x).sum()

    operations = opened(fn, *weights_and_sample()).operations
    names = [(o.name, o.shape) for o in operations]
    assert names == [
        ("relu", (3, 4)), ("leaky_relu", (3, 4)), ("select_n", (3, 4)), ("abs", ()),
        ("max", (4,)),
    ]  # fmt: skip


def test_lift_adds_to_what_the_kink_returns():
    w, x = weights_and_sample()
    function = opened(FOLLOWED["two layers"][0], w, x)
    slopes, lift = jnp.linspace(-1, 1, 8), jnp.linspace(2, 3, 8)
    first = square(w) @ x
    second = square(w) @ (slopes[:4] * first + lift[:4])
    prediction, z = function.forward(w, slopes, lift, (), x)
    np.testing.assert_allclose(z, jnp.concatenate([first, second]), rtol=1e-13)
    np.testing.assert_allclose(prediction, slopes[4:] * second + lift[4:], rtol=1e-13)


@pytest.mark.parametrize("transpose", [False, True])
def test_products_give_the_gradient_as_an_outer_product(transpose):
    matrix, x = jr.normal(jr.key(0), (IN, IN)), jr.normal(jr.key(1), (IN,))

    def fn(w, others, x):
        return jax.nn.relu(x @ w[0] if transpose else w[0] @ x) * w[1]

    weights = [matrix, jnp.ones(IN)]
    function = with_kinks(fn, weights, (), x)
    (product,) = function.products
    assert (product.leaf, product.is_transposed) == (0, transpose)
    slopes, lift = jnp.ones(IN), jnp.zeros(IN)

    def z_of_unit_1(taps):
        return function.tapped(weights, taps, slopes, lift, (), x)[1]

    (delta,) = jax.grad(z_of_unit_1)([jnp.zeros(IN)])
    (vector,) = function.opened(weights, slopes, lift, (), x)[2]
    truth = jax.grad(lambda w: function.forward(w, slopes, lift, (), x)[1][1])(weights)
    outer = np.outer(delta, vector)
    np.testing.assert_allclose(outer.T if transpose else outer, truth[0], rtol=1e-14)


def test_a_weight_that_enters_twice_is_no_product():
    w, x = weights_and_sample()
    matrix = square(w)
    function = with_kinks(lambda w, _, x: jax.nn.relu(w @ (w @ x)), matrix, (), x)
    assert function.products == ()


NETWORKS = {
    "dense": (hf.MLP((3, 5, 4, 2), key=jr.key(0)), 9, 2),
    "biases": (hf.MLP((3, 5, 2), use_bias=True, key=jr.key(0)), 5, 1),
    "leaky": (hf.MLP((3, 5, 2), activation="leaky_relu", key=jr.key(0)), 5, 1),
    "convolution": (
        hf.ConvNet((1, 5, 5), (2,), 3, hidden=(4,), key=jr.key(0)), 22, 2,
    ),
    "shared": (
        hf.SharedMLP([[[2, 1, 0], [0, 2, 1]], [[1, 2]]], key=jr.key(0)), 2, 1,
    ),
    "equinox": (eqx.nn.MLP(3, 2, 4, 2, key=jr.key(0)), 8, 2),
}  # fmt: skip


@pytest.mark.parametrize(("model", "kinks", "depth"), NETWORKS.values(), ids=NETWORKS)
def test_networks_at_their_true_slopes(model, kinks, depth):
    shape = (1, 5, 5) if isinstance(model, hf.ConvNet) else (3,)
    x = jr.normal(jr.key(7), shape)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def fn(w, others, x):
        return eqx.combine(w, rest)(x)

    function = with_kinks(fn, arrays, (), x)
    assert (function.count, function.depth, function.refused) == (kinks, depth, ())
    slopes, none = true_slopes(function, arrays, (), x), jnp.zeros(kinks)
    prediction, _ = function.forward(arrays, slopes, none, (), x)
    np.testing.assert_allclose(prediction, model(x), rtol=1e-13, atol=1e-15)
