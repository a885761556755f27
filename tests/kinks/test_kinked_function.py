"""What is found out about a model's kinks is remembered, but no values are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import homoflow as hf
from homoflow._kinks import as_system, kinked_function

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
Y = jnp.ones((4, 2))


class Counted(eqx.Module):
    """A network that counts how often it is traced."""

    network: hf.MLP
    traces: list[int] = eqx.field(static=True)

    def __call__(self, x):
        self.traces[0] += 1
        return self.network(x)


class Count(list):
    """A list that can be hashed, as a static field must be."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other):
        return self is other


def problem_of(model, y=Y):
    return hf.make_problem(model, (X, y))


def test_a_second_problem_of_the_same_structure_is_not_traced():
    counter = Count([0])
    model = Counted(hf.MLP((3, 5, 2), key=jax.random.key(0)), counter)
    function = kinked_function(problem_of(model))
    count = counter[0]
    other = jax.tree.map(lambda a: 2 * a, model)
    assert kinked_function(problem_of(other, -Y)) is function
    assert counter[0] == count


def test_a_second_flow_traces_no_model():
    counter = Count([0])
    model = Counted(hf.MLP((3, 5, 2), key=jax.random.key(0)), counter)
    options = {"solver": hf.Filippov(max_active=8), "laws": ()}
    hf.flow(model, (X, Y), 0.5, **options)
    count = counter[0]
    hf.flow(model, (X, 2 * Y), 0.5, **options)
    assert counter[0] == count


def test_values_that_a_model_closes_over_are_not_remembered():
    """An array that a function of the model takes from outside may have changed."""
    scale = {"value": np.ones(2)}

    def scaled(z):
        return jax.nn.relu(z) * jnp.asarray(scale["value"])

    model = hf.MLP((3, 2, 2), activation=scaled, key=jax.random.key(0))
    problem = problem_of(model)
    slopes = jnp.ones(2), jnp.zeros(2)

    def predict():
        function = kinked_function(problem)
        arrays = eqx.filter(problem.frozen, eqx.is_array)
        return function.forward(problem.weights, *slopes, (arrays, []), X[0])[0]

    before = predict()
    scale["value"] = 2 * np.ones(2)
    np.testing.assert_allclose(predict(), 2 * before)


def test_a_traced_value_that_a_model_closes_over_is_not_remembered():
    cell = {"scale": 1.0}

    def scaled(z):
        return jax.nn.relu(z) * cell["scale"]

    model = hf.MLP((3, 4, 2), activation=scaled, key=jax.random.key(0))
    problem = problem_of(model)
    w, _ = ravel_pytree(problem.weights)

    def loss(scale):
        cell["scale"] = scale
        system = as_system(problem)
        return system.loss(w, jnp.ones_like(system.low))[0]

    for scale in (1.0, 2.0):
        traced = jax.jit(lambda s: loss(s))(scale)
        np.testing.assert_allclose(traced, loss(scale), rtol=1e-12)
