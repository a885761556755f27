"""The laws of a model that is not homoflow's, searched for once."""

import hashlib
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jax._structural_cache import cached_by_structure
from .._jax._text import first_line
from .._jax._tracing import is_concrete, is_concrete_call
from .._problem._data import sample_shape
from .._problem._losses import Risk, SquaredLoss
from .._problem._problem import Problem
from ._law import Laws
from .search._search import search

#: Nobody who has not asked waits for a search that takes longer than a second or two.
MAX_SEARCHED_WEIGHTS = 30_000
#: The models that were searched, by the names of their classes.
_searched: list[str] = []
_HOW = "pass `laws=homoflow.laws(model, x_example)`"


class _NotKnownError(Exception):
    """Inside of a trace nothing can be searched for."""


def default_laws(problem: Problem) -> Laws:
    """The laws of a problem's model, found by its structure and certified.

    They are remembered: a model with the same structure (everything but the values of
    weights and data) has the same laws. Inside of jit and vmap they are those that were
    found before.
    """
    name = type(problem.model).__name__
    if problem.num_weights > MAX_SEARCHED_WEIGHTS:
        return Laws(
            (),
            f"The laws of {name} were not searched for: it has more than "
            f"{MAX_SEARCHED_WEIGHTS:,} weights. To search all the same, {_HOW}.",
        )
    hidden = problem.frozen, problem.objective, _integers(_searched_data(problem))
    if not is_concrete(hidden):
        return _unknown(name)
    try:
        return _search_once(problem, jax.tree.map(_as_constant, hidden))
    except _NotKnownError:
        return _unknown(name)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        return Laws((), f"The laws of {name} were not found: {first_line(error)}.")


def num_searches() -> int:
    """How many searches were made: with each one a trace may know more laws."""
    return len(_searched)


def _unknown(name: str) -> Laws:
    return Laws(
        (),
        f"The laws of {name} cannot be searched for inside of jit, vmap or grad: run it "
        f"once outside, or {_HOW}.",
    )


def _searched_data(problem: Problem) -> PyTree:
    """What of the data a search sees: of samples their inputs."""
    return problem.data[0] if isinstance(problem.objective, Risk) else problem.data


def _key(problem: Problem, hidden: PyTree) -> PyTree:
    """What a search depends on: of samples their shape, not how many there are."""
    data = _searched_data(problem)
    if isinstance(problem.objective, Risk):
        data = sample_shape(data)
    return problem.weights, problem.frozen, problem.mask, data, hidden


@cached_by_structure(key=_key)
def _search_once(problem: Problem, hidden: PyTree) -> Laws:
    del hidden  # For the cache: these values may decide what is a law.
    if not is_concrete_call(problem):
        raise _NotKnownError
    _searched.append(type(problem.model).__name__)
    objective, loss = problem.objective, SquaredLoss()
    example = problem.data
    if isinstance(objective, Risk):
        loss, objective = objective.loss, None
        example = jax.tree.map(_example_of, problem.data[0])
    mask = problem.mask
    return search(problem.model, mask, example, loss, objective, batched=False)


def _example_of(samples: jax.Array) -> jax.Array:
    """One sample; of integers, whose range is drawn from, the largest of all."""
    if jnp.issubdtype(samples.dtype, jnp.inexact):
        return samples[0]
    return jnp.max(samples, axis=0)


def _integers(data: PyTree) -> PyTree:
    """What of the data a search depends on.

    By NumPy: inside of jit JAX's operations are traced, of known numbers too.
    """
    return [
        np.max(np.asarray(leaf)) if is_concrete(leaf) else leaf
        for leaf in jax.tree.leaves(data)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


class _Constant(NamedTuple):
    """An array as what it holds; a digest of it, so that nothing large is kept."""

    dtype: str
    shape: tuple[int, ...]
    digest: bytes


def _as_constant(leaf: Any) -> Any:
    if not eqx.is_array(leaf):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf)
    digest = hashlib.sha256(array.view(np.uint8).data).digest()
    return _Constant(str(array.dtype), array.shape, digest)
