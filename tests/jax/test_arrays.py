"""Norms of numbers whose squares leave the range of their dtype."""

import jax.numpy as jnp
import numpy as np
import pytest

from homoflow._jax._arrays import tree_norm, tree_norm_of_any_size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("share", [0.98, 0.7, -0.7])
def test_norms_of_any_size(dtype, share):
    """3-4-5, from the smallest numbers to the largest."""
    size = jnp.asarray(10 ** (share * np.log10(float(jnp.finfo(dtype).max))) / 5, dtype)
    tree = {"a": 3 * size, "b": [jnp.stack([0 * size, -4 * size])]}
    np.testing.assert_allclose(tree_norm_of_any_size(tree) / size, 5, rtol=1e-6)
    assert tree_norm(tree) in (0, jnp.inf)


def test_norms_of_nothing_and_of_what_is_not_finite():
    assert tree_norm_of_any_size([jnp.zeros(3), jnp.zeros(0)]) == 0
    assert tree_norm_of_any_size([jnp.array([1.0, jnp.inf])]) == jnp.inf
    assert np.isnan(tree_norm_of_any_size([jnp.array([1.0, jnp.nan])]))
