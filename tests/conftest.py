"""Strict settings for every test: double precision, no silent dtype promotion."""

import itertools

import jax
import jax.random as jr
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def quick_compilation():
    """Few of XLA's passes, for tests whose time is the compilation of code that runs once.

    Not for tests of the last digits: rounding differs from what users run.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same in every run."""
    counter = itertools.count()
    return lambda: jr.fold_in(jr.key(20180601), next(counter))
