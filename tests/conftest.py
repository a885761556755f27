"""Strict settings for every test: double precision, no silent dtype promotion."""

import itertools

import jax
import jax.random as jr
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same in every run."""
    counter = itertools.count()
    return lambda: jr.fold_in(jr.key(20180601), next(counter))
