"""Weights on the laws of a flow's start, in place of what integration made of them."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ..._laws import Law
from ..._problem._problem import Problem
from ..._rescaling import RescalingGroup, Translations

Restore = Callable[[np.ndarray], np.ndarray]


def make_restore(
    problem: Problem, laws: tuple[Law, ...], translations: Translations | None
) -> Restore:
    """A function that moves weights along their orbit until laws are what they were.

    They compute the same function before and after it: the loss does not change, and a
    stationary point remains one. Without laws it leaves them alone.
    """
    if not laws:
        return lambda flat: flat
    start = problem.weights

    def restore(flat: np.ndarray) -> np.ndarray:
        return np.asarray(_restored(laws, translations, start, jnp.asarray(flat)))

    return restore


@fast_compile_jit
@full_matmul_precision()
def _restored(
    laws: tuple[Law, ...],
    translations: Translations | None,
    start: PyTree,
    flat: Float[Array, " size"],
) -> Float[Array, " size"]:
    _, unravel = ravel_pytree(start)
    orbit = RescalingGroup(laws, start, translations=translations)
    return ravel_pytree(orbit.project(unravel(flat), orbit.values(start)).projected)[0]
