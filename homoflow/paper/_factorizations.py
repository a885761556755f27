"""Targets and random starts of matrix factorization, for the statements of §3."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from .._models import MatrixFactorization


def target(d1: int, d2: int, rank: int, seed: int) -> Float[Array, "d1 d2"]:
    """A product of Gaussian factors, with ‖M*‖_F = 1."""
    key_u, key_v = jr.split(jr.key(seed))
    product = jr.normal(key_u, (d1, rank)) @ jr.normal(key_v, (d2, rank)).T
    return product / jnp.linalg.norm(product)


def starts(
    d1: int, d2: int, rank: int, std: float, seeds: int, first_seed: int
) -> MatrixFactorization:
    """One start for each seed, with entries N(0, std²): a batch of models."""

    def start(key):
        return MatrixFactorization(d1, d2, rank, std=std, key=key)

    return eqx.filter_vmap(start)(keys(seeds, first_seed))


def keys(seeds: int, first_seed: int):
    """A random key for each of `seeds` seeds in a row."""
    return jax.vmap(jr.key)(jnp.arange(first_seed, first_seed + seeds))


def first_time(
    reached: Bool[np.ndarray, "seeds times"], times: Shaped[np.ndarray, " times"]
) -> Float[np.ndarray, " seeds"]:
    """The first of `times` at which each row of `reached` is true; inf if at none."""
    first = times[reached.argmax(axis=1)].astype(float)
    return np.where(reached.any(axis=1), first, np.inf)
