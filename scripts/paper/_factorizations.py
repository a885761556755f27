"""Targets and random starts of matrix factorization, for the statements of §3."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from homoflow import MatrixFactorization, Trajectory, sweep

if TYPE_CHECKING:
    from xarray import Dataset

#: Seeds in one batch: what is recorded of them fits in memory.
BATCH = 125


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


def small_std(d1: int, d2: int, epsilon: float) -> float:
    """√ε/d, d the larger size: the square root of the paper's variance ε/poly(d)."""
    return math.sqrt(epsilon) / max(d1, d2)


def of_seeds(config: Any, run: Callable[..., Any], **others: float) -> "Dataset":
    """What `run(model, **others)` returns for the start of every seed, as a data set.

    `config` has `d1`, `d2`, `rank`, `seeds` and `seed`; `others` has `std`.
    """

    def of_seed(seed, std, **rest):
        sizes = config.d1, config.d2, config.rank
        return run(MatrixFactorization(*sizes, std=std, key=jr.key(seed)), **rest)

    seeds = np.arange(config.seed, config.seed + config.seeds)
    over = {"seed": seeds, **{name: [value] for name, value in others.items()}}
    data = sweep(of_seed, over, chunk=BATCH, retry=False, progress=False)
    return data.squeeze(list(others))


def fields_of(data: "Dataset", kind: Any) -> Any:
    """The named tuple that every setting of a sweep returned, of all of them at once."""
    return kind(*(data[name].to_numpy() for name in kind._fields))


def step_sizes(schedule: Callable[[Array], Array], dtype: Any) -> Callable[[Any], Any]:
    """The schedule for Optax, whose counter is an integer: strict promotion leaves it."""
    return lambda count: schedule(count.astype(dtype))


def imbalance(run: Trajectory) -> Float[Array, " times"]:
    """‖UᵀU − VᵀV‖_F along a run."""
    return jnp.linalg.norm(run.laws["matrix[1]"], axis=(1, 2))


def distance(run: Trajectory) -> Float[Array, " times"]:
    """‖UVᵀ − M*‖_F along a run: the objective is half its square."""
    return jnp.sqrt(2 * run.losses)


def keys(seeds: int, first_seed: int):
    """A random key for each of `seeds` seeds in a row."""
    return jax.vmap(jr.key)(jnp.arange(first_seed, first_seed + seeds))


def first_time(
    reached: Bool[np.ndarray, "seeds times"], times: Shaped[np.ndarray, " times"]
) -> Float[np.ndarray, " seeds"]:
    """The first of `times` at which each row of `reached` is true; inf if at none."""
    first = times[reached.argmax(axis=1)].astype(float)
    return np.where(reached.any(axis=1), first, np.inf)
