"""What is found out once for each structure: when again, and when not."""

import jax
import jax.numpy as jnp
import pytest

from homoflow._problem._data import shape_of


class Traced:
    """A function that counts how often it was traced."""

    def __init__(self):
        self.times = 0

    def __call__(self, x, y):
        self.times += 1
        return x[0] * y


def test_values_do_not_matter_and_shapes_and_dtypes_do():
    function = Traced()
    for x in (jnp.zeros(2), jnp.ones(2)):
        assert shape_of(function, x, 1.0).shape == ()
    assert function.times == 1
    assert shape_of(function, jnp.zeros((2, 3)), 1.0).shape == (3,)
    assert shape_of(function, jnp.zeros(2, jnp.float32), 1.0).dtype == jnp.float32
    # Equal, and of another type.
    shape_of(function, jnp.zeros(2), 1)
    assert function.times == 4


def test_rules_of_dtypes_matter_and_errors_are_not_remembered():
    function, mixed = Traced(), (jnp.zeros(2), jnp.arange(3))
    with jax.numpy_dtype_promotion("standard"):
        assert shape_of(function, *mixed).shape == (3,)
    for _ in range(2):
        with pytest.raises(ValueError, match="promotion"):
            shape_of(function, *mixed)
    assert function.times == 3


def test_what_cannot_be_hashed_is_traced_again():
    function = Traced()
    for _ in range(2):
        assert shape_of(function, jnp.zeros(2), Unhashable()).shape == ()
    assert function.times == 2


class Unhashable:
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __rmul__(self, other):
        return other
