"""Forward passes against plain numpy, homogeneity, dtypes and errors of every model."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from problems import Blank, redrawn

import homoflow as hf

ACTIVATIONS = {
    "linear": ("linear", lambda z: z),
    "relu": ("relu", lambda z: np.maximum(z, 0)),
    "leaky_relu": ("leaky_relu", lambda z: np.where(z < 0, 0.01 * z, z)),
    "abs": ("abs", np.abs),
    "LeakyReLU": (hf.LeakyReLU(0.3), lambda z: np.where(z < 0, 0.3 * z, z)),
    "Power": (hf.Power(3), lambda z: z * z * z),
    "ReLUPower": (hf.ReLUPower(2), lambda z: np.maximum(z, 0) ** 2),
    "tanh": (jnp.tanh, np.tanh),
    "sigmoid": (jax.nn.sigmoid, scipy.special.expit),
    "jax relu": (jax.nn.relu, lambda z: np.maximum(z, 0)),
}
every_activation = pytest.mark.parametrize(
    ("activation", "phi"), ACTIVATIONS.values(), ids=ACTIVATIONS
)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


SHARED_MAPS = [[[1, 2, 1]], [[1], [2]]]


def rounding(dtype):
    """Relative error of a few hundred floating-point operations in sequence."""
    return 200 * float(jnp.finfo(dtype).eps)


def assert_same(ours, expected, dtype=jnp.float64):
    assert ours.dtype == dtype
    size = np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=rounding(dtype) * size)


def normal(shape, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def numpy_dense(layer, x):
    y = np.asarray(layer.weight) @ x
    return y if layer.bias is None else y + np.asarray(layer.bias)


def numpy_convolution(layer, x, stride, padding):
    """Cross-correlation by its definition, one output number at a time."""
    weight = np.asarray(layer.weight)
    kernel = weight.shape[2:]
    x = np.pad(x, [(0, 0)] + [(padding, padding)] * len(kernel))
    positions = [
        (n - k) // stride + 1 for n, k in zip(x.shape[1:], kernel, strict=True)
    ]
    y = np.zeros((len(weight), *positions))
    for at in np.ndindex(*positions):
        window = tuple(
            slice(p * stride, p * stride + k) for p, k in zip(at, kernel, strict=True)
        )
        for channel in range(len(weight)):
            y[(channel, *at)] = (weight[channel] * x[(slice(None), *window)]).sum()
    return y if layer.bias is None else y + np.asarray(layer.bias)


@every_activation
@pytest.mark.parametrize(
    ("dtype", "use_bias"), [(jnp.float32, False), (jnp.float64, True)]
)
def test_mlp(activation, phi, dtype, use_bias, getkey):
    model = redrawn(
        hf.MLP(
            (4, 5, 3, 2),
            activation=activation,
            use_bias=use_bias,
            init=Blank(),
            key=getkey(),
            dtype=dtype,
        )
    )
    first, second, last = model.layers
    assert (first.bias is not None) == use_bias
    x = normal(4, dtype=dtype)
    hidden = phi(numpy_dense(second, phi(numpy_dense(first, x))))
    assert_same(model(jnp.asarray(x)), numpy_dense(last, hidden), dtype)


def test_mlp_with_one_activation_for_each_layer(getkey):
    names = ["abs", "Power", "tanh", "linear"]
    activations = [ACTIVATIONS[name][0] for name in names]
    sizes = (3, 4, 4, 4, 4, 2)
    model = redrawn(hf.MLP(sizes, activation=activations, init=Blank(), key=getkey()))
    x = expected = normal(3)
    for layer, name in zip(model.layers, names, strict=False):
        expected = ACTIVATIONS[name][1](numpy_dense(layer, expected))
    assert_same(model(jnp.asarray(x)), numpy_dense(model.layers[-1], expected))


def test_mlp_without_hidden_layers_is_a_matrix(getkey):
    model = hf.MLP((3, 2), key=getkey())
    x = normal(3)
    assert_same(model(jnp.asarray(x)), np.asarray(model.layers[0].weight) @ x)


@pytest.mark.parametrize(
    ("in_shape", "kernels", "strides", "paddings", "hidden", "use_bias"),
    [
        ((1, 7), 3, 1, 0, (), False),
        ((2, 9), (3, 2), (2, 1), (0, 1), (), True),
        ((3, 6), (1, 3), 1, (0, 2), (4,), False),
        ((1, 5, 5), 3, 1, 1, (), True),
        ((2, 7, 5), (3, 2), (2, 1), (1, 0), (4, 3), False),
        ((2, 7, 5), (2, 3), (1, 2), (0, 2), (4,), True),
    ],
)
def test_convnet(in_shape, kernels, strides, paddings, hidden, use_bias, getkey):
    model = redrawn(
        hf.ConvNet(
            in_shape,
            (3, 2),
            4,
            kernel_size=kernels,
            stride=strides,
            padding=paddings,
            hidden=hidden,
            activation="leaky_relu",
            use_bias=use_bias,
            init=Blank(),
            key=getkey(),
        )
    )
    x = expected = normal(in_shape)
    _, phi = ACTIVATIONS["leaky_relu"]
    strides, paddings = np.broadcast_to(strides, 2), np.broadcast_to(paddings, 2)
    for layer, *how in zip(model.layers[:2], strides, paddings, strict=True):
        expected = phi(numpy_convolution(layer, expected, *how))
    expected = expected.ravel()
    for layer in model.layers[2:-1]:
        expected = phi(numpy_dense(layer, expected))
    assert len(model.layers) == 3 + len(hidden)
    assert_same(model(jnp.asarray(x)), numpy_dense(model.layers[-1], expected))


def test_shared_mlp_against_a_hand_written_matrix(getkey):
    maps = [[[1, 0, 2], [0, 2, 3], [3, 3, 0]], [[1, 2, 1]]]
    model = redrawn(hf.SharedMLP(maps, use_bias=True, key=getkey()))
    v, u = (np.asarray(layer.v) for layer in model.layers)
    first = np.array([[v[0], 0, v[1]], [0, v[1], v[2]], [v[2], v[2], 0]])
    last = np.array([[u[0], u[1], u[0]]])
    np.testing.assert_array_equal(model.layers[0].weight, first)
    biases = [np.asarray(layer.bias) for layer in model.layers]
    x = normal(3)
    expected = last @ np.maximum(first @ x + biases[0], 0) + biases[1]
    assert_same(model(jnp.asarray(x)), expected)


def convolution_map(in_channels, length, out_channels, kernel, stride):
    """The map g of Theorem 2.3 under which W is a convolution on flattened images."""
    positions = (length - kernel) // stride + 1
    index = np.zeros((out_channels * positions, in_channels * length), int)
    number = np.arange(out_channels * in_channels * kernel).reshape(
        out_channels, in_channels, kernel
    )
    ranges = map(range, (out_channels, positions, in_channels, kernel))
    for out, at, channel, tap in itertools.product(*ranges):
        column = channel * length + at * stride + tap
        index[out * positions + at, column] = number[out, channel, tap] + 1
    return index


def test_a_convolution_is_a_shared_layer(getkey):
    convolutional = redrawn(
        hf.ConvNet(
            (2, 9),
            (3, 2),
            4,
            kernel_size=(3, 2),
            stride=(2, 1),
            init=Blank(),
            key=getkey(),
        )
    )
    maps = [
        convolution_map(2, 9, 3, 3, 2),
        convolution_map(3, 4, 2, 2, 1),
        1 + np.arange(4 * 6).reshape(4, 6),
    ]
    shared = eqx.tree_at(
        lambda m: [layer.v for layer in m.layers],
        hf.SharedMLP(maps, init=Blank(), key=getkey()),
        [layer.weight.ravel() for layer in convolutional.layers],
    )
    x = jnp.asarray(normal((2, 9)))
    assert_same(shared(x.ravel()), np.asarray(convolutional(x)))


@every_dtype
def test_factorization_and_its_two_objectives(dtype, getkey):
    model = redrawn(hf.MatrixFactorization(5, 4, 2, key=getkey(), dtype=dtype))
    u, v = np.asarray(model.U, np.float64), np.asarray(model.V, np.float64)
    target = normal((5, 4), dtype=dtype)
    x = normal(4, dtype=dtype)
    assert_same(model(jnp.asarray(x)), u @ v.T @ x, dtype)
    plain = ((u @ v.T - target) ** 2).sum() / 2
    ours = hf.factorization_objective(model, jnp.asarray(target))
    assert_same(ours, plain, dtype)
    regularized = plain + ((u.T @ u - v.T @ v) ** 2).sum() / 8
    ours = hf.regularized_factorization_objective(model, jnp.asarray(target))
    assert_same(ours, regularized, dtype)


def mlp(activation, **keywords):
    return lambda key: hf.MLP(
        (3, 4, 4, 2), activation=activation, init=Blank(), key=key, **keywords
    )


HOMOGENEOUS = {
    "linear": (mlp("linear"), 3),
    "relu": (mlp("relu"), 3),
    "leaky": (mlp(hf.LeakyReLU(0.2)), 3),
    "abs": (mlp("abs"), 3),
    "square": (mlp(hf.Power(2)), 7),  # ((1·2) + 1)·2 + 1
    "mixed": (mlp([hf.ReLUPower(3), "relu"]), 5),  # (1·3 + 1)·1 + 1
    "convolution": (lambda key: hf.ConvNet((1, 3), (2, 2), 2, padding=1, key=key), 3),
    "shared": (lambda key: hf.SharedMLP(SHARED_MAPS, activation="abs", key=key), 2),
    "factorization": (lambda key: hf.MatrixFactorization(2, 3, 2, key=key), 2),
}


def scaled(model, factor):
    return jax.tree.map(
        lambda leaf: factor * leaf if eqx.is_inexact_array(leaf) else leaf, model
    )


@pytest.mark.parametrize(("make", "degree"), HOMOGENEOUS.values(), ids=HOMOGENEOUS)
def test_network_is_homogeneous_in_its_weights(make, degree, getkey):
    model = redrawn(make(getkey()))
    x = jnp.asarray(normal((1, 3) if isinstance(model, hf.ConvNet) else 3))
    assert float(jnp.abs(model(x)).max()) > 1e-3
    assert_same(scaled(model, 1.7)(x), 1.7**degree * np.asarray(model(x)))


@pytest.mark.parametrize(
    "make", [mlp(jnp.tanh), mlp("relu", use_bias=True)], ids=["tanh", "bias"]
)
def test_tanh_and_biases_break_homogeneity(make, getkey):
    model = redrawn(make(getkey()))
    x = jnp.asarray(normal(3))
    difference = scaled(model, 1.7)(x) - 1.7**3 * model(x)
    assert float(jnp.abs(difference).max()) > 0.1


@pytest.mark.parametrize(
    ("activation", "degree"),
    [
        (hf.Linear(), 1),
        (hf.ReLU(), 1),
        (hf.LeakyReLU(0.2), 1),
        (hf.Abs(), 1),
        (hf.Power(4), 4),
        (hf.ReLUPower(3), 3),
    ],
)
def test_degree_of_an_activation_is_eulers(activation, degree):
    """φ'(z)·z = k·φ(z), the identity that the laws rest on."""
    assert activation.degree == degree
    z = jnp.asarray(normal(50))
    slope = jax.vmap(jax.grad(activation))(z)
    np.testing.assert_allclose(slope * z, degree * activation(z), rtol=1e-14)


def test_functions_without_a_known_degree_claim_none():
    assert hf.Elementwise(jnp.tanh).degree is None


@every_dtype
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: hf.MLP((3, 4, 2), use_bias=True, **k),
        lambda **k: hf.ConvNet((3, 3), (2,), 2, use_bias=True, **k),
        lambda **k: hf.SharedMLP(SHARED_MAPS, use_bias=True, **k),
        lambda **k: hf.MatrixFactorization(2, 3, 2, **k),
    ],
    ids=["mlp", "convnet", "shared", "factorization"],
)
def test_weights_have_the_dtype_asked_for(make, dtype, getkey):
    arrays = jax.tree.leaves(eqx.filter(make(key=getkey(), dtype=dtype), eqx.is_array))
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(dtype)}
    default = jax.tree.leaves(eqx.filter(make(key=getkey()), eqx.is_array))
    assert {leaf.dtype for leaf in default} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda key: hf.MLP((3, 4, 2), key=key), (3,)),
        (lambda key: hf.ConvNet((2, 5), (3,), 2, key=key), (2, 5)),
        (lambda key: hf.SharedMLP(SHARED_MAPS, activation="abs", key=key), (3,)),
    ],
    ids=["mlp", "convnet", "shared"],
)
def test_jit_and_vmap_change_nothing(make, shape, getkey):
    model, xs = make(getkey()), jnp.asarray(normal((4, *shape)))
    batched = eqx.filter_jit(lambda m, xs: jax.vmap(m)(xs))(model, xs)
    assert_same(batched, np.stack([model(x) for x in xs]))
    models = eqx.filter_vmap(make)(jax.random.split(getkey(), 3))
    outputs = eqx.filter_vmap(lambda m: m(xs[0]))(models)
    second = jax.tree.map(lambda a: a[1] if eqx.is_array(a) else a, models)
    assert_same(outputs[1], np.asarray(second(xs[0])))
    assert len(np.unique(outputs)) == outputs.size


def test_same_key_same_model_and_another_key_another(getkey):
    key = getkey()
    one, same, other = (hf.MLP((3, 4, 2), key=k) for k in (key, key, getkey()))
    assert eqx.tree_equal(one, same)
    assert not eqx.tree_equal(one, other)


KEY: dict[str, Any] = {"key": jax.random.key(0)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hf.MLP((3,), **KEY), "at least 2 positive integers"),
        (lambda: hf.MLP((3, 0, 1), **KEY), "positive integers"),
        (
            lambda: hf.MLP((3, 4, 4, 1), activation=("relu",), **KEY),
            "1 activations for 2 hidden layers",
        ),
        (lambda: hf.MLP((3, 4, 1), activation="rleu", **KEY), "names are abs"),
        (lambda: hf.Power(0), "at least 1"),
        (lambda: hf.ReLUPower(-2), "at least 1"),
        (lambda: hf.ConvNet((3,), (2,), 1, **KEY), "at least 2"),
        (lambda: hf.ConvNet((1, 2, 2, 2), (2,), 1, **KEY), "height, width"),
        (lambda: hf.ConvNet((1, 8), (), 1, **KEY), "at least 1"),
        (
            lambda: hf.ConvNet((1, 8), (2, 2), 1, stride=(1, 1, 1), **KEY),
            "`stride` has 3 entries for 2 convolutions",
        ),
        (lambda: hf.ConvNet((1, 4), (2, 2), 1, **KEY), "leaves nothing"),
        (lambda: hf.ConvNet((1, 8), (2,), 1, stride=0, **KEY), "`stride` takes"),
        (lambda: hf.ConvNet((1, 8), (2,), 1, padding=-1, **KEY), "of at least 0"),
        (
            lambda: hf.ConvNet((1, 8), (2,), 1, kernel_size=0, **KEY),
            "`kernel_size` takes integers of at least 1; got 0",
        ),
        (lambda: hf.SharedMLP([], **KEY), "`maps` is empty"),
        (lambda: hf.SharedMLP([[[1, 2]], [[1, 1]]], **KEY), "1 outputs and map 2"),
        (lambda: hf.SharedLinear([1, 2]), "integer array of shape"),
        (lambda: hf.SharedLinear([[0.5, 1.0]]), "integer array of shape"),
        (lambda: hf.SharedLinear([[-1, 1]]), "entries ≥ 0"),
        (lambda: hf.SharedLinear([[0, 0]]), "at least one of them > 0"),
        (lambda: hf.SharedLinear([[1, 3]]), "never uses 2"),
    ],
)
def test_malformed_architectures_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "objective", [hf.factorization_objective, hf.regularized_factorization_objective]
)
def test_target_of_another_shape_is_refused(objective, getkey):
    model = hf.MatrixFactorization(3, 2, 1, key=getkey())
    with pytest.raises(ValueError, match="UVᵀ has shape"):
        objective(model, jnp.ones((2, 3)))
