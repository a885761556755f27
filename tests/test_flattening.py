"""Trees as vectors and back."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from homoflow._flattening import Flattening


@pytest.fixture
def tree():
    matrix, vector = jr.normal(jr.key(0), (3, 2)), jr.normal(jr.key(1), (4,))
    return {"a": (matrix, jnp.asarray(2.0)), "b": [vector, jnp.zeros((0, 5))]}


def test_one_dtype_is_one_vector_in_the_order_of_the_leaves(tree):
    (vector,) = Flattening(tree).flat(tree)
    np.testing.assert_array_equal(vector, ravel_pytree(tree)[0])


def test_a_vector_for_each_dtype_which_none_is_cast(tree):
    tree["a"] = tuple(a.astype(jnp.float32) for a in tree["a"])
    flattening = Flattening(tree)
    vectors = flattening.flat(tree)
    assert [v.dtype for v in vectors] == [jnp.float32, jnp.float64]
    back = flattening.tree(vectors)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(*map(jax.tree.leaves, (back, tree)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_under_vmap_leaves_have_the_shapes_of_one(tree):
    flattening = Flattening(tree)
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), tree)
    vectors = jax.vmap(flattening.flat)(many)
    assert [v.shape for v in vectors] == [(3, 11)]
    back = jax.vmap(flattening.tree)(vectors)
    np.testing.assert_array_equal(back["a"][0], many["a"][0])


def test_another_structure_is_refused(tree):
    with pytest.raises(ValueError, match="key"):
        Flattening(tree).flat({"a": tree["a"], "c": tree["b"]})
