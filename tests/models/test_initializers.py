"""Initial weights: their spread, orthogonality and exact balance."""

import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import homoflow as hf

every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@pytest.fixture
def getkey():
    """As everywhere, but of a generator that compiles each new shape much faster."""
    counter = itertools.count()
    return lambda: jr.fold_in(jr.key(20180601, impl="rbg"), next(counter))


def weights_of(model):
    return [
        np.asarray(layer.v if isinstance(layer, hf.SharedLinear) else layer.weight)
        for layer in model.layers
    ]


def compiled(make, **keywords):
    """`make(key=…)` in one compilation, where JAX would need one for each operation."""
    return eqx.filter_jit(lambda key: make(key=key, **keywords))


def assert_normal(sample, std):
    """Mean, variance and fourth moment of N(0, std²), to 5 standard errors each.

    Of n draws these have standard errors std/√n, std²√(2/n) and std⁴√(96/n).
    """
    z, n = np.asarray(sample, np.float64).ravel() / std, sample.size
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)


SIZES = (40, 60, 40, 60)
SPREADS = {
    "one std": (hf.Gaussian(0.3), (0.3, 0.3, 0.3)),
    "a std for each": (hf.Gaussian((0.1, 0.02, 3.0)), (0.1, 0.02, 3.0)),
    "one variance": (hf.Gaussian(variance=0.04), (0.2, 0.2, 0.2)),
    "a variance for each": (
        hf.Gaussian(variance=[1e-6, 1e-5, 1e-4]),
        (1e-3, 10**-2.5, 1e-2),
    ),
    "Kaiming": (hf.Kaiming(), (np.sqrt(2 / 40), np.sqrt(2 / 60), np.sqrt(2 / 40))),
    "the default": (None, (np.sqrt(2 / 40), np.sqrt(2 / 60), np.sqrt(2 / 40))),
    "Xavier": (hf.Xavier(), (np.sqrt(2 / 100), np.sqrt(2 / 100), np.sqrt(2 / 100))),
}


@pytest.mark.parametrize(("init", "stds"), SPREADS.values(), ids=SPREADS)
@every_dtype
def test_dense_layers_are_normal_with_the_stated_spread(init, stds, dtype, getkey):
    model = hf.MLP(SIZES, init=init, use_bias=True, key=getkey(), dtype=dtype)
    for layer, std in zip(model.layers, stds, strict=True):
        assert layer.weight.dtype == dtype
        assert_normal(layer.weight, std)
        np.testing.assert_array_equal(layer.bias, np.zeros(len(layer.weight)))


def test_a_wrong_spread_would_be_noticed(getkey):
    model = hf.MLP(SIZES, init=hf.Gaussian(0.3), key=getkey())
    with pytest.raises(AssertionError):
        assert_normal(model.layers[0].weight, 0.35)


@pytest.mark.parametrize(
    ("init", "variances"),
    [
        (hf.Kaiming(), (2 / (4 * 9), 2 / (20 * 9), 2 / 90)),
        (hf.Xavier(), (2 / (24 * 9), 2 / (30 * 9), 2 / (90 + 30))),
    ],
)
def test_fans_of_a_convolution_count_its_kernel(init, variances, getkey):
    model = hf.ConvNet((4, 7, 7), (20, 10), 30, init=init, key=getkey())
    for weight, variance in zip(weights_of(model), variances, strict=True):
        assert_normal(weight, np.sqrt(variance))


def test_fan_in_of_a_shared_layer_is_its_connections(getkey):
    sparse = np.zeros((30, 60), int)
    sparse[:, :20] = 1 + np.arange(600).reshape(30, 20)  # 20 of 60 inputs each
    model = hf.SharedMLP([sparse, 1 + np.arange(900).reshape(30, 30)], key=getkey())
    for weight, variance in zip(weights_of(model), (2 / 20, 2 / 30), strict=True):
        assert_normal(weight, np.sqrt(variance))


def test_layers_and_keys_are_independent(getkey):
    init, n = hf.Gaussian(1.0), 40 * 40
    model, other = (hf.MLP((40, 40, 40), init=init, key=getkey()) for _ in range(2))
    first, second = (w.ravel() for w in weights_of(model))
    for a, b in ((first, second), (first, weights_of(other)[0].ravel())):
        assert abs(a @ b / n) < 5 / np.sqrt(n)


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, jnp.float32), (0.3, jnp.float64)])
def test_orthogonal_layers_have_orthonormal_rows_or_columns(scale, dtype, getkey):
    init = hf.Orthogonal(scale)
    make = functools.partial(hf.ConvNet, (2, 5), (4,), 3, hidden=(8,))
    for weight in weights_of(compiled(make, init=init, dtype=dtype)(getkey())):
        assert weight.dtype == dtype
        matrix = weight.reshape(len(weight), -1)
        wide = matrix.shape[0] <= matrix.shape[1]
        gram = matrix @ matrix.T if wide else matrix.T @ matrix
        rounding = 20 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(gram, scale**2 * np.eye(len(gram)), atol=rounding)


def units_norms(weight, axis, units):
    """Squared norms by unit of an axis; a flattened image's channels own its blocks."""
    rows = np.moveaxis(np.asarray(weight, np.float64), axis, 0)
    return (rows.reshape(units, -1) ** 2).sum(axis=1)


BALANCED = {
    "dense": (lambda **k: hf.MLP((6, 5, 4, 3), **k), (5, 4), (1, 1)),
    "powers": (
        lambda **k: hf.MLP(
            (6, 5, 4, 3), activation=[hf.Power(2), hf.ReLUPower(3)], **k
        ),
        (5, 4),
        (2, 3),
    ),
    "not homogeneous": (
        lambda **k: hf.MLP((6, 5, 3), activation=jnp.tanh, **k),
        (5,),
        (1,),
    ),
    "convolutions, flattened": (
        lambda **k: hf.ConvNet((2, 5, 6), (4, 3), 3, hidden=(7,), **k),
        (4, 3, 7),
        (1, 1, 1),
    ),
    "convolutions with a power": (
        lambda **k: hf.ConvNet((2, 8), (4, 3), 3, activation=hf.Power(2), **k),
        (4, 3),
        (2, 2),
    ),
}


@pytest.mark.parametrize(("make", "units", "degrees"), BALANCED.values(), ids=BALANCED)
def test_balanced_start_has_every_unit_balanced(make, units, degrees, getkey):
    model = compiled(make, init=hf.Balanced(0.5))(getkey())
    weights = weights_of(model)
    pairs = zip(weights, weights[1:], units, degrees, strict=False)
    for lower, upper, n, degree in pairs:
        into, out_of = units_norms(lower, 0, n), units_norms(upper, 1, n)
        np.testing.assert_allclose(degree * out_of, into, rtol=1e-14)
        assert into.min() > 0
    for law in hf.laws(model):
        assert np.abs(law.value(model)).max() < 1e-14 * (weights[0] ** 2).sum()


def test_balanced_start_in_float32(getkey):
    init = hf.Balanced(0.5)
    model = hf.MLP((5, 5, 5), init=init, key=getkey(), dtype=jnp.float32)
    lower, upper = weights_of(model)
    assert lower.dtype == upper.dtype == np.float32
    into, out_of = units_norms(lower, 0, 5), units_norms(upper, 1, 5)
    np.testing.assert_allclose(out_of, into, rtol=1e-6)


def test_balanced_start_of_shared_layers_has_equal_total_norms(getkey):
    maps = [[[1, 2, 0], [0, 1, 2]], [[1, 2], [3, 1]], [[1, 1]]]
    model = hf.SharedMLP(maps, init=hf.Balanced(0.5), key=getkey())
    first, *others = ((w**2).sum() for w in weights_of(model))
    np.testing.assert_allclose(others, first, rtol=1e-14)
    assert first > 0


def test_first_layer_of_a_balanced_start_keeps_its_spread(getkey):
    model = hf.MLP((50, 40, 3), init=hf.Balanced(0.3), key=getkey())
    assert_normal(model.layers[0].weight, 0.3)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((6, 5, 4, 3), jnp.float64),
        ((4, 7, 4), jnp.float32),
        ((3, 5, 9, 6), jnp.float64),
        ((5, 2), jnp.float64),
    ],
)
def test_balanced_linear_layers_obey_the_matrix_law(sizes, dtype, getkey):
    init = hf.BalancedLinear(0.5)
    make = functools.partial(hf.MLP, sizes, activation="linear")
    model = compiled(make, init=init, dtype=dtype)(getkey())
    weights = weights_of(model)
    assert [w.shape for w in weights] == list(zip(sizes[1:], sizes, strict=False))
    for lower, upper in itertools.pairwise(weights):
        rounding = 20 * float(jnp.finfo(dtype).eps) * (lower**2).sum()
        np.testing.assert_allclose(lower @ lower.T, upper.T @ upper, atol=rounding)
    product = np.linalg.multi_dot(weights[::-1]) if len(weights) > 1 else weights[0]
    values = np.linalg.svd(product, compute_uv=False)
    rank = min(sizes[0], sizes[-1])
    assert np.linalg.matrix_rank(product) == rank
    for weight in weights:
        np.testing.assert_allclose(
            np.linalg.svd(weight, compute_uv=False)[:rank],
            values ** (1 / len(weights)),
            rtol=1e3 * float(jnp.finfo(dtype).eps),
        )


@pytest.mark.parametrize("hidden", [(40,), (40, 50)])
def test_end_to_end_matrix_of_balanced_linear_layers_is_normal(hidden, getkey):
    init = hf.BalancedLinear(0.2)
    model = hf.MLP((40, *hidden, 60), activation="linear", init=init, key=getkey())
    assert_normal(np.linalg.multi_dot(weights_of(model)[::-1]), 0.2)


KEY: dict[str, Any] = {"key": jax.random.key(0)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hf.Gaussian(), "either `std` or `variance`"),
        (lambda: hf.Gaussian(0.1, variance=0.1), "and not both"),
        (lambda: hf.Gaussian(-0.1), "not negative"),
        (lambda: hf.Gaussian(variance=(0.1, float("nan"))), "finite"),
        (lambda: hf.Balanced(0.0), "positive and finite"),
        (
            lambda: hf.MLP((3, 4, 2), init=hf.Gaussian((0.1, 0.2, 0.3)), **KEY),
            "3 spreads for 2 layers",
        ),
        (
            lambda: hf.ConvNet((1, 5), (2,), 1, init=hf.BalancedLinear(), **KEY),
            "dense layers only",
        ),
        (
            lambda: hf.MLP((4, 2, 3), init=hf.BalancedLinear(), **KEY),
            "width at least 3",
        ),
    ],
)
def test_impossible_starts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@jax.jit
@jax.vmap
def starts(spread):
    """Two layers by every initializer at a spread that is traced."""

    def layers(init):
        model = hf.MLP((2, 3, 2), activation="linear", init=init, key=jr.key(0))
        return [layer.weight for layer in model.layers]

    factors = hf.MatrixFactorization(3, 2, 1, std=spread, key=jr.key(0))
    return {
        "one": layers(hf.Gaussian(spread)),
        "each": layers(hf.Gaussian((spread, 1 / spread))),
        "variance": layers(hf.Gaussian(variance=spread)),
        "balanced": layers(hf.Balanced(spread)),
        "linear": layers(hf.BalancedLinear(spread)),
        "orthogonal": layers(hf.Orthogonal(spread)),
        "factors": [factors.U, factors.V],
    }


def test_traced_spreads_scale_the_weights():
    """Every weight is a power of the spread times what it is at 1."""
    spreads = np.array([1.0, 0.25, 9.0])
    powers = {
        "one": (1, 1), "each": (1, -1), "variance": (0.5, 0.5), "balanced": (1, 1),
        "linear": (0.5, 0.5), "orthogonal": (1, 1), "factors": (1, 1),
    }  # fmt: skip
    made = starts(jnp.asarray(spreads))
    for name, layers in made.items():
        for weights, power in zip(layers, powers[name], strict=True):
            expected = spreads[:, None, None] ** power * np.asarray(weights[0])
            assert np.any(expected != 0)
            np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=1e-15)


def test_a_spread_can_be_differentiated():
    """Σw² = σ²Σz² has the derivative 2Σw²/σ."""

    def square(std):
        (layer,) = hf.MLP((2, 2), init=hf.Gaussian(std), key=jr.key(0)).layers
        return jnp.sum(layer.weight**2)

    derivative = jax.grad(square)(0.3)
    np.testing.assert_allclose(derivative, 2 * square(0.3) / 0.3, rtol=1e-12)


def test_an_array_of_spreads_has_one_for_each_layer():
    assert hf.Gaussian(jnp.array([0.25, 0.5])).stds == (0.25, 0.5)
    assert hf.Gaussian(variance=np.array([0.25, 4.0])).stds == (0.5, 2.0)
