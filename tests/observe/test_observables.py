"""Ready-made observables against dense linear algebra and sums by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from points import point_of

import homoflow as hf
from homoflow._observe._margin import Margin
from homoflow._observe._ntk import NTK
from homoflow._observe._outputs import Outputs
from homoflow._observe._parameter_norms import ParameterNorms
from homoflow._observe._recorder import standard_observables
from homoflow._observe._singular_values import SingularValues
from homoflow._problem._problem import make_problem

X = jr.normal(jr.key(1), (6, 3))


def model(seed=0, sizes=(3, 4, 2), dtype=jnp.float64, **options):
    options = {"activation": jnp.tanh, **options}
    return hf.MLP(sizes, key=jr.key(seed), dtype=dtype, **options)


def regression(net=None, **options):
    net = model() if net is None else net
    return make_problem(net, (X, X[:, :2]), **options)


def value_at(observable, problem, weights=None):
    start = observable.init(point_of(problem))
    return observable(point_of(problem, weights), start)[0]


def moved(weights, size=0.3):
    flat, unravel = ravel_pytree(weights)
    return unravel(flat + size * jr.normal(jr.key(7), flat.shape, flat.dtype))


def dense_kernel(problem, weights, x):
    """JJᵀ with J by forward mode, column by column."""
    flat, unravel = ravel_pytree(weights)

    def outputs(flat):
        return jax.vmap(problem.model_at(unravel(flat)))(x).ravel()

    slopes = jax.jacfwd(outputs)(flat)
    return slopes @ slopes.T


def test_the_kernel_is_that_of_the_dense_jacobian():
    problem = regression(model(use_bias=True))
    weights = moved(problem.weights)
    inputs = jr.normal(jr.key(3), (5, 3))
    found = jax.jit(lambda w: value_at(NTK(inputs), problem, w))(weights)
    expected = dense_kernel(problem, weights, inputs)
    start = dense_kernel(problem, problem.weights, inputs)
    assert found.kernel.shape == (10, 10)
    np.testing.assert_allclose(found.kernel, expected, rtol=1e-12, atol=1e-14)
    distance = np.linalg.norm(expected - start) / np.linalg.norm(start)
    assert distance > 0.01
    np.testing.assert_allclose(found.distance, distance, rtol=1e-10)
    assert value_at(NTK(inputs), problem).distance == 0


def test_the_kernel_is_of_trained_weights():
    net = model()
    frozen = jax.tree.map(eqx.is_inexact_array, net)
    frozen = eqx.tree_at(lambda m: m.layers[0].weight, frozen, False)
    part = regression(net, trainable=frozen)
    whole = regression(net)
    found = value_at(NTK(X), part).kernel
    np.testing.assert_allclose(
        found, dense_kernel(part, part.weights, X), rtol=1e-12, atol=1e-14
    )
    assert not np.allclose(found, value_at(NTK(X), whole).kernel, rtol=0.1)


def product(net):
    return net.layers[1].weight @ net.layers[0].weight


def test_singular_values_are_those_of_numpy():
    problem = regression()
    found = value_at(SingularValues(product), problem)
    expected = np.linalg.svd(np.asarray(product(problem.model)), compute_uv=False)
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    with pytest.raises(ValueError, match="must return a matrix; it returns shape"):
        value_at(SingularValues(lambda m: m.layers[0].weight.ravel()), problem)


def test_outputs_are_the_model_s():
    problem = regression()
    expected = np.stack([problem.model(x) for x in X])
    single = np.asarray(X, np.float32)  # cast to the weights' dtype
    found = value_at(Outputs(single), problem)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(value_at(Outputs(X), problem), expected, rtol=1e-14)


def test_norms_are_those_of_numpy():
    problem = regression()
    found = value_at(ParameterNorms(), problem)
    layers = problem.model.layers
    for h in (0, 1):
        norm = np.linalg.norm(np.asarray(layers[h].weight))
        np.testing.assert_allclose(found.arrays[f"layers[{h}].weight"], norm)
    np.testing.assert_allclose(
        found.total, np.hypot(*(float(n) for n in found.arrays.values()))
    )
    zero = jax.tree.map(jnp.zeros_like, problem.weights)
    slope = jax.grad(lambda w: value_at(ParameterNorms(), problem, w).total)(zero)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e160])
def test_norms_and_margins_do_not_underflow_or_overflow(size):
    """Of a linear model: the gradient of ½(w·x)² is XᵀXw/n, in proportion to w."""
    net = model(sizes=(3, 1), activation="linear")
    start = np.asarray(net.layers[0].weight)
    net = eqx.tree_at(lambda m: m.layers[0].weight, net, size * start)
    problem = make_problem(net, (X, jnp.zeros((6, 1))))
    x = np.asarray(X)
    gradient = start @ x.T @ x / 6
    found = standard_observables(hf.laws(net))["grad_norms"]
    np.testing.assert_allclose(
        value_at(found, problem), size * np.linalg.norm(gradient), rtol=1e-13
    )
    norms = value_at(ParameterNorms(), problem)
    np.testing.assert_allclose(norms.total, size * np.linalg.norm(start), rtol=1e-13)
    data = (X, SIGNS[:, None])
    labelled = make_problem(net, data, loss=hf.LogisticLoss())
    margin = np.min((x @ start[0]) * np.asarray(SIGNS)) / np.linalg.norm(start)
    found = value_at(Margin(degree=1), labelled)
    np.testing.assert_allclose(found, margin, rtol=1e-13)


SIGNS = jnp.array([1.0, -1, 1, 1, -1, -1])


def margin_of(data, loss, sizes, **options):
    problem = make_problem(model(sizes=sizes), data, loss=loss)
    return float(value_at(Margin(**options), problem)), problem


def test_margins_by_hand():
    found, problem = margin_of((X, SIGNS[:, None]), hf.LogisticLoss(), (3, 4, 1))
    outputs = np.array([float(problem.model(x)[0]) for x in X])
    np.testing.assert_allclose(found, np.min(outputs * np.asarray(SIGNS)))
    classes = jnp.array([0, 1, 2, 2, 1, 0])
    found, problem = margin_of((X, classes), hf.SoftmaxCrossEntropy(), (3, 4, 3))
    margins = []
    for x, c in zip(X, classes, strict=True):
        f = np.asarray(problem.model(x))
        margins.append(f[c] - max(np.delete(f, c)))
    np.testing.assert_allclose(found, min(margins))
    one_hot = jax.nn.one_hot(classes, 3, dtype=X.dtype)
    same, _ = margin_of((X, one_hot), hf.SoftmaxCrossEntropy(), (3, 4, 3))
    np.testing.assert_allclose(same, found)
    both = jnp.stack([SIGNS, -SIGNS], 1)
    found, problem = margin_of((X, both), hf.LogisticLoss(), (3, 4, 2))
    outputs = np.stack([np.asarray(problem.model(x)) for x in X])
    np.testing.assert_allclose(found, np.min(outputs * np.asarray(both)))


def test_a_normalized_margin_does_not_see_the_scale():
    net = model(sizes=(3, 4, 1), activation="relu")
    data = (X, SIGNS[:, None])
    values, plain = [], []
    for scale in (1.0, 3.0):
        scaled = jax.tree.map(lambda w, s=scale: w * s if eqx.is_array(w) else w, net)
        problem = make_problem(scaled, data, loss=hf.LogisticLoss())
        values.append(float(value_at(Margin(degree=2), problem)))
        plain.append(float(value_at(Margin(), problem)))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-13)
    np.testing.assert_allclose(plain[1], 9 * plain[0], rtol=1e-13)
    squares = sum(float(jnp.sum(layer.weight**2)) for layer in net.layers)
    np.testing.assert_allclose(values[0], plain[0] / squares, rtol=1e-13)


def test_what_has_no_margin_is_nan_or_refused():
    found, _ = margin_of((X, X[:, :1]), hf.SquaredLoss(), (3, 4, 1))
    assert np.isnan(found)
    soft = jnp.full((6, 3), 1 / 3)
    found, _ = margin_of((X, soft), hf.SoftmaxCrossEntropy(), (3, 4, 3))
    assert np.isnan(found)
    problem = make_problem(
        model(), X, objective=lambda m, x: jnp.sum(jax.vmap(m)(x) ** 2)
    )
    with pytest.raises(ValueError, match="custom `objective`"):
        value_at(Margin(), problem)


OBSERVABLES = {
    "ntk": NTK(X),
    "singular values": SingularValues(product),
    "outputs": Outputs(X),
    "norms": ParameterNorms(),
    "margin": Margin(degree=2.0),
}


@pytest.mark.parametrize("name", OBSERVABLES)
def test_observables_can_be_transformed(name):
    """Under jit and vmap the same; the derivative is that of central differences; and in
    float32 what is right to float32."""
    observable = OBSERVABLES[name]
    signs = jnp.stack([SIGNS, -SIGNS], 1)
    problem = make_problem(model(), (X, signs), loss=hf.LogisticLoss())

    def total(weights):
        leaves = jax.tree.leaves(value_at(observable, problem, weights))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves)

    flat, unravel = ravel_pytree(moved(problem.weights))
    along = jr.normal(jr.key(2), flat.shape)
    function = lambda s: total(unravel(flat + s * along))  # noqa: E731
    steps = jnp.array([-1e-5, 0.0, 1e-5])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(function)))(steps)
    np.testing.assert_allclose(values[1], function(0.0), rtol=1e-12)
    difference = (values[2] - values[0]) / 2e-5
    np.testing.assert_allclose(slopes[1], difference, rtol=1e-6, atol=1e-8)
    cast = lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf  # noqa: E731
    single = make_problem(
        jax.tree.map(cast, problem.model), (X, signs), loss=hf.LogisticLoss()
    )
    weights = jax.tree.map(cast, moved(problem.weights))
    found = jax.tree.leaves(value_at(observable, single, weights))
    expected = value_at(observable, problem, moved(problem.weights))
    for a, b in zip(found, jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
