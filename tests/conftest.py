"""Strict settings for every test: double precision, no silent dtype promotion."""

import itertools

import jax
import jax.random as jr
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Most of the suite's time is compilation, of code that runs once. The benchmarks, the
# notebooks and the paper's experiments run what XLA makes of it with all its passes.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same in every run."""
    counter = itertools.count()
    return lambda: jr.fold_in(jr.key(20180601), next(counter))
