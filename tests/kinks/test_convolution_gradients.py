"""Gradients by kernels of convolutions, from patches, against JAX's own derivatives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import homoflow as hf
from homoflow._jaxpr import expose_kinks
from homoflow._kinks import as_system
from homoflow._kinks._active_pairs import ActivePairs

#: name: (shapes of image and kernel, arguments of the convolution)
CONVOLUTIONS = {
    "1-d": ((2, 3, 7), (4, 3, 3), {}),
    "stride, padding": (
        (1, 2, 6, 5), (3, 2, 3, 2),
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 1))},
    ),
    "cropped, all dilated": (
        (1, 2, 4, 6), (3, 2, 2, 3),
        {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "padding": ((-1, 1), (1, 0))},
    ),
    "groups": ((1, 6, 4, 4), (9, 2, 2, 2), {"feature_group_count": 3}),
    "channels last": (
        (2, 5, 4, 3), (2, 3, 3, 4),
        {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "padding": "SAME"},
    ),
    "3-d": ((1, 1, 3, 4, 3), (2, 1, 2, 2, 2), {"window_strides": (1, 2, 1)}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("image", "kernel", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS
)
def test_patches_give_the_gradient_by_the_kernel(image, kernel, options):
    draw = np.random.default_rng(0).standard_normal
    x, w = jnp.asarray(draw(image)), jnp.asarray(draw(kernel))
    options = {"window_strides": (1,) * (w.ndim - 2), "padding": "VALID", **options}

    def fn(w, others, x):
        return jax.nn.relu(lax.conv_general_dilated(x, w, **options)).sum()

    function = expose_kinks(fn, w, (), x)
    (convolution,) = function.convolutions
    assert function.products == ()
    lift, taps = jnp.zeros(function.count), [jnp.zeros(convolution.shape)]

    @jax.jit
    def both(w, slopes):
        def value(w, taps):
            prediction, z = function.evaluate_with_taps(w, taps, slopes, lift, (), x)
            return prediction + z[0] * z[1]

        truth, (delta,) = jax.grad(value, (0, 1))(w, taps)
        (seen,) = function.evaluate(w, slopes, lift, (), x)[2]
        patches = convolution.patches(seen)
        assert patches.size == convolution.patch_size
        return convolution.gradient(convolution.by_position(delta), patches), truth

    found, truth = both(w, draw(function.count))
    np.testing.assert_allclose(found, truth, rtol=1e-13, atol=1e-13)


def test_a_kernel_that_enters_twice_or_changed_is_none():
    x, w = jnp.ones((1, 2, 6)), jnp.ones((2, 2, 3))

    def twice(w, _, x):
        return jax.nn.relu(lax.conv(lax.conv(x, w, (1,), "SAME"), w, (1,), "SAME"))

    def changed(w, _, x):
        return jax.nn.relu(lax.conv(x, 2 * w, (1,), "SAME"))

    for fn in (twice, changed):
        assert expose_kinks(fn, w, (), x).convolutions == ()


class Network(eqx.Module):
    """Kernels that are factored and one that is not, biases, and a matrix."""

    first: eqx.nn.Conv2d
    shared: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        for _ in range(1 if self.shared.use_bias else 2):
            x = jax.nn.relu(self.shared(x))
        return self.last(x.ravel())


def network(is_shared: bool):
    keys = jr.split(jr.key(0), 3)
    return Network(
        eqx.nn.Conv2d(1, 2, 2, key=keys[0]),
        eqx.nn.Conv2d(2, 2, 2, padding="SAME", use_bias=not is_shared, key=keys[1]),
        eqx.nn.Linear(18, 3, key=keys[2]),
    )


@pytest.mark.parametrize("is_shared", [False, True])
def test_rows_and_gradient_of_a_convolutional_network(is_shared):
    x, y = jr.normal(jr.key(3), (4, 1, 4, 4)), jr.normal(jr.key(4), (4, 3))
    problem = hf.make_problem(network(is_shared), (x, y))
    system = as_system(problem)
    assert len(system.function.convolutions) == (1 if is_shared else 2)
    w, _ = ravel_pytree(problem.weights)
    random, shape = np.random.default_rng(1), system.low.shape
    chosen = random.random(shape) < 0.1

    @jax.jit
    def both(w, slopes, v, u):
        pairs = ActivePairs.from_mask(jnp.asarray(chosen), 16)
        found = system.derivatives(w, slopes, pairs)
        rows = found.rows
        ours = (
            found.gradient,
            rows.gram(),
            rows.squared_norms(),
            system.layout.jvp(rows, v),
            system.layout.vjp(rows, u),
        )
        z_of = lambda w: system.preactivations(w, slopes, 0 * slopes).ravel()  # noqa: E731
        jacobian = jax.jacfwd(z_of)(w)[pairs.flat_index]
        gram = jacobian @ jacobian.T
        gradient = jax.grad(lambda w: system.loss(w, slopes)[0])(w)
        theirs = gradient, gram, jnp.diagonal(gram), jacobian @ v, u @ jacobian
        return ours, theirs

    v, u = random.standard_normal(w.size), random.standard_normal(16)
    for found, truth in zip(*both(w, random.random(shape), v, u), strict=True):
        scale = np.abs(truth).max()
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-13 * scale)
