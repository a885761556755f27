"""Float32 networks: their flow is followed in float64, switched on or not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import midpoint
from problems import flat, relu_regression

import homoflow as hf

T1 = 4.0
EPS = float(jnp.finfo(jnp.float32).eps)
STEPS = jnp.asarray(400_000)
OPTIONS = {"solver": hf.Filippov(max_active=24), "ts": [0.0, 2.0, T1]}


def problem():
    """A float32 network and data, in numbers that both precisions have."""
    _, (x, y) = relu_regression()
    model = hf.MLP((3, 8, 2), key=jr.key(0), dtype=jnp.float32)
    return model, (x.astype(jnp.float32), y.astype(jnp.float32))


def wide(tree):
    return jax.tree.map(
        lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, tree
    )


@pytest.fixture(scope="module")
def narrow():
    return hf.flow(*problem(), T1, **OPTIONS, save_models=True)


def by_midpoint(model, data):
    return np.asarray(midpoint(model, data, T1, STEPS), np.float64)


def error(weights, exact) -> float:
    difference = np.asarray(weights, np.float64) - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def test_the_answer_is_the_exact_one_rounded(narrow):
    model, data = problem()
    exact = by_midpoint(wide(model), wide(data))
    assert error(flat(narrow.model), exact) < 2 * EPS  # most of it midpoint's own
    assert error(by_midpoint(*problem()), exact) > 20 * EPS  # float32 all through
    assert narrow.stats["entries"] > 0
    assert narrow.stats["computed_in"].startswith("float64")


def test_everything_that_is_returned_is_float32(narrow):
    for leaf in jax.tree.leaves(eqx.filter(narrow, eqx.is_array)):
        assert leaf.dtype not in (jnp.float64, jnp.int64)
    assert jax.tree.structure(narrow.model) == jax.tree.structure(problem()[0])


def test_frozen_arrays_come_back_as_they_were():
    model, data = problem()
    trainable = jax.tree.map(lambda _: True, eqx.filter(model, eqx.is_array))
    trainable = eqx.tree_at(lambda m: m.layers[1].weight, trainable, False)
    half = model.layers[1].weight.astype(jnp.float16)
    model = eqx.tree_at(lambda m: m.layers[1].weight, model, half)
    with jax.numpy_dtype_promotion("standard"):
        flow = hf.flow(model, data, 0.5, **{**OPTIONS, "ts": None}, trainable=trainable)
    assert flow.model.layers[1].weight.dtype == jnp.float16
    assert np.all(np.asarray(flow.model.layers[1].weight) == np.asarray(half))


def test_it_needs_no_float64_to_be_switched_on(narrow):
    model, data = problem()
    with jax.enable_x64(False):
        flow = hf.flow(model, data, T1, **OPTIONS, save_models=True)
        assert flow.model.layers[0].weight.dtype == jnp.float32
        assert np.all(flat(flow.model) == flat(narrow.model))


def test_under_jit_that_is_refused_and_with_float64_on_it_is_not():
    model, data = problem()

    def run(model):
        return hf.flow(model, data, T1, **OPTIONS, save_models=True, throw=False)

    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        eqx.filter_eval_shape(run, model)
    assert eqx.filter_eval_shape(run, model).losses.dtype == jnp.float32


def test_a_model_that_is_float32_inside_is_refused_with_the_reason():
    table = jnp.ones(8, jnp.float32)

    class Shifted(eqx.Module):
        network: hf.MLP

        def __call__(self, x):
            return self.network(x + table[:3])

    model, data = problem()
    with pytest.raises(ValueError, match="cannot be evaluated in float64"):
        hf.flow(Shifted(model), data, T1, **OPTIONS)
