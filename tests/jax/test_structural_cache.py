"""What is found out once for each structure: when again, and when not."""

import jax
import jax.numpy as jnp
import pytest

from homoflow._jax._structural_cache import cached_by_structure
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


class Growing:
    """Equal by what it holds, which its own calls change."""

    def __init__(self):
        self.calls = 0

    def __hash__(self):
        return hash(self.calls)

    def __eq__(self, other):
        return isinstance(other, Growing) and self.calls == other.calls

    def __call__(self, x):
        self.calls += 1
        return x


def test_what_changes_while_it_is_traced_does_no_harm():
    @cached_by_structure()
    def shape(function, x):
        return jax.eval_shape(function, x).shape

    x = jnp.ones(3)
    for _ in range(100):  # More than are kept.
        assert shape(Growing(), x) == (3,)
        growing = Growing()
        assert [shape(growing, x) for _ in range(3)] == [(3,)] * 3
    assert shape(jnp.sin, x) == (3,)
