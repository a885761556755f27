"""What a method is asked to compute."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._dynamics._base import AbstractDynamics
from .._jax._arrays import all_finite
from .._jax._compilation import fast_compile_jit
from .._jax._progress import Progress
from .._jax._tracing import is_concrete, is_concrete_call
from .._observe._recorder import Recorder
from .._observe._time_grid import TimeGrid
from .._problem._problem import Problem


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem, the dynamics that move its weights, and what is to be recorded.

    - `problem`: what is solved: as it was `given`, or with fewer samples that have the
        same loss, which `sample_reduction` says.
    - `grid`: the times; `None` for a flow to a stationary point, which may have `ts`.
    - `rtol`: the tolerance asked for, if any.
    - `project`: whether laws are to be restored; `None`: where that is certain to help.
    - `is_trial`: whether the solve may be given up once it has no prospect of an end.
    - `has_user_laws`: whether a user gave the laws, perhaps those of another loss.
    """

    problem: Problem
    given: Problem
    dynamics: AbstractDynamics
    recorder: Recorder
    grid: TimeGrid | None
    ts: Float[np.ndarray, " times"] | None = None
    sample_reduction: str | None = None
    rtol: Any = None
    project: bool | None = None
    has_user_laws: bool = False
    save_models: bool = False
    estimate_error: bool | None = None
    max_steps: int = 100_000
    is_trial: bool = False
    progress: Progress = False

    @property
    def is_untraced(self) -> bool:
        """Whether it is outside of jit, vmap and grad, where numbers may decide."""
        return is_concrete_call((self.given, self.dynamics, self.grid, self.rtol))


def is_infinite(t1: Any) -> bool:
    """Whether `t1` is known to be inf: a flow to a stationary point."""
    return is_concrete(t1) and jnp.ndim(t1) == 0 and bool(np.isposinf(np.asarray(t1)))


@fast_compile_jit
def is_finite_at_start(problem: Problem) -> Bool[Array, ""]:
    """Whether the loss and its gradient are numbers at the weights."""
    return all_finite(jax.value_and_grad(problem.loss)(problem.weights))
