"""Kinks are found in a traced function wherever they hide, and only there."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import homoflow as hf
from homoflow._jaxpr import nonsmooth_primitives


def as_number(truth, like):
    return truth.astype(like.dtype)


@jax.custom_vjp
def abs_with_own_rule(w):
    return jnp.abs(w)


abs_with_own_rule.defvjp(
    lambda w: (jnp.abs(w), jnp.sign(w)), lambda sign, g: (sign * g,)
)


@jax.jit
def elu(w, alpha=1.0):
    return jnp.where(w > 0, w, alpha * w)


def namesake(w):
    return elu(w, 0.5)


@jax.custom_jvp
def straight_through(w):
    """A sign whose derivative is said to be 1."""
    return jnp.sign(w)


@jax.custom_jvp
def half_square(w):
    """w²/2, whose derivative is said to be relu(w)."""
    return w**2 / 2


@jax.custom_jvp
def sine(w):
    return jnp.sin(w)


straight_through.defjvps(lambda d, out, w: d)
half_square.defjvps(lambda d, out, w: jnp.where(w > 0, w, 0) * d)
sine.defjvps(lambda d, out, w: jnp.cos(w) * d)


def rounded_through(w):
    return w + lax.stop_gradient(jnp.round(w) - w)


def counted(w):
    """A loop that uses its counter as a number."""
    return lax.fori_loop(
        0, 3, lambda i, h: h + jnp.tanh(0.1 * i.astype(h.dtype)) * h, w
    )


def knots(w):
    return jnp.linspace(-2.0, 2.0, 5, dtype=w.dtype)


KINKED = {
    "root of a square": (lambda w: jnp.sqrt(w**2), "sqrt"),
    "root of a product": (lambda w: jnp.sqrt(3 * (w * w)), "sqrt"),
    "power 1/2 of a square": (lambda w: (w**2) ** 0.5, "pow"),
    "straight-through sign": (straight_through, "sign"),
    "straight-through rounding": (rounded_through, "round"),
    "own rule that jumps": (half_square, "half_square"),
    "table": (lambda w: jnp.interp(w, knots(w), jnp.abs(knots(w))), "gather"),
    "place found by search": (
        lambda w: knots(w)[jnp.searchsorted(knots(w), w)] * w, "gather",
    ),
    "relu": (jax.nn.relu, "relu"),
    "relu6": (jax.nn.relu6, "relu6"),
    "leaky relu": (jax.nn.leaky_relu, "leaky_relu"),
    "absolute value": (jnp.abs, "abs"),
    "maximum of two": (lambda w: jnp.maximum(w, w[::-1]), "max"),
    "largest entry": (jnp.max, "reduce_max"),
    "clip": (lambda w: jnp.clip(w, -1.0, 1.0), "max"),
    "where": (lambda w: jnp.where(w > 0, w, 2 * w), "select_n"),
    "mask times number": (lambda w: w * as_number(w > 0, w), "convert_element_type"),
    "rounded down": (lambda w: w * jnp.floor(w), "floor"),
    "sort": (jnp.sort, "sort"),
    "max-pool": (lambda w: eqx.nn.MaxPool1d(2)(w[None]), "reduce_window_max"),
    "jit": (jax.jit(lambda w: jnp.abs(w) + 1), "abs"),
    "vmap": (jax.vmap(jnp.abs), "abs"),
    "remat": (jax.checkpoint(lambda w: jnp.abs(w) + 1), "abs"),
    "scan": (
        lambda w: lax.scan(lambda c, x: (jnp.abs(c) * x, c), w[0], w)[0],
        "abs",
    ),
    "fori_loop": (lambda w: lax.fori_loop(0, 3, lambda _, c: jnp.abs(c) - 1, w), "abs"),
    "while_loop": (
        lambda w: lax.while_loop(
            lambda carry: carry[1] < 3,
            lambda carry: (jnp.abs(carry[0]) - 1, carry[1] + 1),
            (w, 0),
        )[0],
        "abs",
    ),
    "branch of cond": (lambda w: lax.cond(jnp.array(True), jnp.abs, jnp.sin, w), "abs"),
    "choice of cond": (lambda w: lax.cond(w[0] > 0, jnp.sin, jnp.cos, w), "cond"),
    "custom_vjp": (abs_with_own_rule, "abs"),
    "elu with alpha 2": (lambda w: jax.nn.elu(w, 2.0), "elu"),
    "selu": (jax.nn.selu, "selu"),
    "namesake of elu": (namesake, "elu"),
    "maximum of 0 and a difference": (
        lambda w: jnp.maximum(0.0, jnp.mean(w**2) - jnp.mean(w) ** 2 - 1), "max",
    ),
    "square of relu6, at 6": (lambda w: jax.nn.relu6(w) ** 2, "relu6"),
    "square of max(w, 1)": (lambda w: jnp.maximum(w, 1.0) ** 2, "max"),
    "square of the largest": (lambda w: jnp.max(w) ** 2, "reduce_max"),
    "relu used twice, once squared": (
        lambda w: jax.nn.relu(w) ** 2 + jax.nn.relu(w),
        "relu",
    ),
}  # fmt: skip

SMOOTH = {
    "root of a square and a number": lambda w: jnp.sqrt(w**2 + 1),
    "norm": jnp.linalg.norm,
    "power 3/2 of a square": lambda w: (w**2) ** 1.5,
    "own rule that is smooth": sine,
    "loop with its counter": counted,
    "scan over times": lambda w: lax.scan(
        lambda h, t: (jnp.tanh(h + t), None), w, jnp.arange(3.0)
    )[0],
    "table of the data": lambda w: w * jnp.interp(0.5, knots(w), knots(w) ** 2),
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": jax.nn.logsumexp,
    "logaddexp": lambda w: jnp.logaddexp(w, -w),
    "elu": jax.nn.elu,
    "elu with a given alpha": jax.vmap(lambda w: jax.nn.elu(w, 1)),
    "celu": lambda w: jax.nn.celu(w, 0.5),
    "layer normalization": eqx.nn.LayerNorm(4),
    "maximum of 0 and a sum of squares": lambda w: jnp.maximum(jnp.sum(w * w), 0.0),
    "polynomial": lambda w: w**3 - w,
    "sum of products": lambda w: jnp.einsum("i,j->ij", w, w).sum(),
    "square of relu": lambda w: jax.nn.relu(w) ** 2,
    "square of max(w, 0)": lambda w: jnp.maximum(w, 0.0) ** 2,
    "square of leaky relu": lambda w: jax.nn.leaky_relu(w) ** 2,
    "cube of absolute value": lambda w: jnp.abs(w) ** 3,
    "square of relu under vmap": jax.vmap(lambda w: jax.nn.relu(w) ** 2),
    "scan of tanh": lambda w: lax.scan(lambda c, x: (jnp.tanh(c) * x, c), w[0], w)[0],
    "stopped gradient": lambda w: w * lax.stop_gradient(jax.nn.relu(w)),
    "kink that is thrown away": lambda w: (jnp.abs(w), jnp.sin(w))[1],
}


@pytest.mark.parametrize(("fn", "name"), KINKED.values(), ids=KINKED)
def test_kinked_functions_are_found_and_named(fn, name):
    for dtype in (jnp.float32, jnp.float64):
        assert name in nonsmooth_primitives(fn, jnp.ones(4, dtype))


@pytest.mark.parametrize("fn", SMOOTH.values(), ids=SMOOTH)
def test_smooth_functions_have_no_kink(fn):
    assert nonsmooth_primitives(fn, jnp.ones(4)) == ()


def largest_gradient_change(fn, step):
    """max ‖∇f(w_{i+1}) − ∇f(w_i)‖∞ along a line that meets every kink of the tables."""
    start = jnp.array([-1.5003, -0.1007, 2.0011, -0.9001])
    direction = jnp.array([1.0, 0.7, -0.4, 0.9])
    gradient = jax.grad(lambda w: jnp.sum(fn(w)))
    distances = jnp.arange(0.0, 9.0, step)
    gradients = lax.map(lambda s: gradient(start + s * direction), distances)
    return float(jnp.max(jnp.abs(jnp.diff(gradients, axis=0))))


@pytest.mark.parametrize(
    "name", ["relu", "clip", "where", "mask times number", "choice of cond"]
    + ["elu with alpha 2", "selu", "namesake of elu"]
    + [name for name in KINKED if name.startswith("square of")]
)  # fmt: skip
def test_gradient_of_a_kinked_function_does_jump(name):
    fn, _ = KINKED[name]
    coarse, fine = (largest_gradient_change(fn, step) for step in (1e-2, 1e-4))
    assert fine > 0.5 * coarse


@pytest.mark.parametrize(
    ("name", "rtol"),
    # The gradients of the powers are linear between their kinks.
    [(name, 1e-6) for name in SMOOTH if name.startswith("square of")]
    + [("elu", 1e-2), ("celu", 1e-2)],
)
def test_gradient_of_a_flattened_kink_is_continuous(name, rtol):
    coarse, fine = (largest_gradient_change(SMOOTH[name], s) for s in (1e-2, 1e-3))
    np.testing.assert_allclose(fine, coarse / 10, rtol=rtol)


def test_only_kinks_in_the_weights_count():
    x = jnp.linspace(-1.0, 1.0, 4)

    def linear_in_weights(w, x):
        return w @ jax.nn.relu(x) + jnp.where(x > 0, w, 2 * w).sum()

    assert nonsmooth_primitives(linear_in_weights, x, x) == ()
    assert nonsmooth_primitives(lambda x, w: linear_in_weights(w, x), x, x) == (
        "relu",
        "select_n",
    )


def test_names_are_sorted_and_not_repeated():
    def fn(w):
        return jnp.abs(jax.nn.relu(w) + jnp.abs(w)) + jnp.sort(w)

    assert nonsmooth_primitives(fn, jnp.ones(4)) == ("abs", "relu", "sort")


def test_shapes_alone_are_enough():
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    assert nonsmooth_primitives(jnp.abs, shape) == ("abs",)


@pytest.mark.parametrize(
    ("activation", "kinks"),
    [
        ("relu", ("relu",)),
        ("leaky_relu", ("leaky_relu",)),
        ("abs", ("abs",)),
        ("linear", ()),
        (hf.Power(3), ()),
        (hf.ReLUPower(1), ("relu",)),
        (hf.ReLUPower(2), ()),
        (jnp.tanh, ()),
        (jax.nn.gelu, ()),
    ],
)
def test_kinks_of_a_network_are_those_of_its_activation(activation, kinks, getkey):
    model = hf.MLP((3, 4, 2), activation=activation, key=getkey())
    arrays, static = eqx.partition(model, eqx.is_array)

    def predict(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    assert nonsmooth_primitives(predict, arrays, jnp.ones((5, 3))) == kinks
