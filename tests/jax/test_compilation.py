"""Functions compiled with options of XLA's that need not exist."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow._jax._compilation
from homoflow._jax._compilation import fast_compile_jit


@pytest.fixture(autouse=True)
def forget():
    homoflow._jax._compilation._known_options.cache_clear()
    yield
    homoflow._jax._compilation._known_options.cache_clear()


def twice():
    return fast_compile_jit(lambda x: 2 * jnp.sin(x))


def forms(f) -> tuple[int, ...]:
    """How many programs there are of each kind."""
    kinds = (f.default, f.fast_compile, f.plain_sums)
    return tuple(kind._cached._cache_size() for kind in kinds)


X = jnp.array([0.5, 1.0])


def test_options_are_used_where_they_exist():
    f = twice()
    assert jnp.array_equal(f(X), 2 * jnp.sin(X))
    assert forms(f) == (0, 0, 1)
    low = X.astype("float32")
    assert jnp.array_equal(f(low), 2 * jnp.sin(low))
    assert forms(f) == (0, 1, 1)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-12)])
def test_long_sums_are_accurate(dtype, bound):
    numbers = jnp.linspace(0.5, 1.5, 1_000_000, dtype=dtype)
    found = fast_compile_jit(jnp.sum)(numbers)
    assert abs(float(found) / math.fsum(np.asarray(numbers)) - 1) < bound


def test_options_that_do_not_exist_are_left_out(monkeypatch):
    monkeypatch.setattr(
        homoflow._jax._compilation, "_OPTIONS", {"xla_no_such_option": False}
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        jax.jit(jnp.sin, compiler_options={"xla_no_such_option": False})(X)
    f = twice()
    assert jnp.array_equal(f(X), 2 * jnp.sin(X))
    assert forms(f) == (1, 0, 0)


def test_one_option_is_used_where_another_does_not_exist(monkeypatch):
    level = {"xla_backend_optimization_level": 1}
    monkeypatch.setattr(
        homoflow._jax._compilation, "_OPTIONS", {"xla_no_such_option": False, **level}
    )
    assert homoflow._jax._compilation._known_options() == level
    f = twice()
    assert jnp.array_equal(f(X), 2 * jnp.sin(X))
    assert forms(f) == (0, 0, 1)


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.vmap,
        jax.checkpoint,
        lambda f: lambda x: jax.lax.map(f, x),
        lambda f: lambda x: jax.jit(jax.linearize(f, x)[1])(x) + f(x),
    ],
    ids=["jit", "vmap", "checkpoint", "map", "linearize"],
)
def test_options_do_not_get_in_the_way_of_transformations(transform):
    f = lambda x: 2 * jnp.sin(x)  # noqa: E731
    assert jnp.array_equal(transform(fast_compile_jit(f))(X), transform(f)(X))


def test_a_trace_without_arguments_has_no_options():
    f = twice()
    assert jnp.array_equal(jax.jit(lambda: f(X))(), f(X))
