"""Kinks laid open: the transformed function is the model, whatever it is made of."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array

import homoflow as hf
from homoflow._jaxpr import expose_kinks

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


def z_of(w, x):
    return 2 * w[:4] * x


def on_z(fn):
    return lambda w, x: fn(z_of(w, x))


def learned_slope(w, x):
    z = z_of(w, x)
    return jnp.where(z >= 0, z, w[5:9] * z)


def largest_by_choice(w, x):
    a, b = w[:4], w[4:8] * x
    return jnp.where(a > b, a, b) - jnp.where(a >= b, b, a)


def hat(z):
    return jnp.maximum(1 - jnp.abs(z), 0)


def pooled(size, **options):
    pool = eqx.nn.MaxPool1d(size, **options)
    return lambda w, x: pool(jnp.outer(w[:2], x))


def pooled_image(w, x):
    grid = jnp.outer(w[:5], jnp.concatenate([x, w[5:7]]))[None]
    return eqx.nn.MaxPool2d(2, 2, padding=1)(grid)


def window(init, operation, **options):
    def fn(w, x):
        return lax.reduce_window(
            jnp.outer(w[:3], x), init, operation, (2, 2), (2, 2), "VALID", **options
        )

    return fn


def used_twice(w, x):
    h = jax.nn.relu(z_of(w, x))
    return h.sum() + eqx.nn.MaxPool1d(2, 2)(h[None])


BOUNDS = np.array([0.3, -np.inf, 1e30, -1e30])

#: name: (function, kinks, depth). An element has one kink for each of its knots, and
#: the largest of n has n − 1.
AWAY_FROM_ZERO = {
    "relu6": (on_z(jax.nn.relu6), 8, 1),
    "hard tanh": (on_z(jax.nn.hard_tanh), 8, 1),
    "hard sigmoid": (on_z(jax.nn.hard_sigmoid), 8, 1),
    "hard swish": (on_z(jax.nn.hard_swish), 8, 1),
    "sparse sigmoid": (on_z(jax.nn.sparse_sigmoid), 8, 1),
    "hat": (on_z(hat), 8, 2),
    "max with 1": (on_z(lambda z: jnp.maximum(z, 1.0)), 4, 1),
    "min with a constant array": (on_z(lambda z: jnp.minimum(jnp.arange(4.0), z)), 4, 1),
    "min with data": (lambda w, x: jnp.minimum(z_of(w, x), x + 0.5), 4, 1),
    "clip": (on_z(lambda z: jnp.clip(z, -0.5, 1)), 8, 1),
    "clamp": (on_z(lambda z: lax.clamp(-0.5, z, 1.0)), 8, 1),
    "clip without an end": (on_z(lambda z: jnp.clip(z, -jnp.inf, 1.0)), 4, 1),
    "clip with far ends": (on_z(lambda z: jnp.clip(z, -1e30, 1e30)), 8, 1),
    "bounds that are never met": (on_z(lambda z: jnp.maximum(z, BOUNDS)), 4, 1),
    "soft threshold": (
        on_z(lambda z: jnp.maximum(z - 0.3, 0) - jnp.maximum(-z - 0.3, 0)), 8, 1,
    ),
    "where above a number": (on_z(lambda z: jnp.where(z > 0.5, z - 0.5, 0.0)), 4, 1),
    "where below a number": (on_z(lambda z: jnp.where(z < 0.5, 1 - z, 3 * z - 1)), 4, 1),
    "where of a shifted value": (on_z(lambda z: jnp.where(1 - z > 0, 1.0, z)), 4, 1),
    "where nothing changes": (on_z(lambda z: jnp.where(z > 0.5, z, 1.0 * z)), 0, 0),
    "elu with a kink": (on_z(lambda z: jax.nn.elu(z, 2.0)), 4, 1),
    "selu": (on_z(jax.nn.selu), 4, 1),
    "elu": (on_z(jax.nn.elu), 0, 0),
    "celu": (on_z(lambda z: jax.nn.celu(z, 0.7)), 0, 0),
    "relu of relu": (on_z(lambda z: jax.nn.relu(jax.nn.relu(z))), 4, 1),
    "absolute value of relu": (on_z(lambda z: jnp.abs(jax.nn.relu(z))), 4, 1),
    "learned slopes": (learned_slope, 4, 1),
}  # fmt: skip
OF_SEVERAL = {
    "maximum of two": (lambda w, x: jnp.maximum(w[:4], w[1:5] * x), 4, 1),
    "minimum of two": (lambda w, x: jnp.minimum(w[:4], w[1:5] * x), 4, 1),
    "where of two": (largest_by_choice, 8, 1),
    "maximum of nested": (
        lambda w, x: jnp.maximum(w[:4], jax.nn.relu(w[1:5] * x)), 8, 2,
    ),
    "largest": (on_z(jnp.max), 3, 2),
    "smallest": (on_z(jnp.min), 3, 2),
    "maxout": (lambda w, x: (square(w) @ x).reshape(2, 2).max(1), 2, 1),
    "largest over two axes": (
        lambda w, x: jnp.outer(w[:3], x).reshape(3, 2, 2).max((0, 2)), 10, 3,
    ),
    "largest of one": (lambda w, x: jnp.outer(w[:3], x[:1]).max(1), 0, 0),
    "max-pool": (pooled(2), 6, 1),
    "max-pool with stride": (pooled(3, stride=2, padding=1), 6, 2),
    "max-pool 2d": (pooled_image, 18, 2),
    "adaptive max-pool": (
        lambda w, x: eqx.nn.AdaptiveMaxPool1d(3)(jnp.outer(w[:2], x)), 2, 1,
    ),
    "smallest in a window": (window(jnp.inf, lax.min), 6, 2),
    "relu, then max-pool": (
        lambda w, x: pooled(2, stride=2)(jax.nn.relu(w[:2]), x), 2 + 4, 2,
    ),
    "max-pool of relu": (
        lambda w, x: eqx.nn.MaxPool1d(2, 2)(jax.nn.relu(jnp.outer(w[:2], x))), 8, 2,
    ),
    "relu of max-pool": (
        lambda w, x: jax.nn.relu(eqx.nn.MaxPool1d(2, 2)(jnp.outer(w[:2], x))), 8, 2,
    ),
    "relu used twice": (used_twice, 6, 2),
}  # fmt: skip
CALLS = {
    "cond with a constant": (on_z(lambda z: lax.cond(True, jnp.abs, jnp.sin, z)), 4, 1),
    "scan without kinks": (
        lambda w, x: jax.nn.relu(
            lax.scan(lambda c, a: (jnp.tanh(c * a), c), w[:4], x)[0]
        ), 4, 1,
    ),
    "remat in jit in vmap": (
        on_z(jax.vmap(jax.jit(jax.checkpoint(lambda z: jnp.abs(z) - 1)))), 4, 1,
    ),
    "variance kept from being negative": (on_z(eqx.nn.LayerNorm(4)), 0, 0),
}  # fmt: skip
FOLLOWED |= AWAY_FROM_ZERO | OF_SEVERAL | CALLS

REFUSED = {
    "sort": (lambda w, x: jnp.sort(w[:4] * x), "sort"),
    "median": (on_z(jnp.median), "sort"),
    "running maximum": (on_z(lax.cummax), "cummax"),
    "pool with overlapping windows": (
        pooled(3), "reduce_window_max with overlapping windows",
    ),
    "floor": (lambda w, x: w[:4] * jnp.floor(w[:4] * x), "floor (a jump)"),
    "sign": (on_z(lambda z: z * jnp.sign(z)), "sign (a jump)"),
    "rounded": (on_z(jnp.round), "round (a jump)"),
    "truth as a number": (
        on_z(lambda z: z * (z > 0).astype(z.dtype)), "convert_element_type (a jump)",
    ),
    "place of the largest": (lambda w, x: w[jnp.argmax(w)], "dynamic_slice"),
    "jump of the data": (lambda w, x: jnp.where(w[:4] * x > 0, x, 2.0 * x), "select_n"),
    "jump at 0": (on_z(lambda z: jnp.where(z > 0, z, z - 1)), "select_n (a jump)"),
    "jump at 1": (on_z(lambda z: jnp.where(z > 1, z, 0)), "select_n (a jump)"),
    "choice of smooth functions": (
        on_z(lambda z: jnp.where(z > 0, jnp.sin(z), z)), "select_n",
    ),
    "learned slope away from 0": (
        lambda w, x: jnp.where(z_of(w, x) > 1, z_of(w, x), w[5] * z_of(w, x)),
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
    return expose_kinks(lambda w, others, x: fn(w, x), w, (), x)


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
def test_function_and_gradient_at_the_true_slopes(fn, kinks, depth):
    function = opened(fn, *weights_and_sample())
    assert (function.count, function.depth, function.unsupported) == (kinks, depth, ())
    none = jnp.zeros(kinks)

    @jax.jit
    def both(w, x):
        slopes = true_slopes(function, w, (), x) if kinks else none

        def transformed(w):
            return function.forward(w, slopes, none, (), x)[0]

        ours, truth = transformed(w), fn(w, x)
        return ours, truth, jax.jacobian(transformed)(w), jax.jacobian(fn)(w, x)

    for seed in (0, 1):
        ours, truth, our_jacobian, jacobian = both(*weights_and_sample(seed))
        np.testing.assert_allclose(ours, truth, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(our_jacobian, jacobian, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("fn", "name"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_named(fn, name):
    function = opened(fn, *weights_and_sample())
    assert name in function.unsupported


@pytest.mark.parametrize(
    "options", [{"window_dilation": (2, 1)}, {"base_dilation": (1, 2)}]
)
def test_largest_in_dilated_windows(options):
    """JAX has no gradient of these to compare with."""
    fn = window(-jnp.inf, lax.max, **options)
    w, x = weights_and_sample()
    function = opened(fn, w, x)
    none = jnp.zeros(function.count)

    @jax.jit
    def transformed(w, x):
        return function.forward(w, true_slopes(function, w, (), x), none, (), x)[0]

    np.testing.assert_allclose(transformed(w, x), fn(w, x), rtol=1e-14)
    assert function.unsupported == ()


@pytest.mark.parametrize("name", ["jump at 0", "jump at 1"])
def test_a_jump_is_a_jump(name):
    fn, _ = REFUSED[name]
    w, x = weights_and_sample()
    knot = 1.0 if name == "jump at 1" else 0.0
    before, after = (fn(w.at[:4].set((knot + e) / (2 * x)), x) for e in (-1e-9, 1e-9))
    np.testing.assert_allclose(jnp.abs(after - before), 1, rtol=1e-6)


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


def test_slopes_and_lift_of_knots():
    """Each knot c has its own kink z − c, in units of a power of 2."""
    w, x = weights_and_sample()
    z, slopes, lift = z_of(w, x), jnp.linspace(-1, 1, 8), jnp.linspace(2, 3, 8)
    function = opened(FOLLOWED["relu6"][0], w, x)
    lows, highs = function.slopes(w, (), x)
    np.testing.assert_array_equal(lows, 0)
    np.testing.assert_array_equal(highs, [1] * 4 + [-8] * 4)
    prediction, pre = function.forward(w, slopes, lift, (), x)
    expected = jnp.concatenate([z, (z - 6) / 8])
    np.testing.assert_allclose(pre, expected, rtol=1e-13)
    np.testing.assert_allclose(
        prediction, (slopes * expected + lift).reshape(2, 4).sum(0), rtol=1e-13
    )


@pytest.mark.parametrize("name", ["maximum of two", "minimum of two"])
def test_slope_and_lift_between_two(name):
    w, x = weights_and_sample()
    a, b, slopes, lift = w[:4], w[1:5] * x, jnp.linspace(-1, 1, 4), jnp.arange(4.0)
    function = opened(FOLLOWED[name][0], w, x)
    low, high = function.slopes(w, (), x)
    np.testing.assert_array_equal(low, float(name == "minimum of two"))
    np.testing.assert_array_equal(high, float(name == "maximum of two"))
    prediction, z = function.forward(w, slopes, lift, (), x)
    np.testing.assert_allclose(z, a - b, rtol=1e-15)
    expected = slopes * a + (1 - slopes) * b + lift
    np.testing.assert_allclose(prediction, expected, rtol=1e-13)


def test_large_bounds_do_not_hide_other_kinks():
    """z of a bound that is never met has the size of the others'."""
    w, x = weights_and_sample()
    for name in ("clip with far ends", "bounds that are never met"):
        function = opened(FOLLOWED[name][0], w, x)
        none = jnp.zeros(function.count)
        _, z = function.forward(w, none, none, (), x)
        assert np.all(np.abs(z) < 10)


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
    function = expose_kinks(fn, weights, (), x)
    (product,) = function.products
    assert (product.leaf, product.is_transposed) == (0, transpose)
    slopes, lift = jnp.ones(IN), jnp.zeros(IN)

    def z_of_unit_1(taps):
        return function.evaluate_with_taps(weights, taps, slopes, lift, (), x)[1][1]

    (delta,) = jax.grad(z_of_unit_1)([jnp.zeros(IN)])
    (vector,) = function.evaluate(weights, slopes, lift, (), x)[2]
    truth = jax.grad(lambda w: function.forward(w, slopes, lift, (), x)[1][1])(weights)
    outer = np.outer(delta, vector)
    np.testing.assert_allclose(outer.T if transpose else outer, truth[0], rtol=1e-14)


def test_a_weight_that_enters_twice_is_no_product():
    w, x = weights_and_sample()
    matrix = square(w)
    function = expose_kinks(lambda w, _, x: jax.nn.relu(w @ (w @ x)), matrix, (), x)
    assert function.products == ()


def test_a_weight_with_a_kink_of_its_own_is_no_product():
    w, x = weights_and_sample()

    def fn(w, _, x):
        return jax.nn.relu(w @ x) + jnp.abs(w).sum(0)

    assert expose_kinks(fn, square(w), (), x).products == ()


class Attention(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=key)
        self.norm = eqx.nn.LayerNorm(4)
        self.mlp = eqx.nn.MLP(4, 4, 5, 1, key=key)

    def __call__(self, x):
        h = x + self.attention(x, x, x)
        return h + jax.vmap(self.mlp)(jax.vmap(self.norm)(h))


def sequential():
    keys = jr.split(jr.key(0))
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 2, 2, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Dropout(0.5, inference=True),
            eqx.nn.AvgPool2d(2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(2, 3, key=keys[1]),
            eqx.nn.Lambda(eqx.nn.PReLU()),
        ]
    )


class Shared(eqx.Module):
    """One layer three times, with skips and leaky slopes that are an array."""

    layer: eqx.nn.Linear
    slopes: Array

    def __call__(self, x):
        for _ in range(3):
            x = x + jax.nn.leaky_relu(self.layer(x), self.slopes)
        return jnp.linalg.norm(x)


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
    "attention": (Attention(jr.key(0)), 15, 1),
    "sequential": (sequential(), 2 * 4 * 3 + 2 * 4 + 3, 4),
    "learned slopes": (eqx.nn.MLP(3, 2, 4, 2, eqx.nn.PReLU(0.3), key=jr.key(0)), 8, 2),
    "shared leaky": (
        Shared(eqx.nn.Linear(3, 3, key=jr.key(0)), jnp.array([0.1, 0.2, 0.3])), 9, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "kinks", "depth"), NETWORKS.values(), ids=NETWORKS)
def test_networks_at_their_true_slopes(model, kinks, depth):
    shape = {hf.ConvNet: (1, 5, 5), eqx.nn.Sequential: (1, 5, 5), Attention: (3, 4)}
    shape = shape.get(type(model), (3,))
    x = jr.normal(jr.key(7), shape)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def fn(w, others, x):
        return eqx.combine(w, rest)(x)

    function = expose_kinks(fn, arrays, (), x)
    assert (function.count, function.depth, function.unsupported) == (kinks, depth, ())

    @jax.jit
    def transformed(arrays, x):
        slopes, none = true_slopes(function, arrays, (), x), jnp.zeros(kinks)
        return function.forward(arrays, slopes, none, (), x)[0]

    prediction = transformed(arrays, x)
    np.testing.assert_allclose(prediction, model(x), rtol=1e-13, atol=1e-15)
