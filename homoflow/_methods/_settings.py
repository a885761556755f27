"""A Diffrax solver with its tolerances and its control of the step size."""

import dataclasses
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._jax._tracing import is_concrete
from .._laws import Law
from .._problem._checks import as_scalar, check_tolerance, checked_step
from .._rescaling import Translations
from .._solvers import as_flow_solver
from ._defaults import AVERAGED_RTOL, COARSER_RTOL, COARSER_STEP, SMOOTH_RTOL


class Settings(eqx.Module):
    """How Diffrax integrates: every number that it needs.

    - `controller`: the user's, or `None` for a PID controller at `rtol`, `atol`.
    - `has_atol`: whether `atol` was given; otherwise it is in proportion to the weights.
        Both are `None` with a controller that has no use for them.
    - `max_forced_steps`: if not `None`, steps are at least (t1 − t0)/`max_forced_steps`,
        so that chattering on kinks is averaged over instead of resolved without end.
    - `restored_laws`: laws that are restored by projection, which leaves `translations`
        of the weights alone; `restores_steps`: after steps too, not only in what is
        recorded.
    - `gives_up`: whether the solve ends once it has no prospect of an end.
    """

    solver: dfx.AbstractSolver
    controller: dfx.AbstractStepSizeController | None
    rtol: Array | None
    atol: Array | None
    has_atol: Array | None
    dt0: Array | None
    max_forced_steps: Array | None
    restored_laws: tuple[Law, ...] = ()
    translations: Translations | None = None
    restores_steps: bool = True
    gives_up: bool = False

    @property
    def is_averaging(self) -> bool:
        """Whether steps are forced over kinks."""
        return self.max_forced_steps is not None

    def coarser(self) -> "Settings":
        """The same at a coarser tolerance or step, to estimate an error with."""
        if isinstance(self.controller, dfx.ConstantStepSize):
            assert self.dt0 is not None
            return dataclasses.replace(self, dt0=_times(self.dt0, COARSER_STEP))
        if self.controller is not None:
            raise ValueError(
                "`estimate_error` compares two tolerances, which are your "
                "`stepsize_controller`'s to choose: run the flow twice and "
                "`homoflow.compare` the two."
            )
        assert self.rtol is not None
        atol = None if self.atol is None else _times(self.atol, COARSER_RTOL)
        floor = self.max_forced_steps
        return dataclasses.replace(
            self,
            rtol=_times(self.rtol, COARSER_RTOL),
            atol=atol,
            max_forced_steps=None if floor is None else _times(floor, 1 / COARSER_RTOL),
        )


def _times(number: Array, factor: float) -> Array:
    """Their product, by NumPy if it is known: nothing is compiled for it."""
    if not is_concrete(number):
        return number * factor
    known = np.asarray(number)
    return jax.device_put(known * known.dtype.type(factor))


def make_settings(
    dtype: jnp.dtype,
    solver: dfx.AbstractSolver,
    *,
    rtol: Any,
    atol: Any,
    controller: dfx.AbstractStepSizeController | None,
    dt0: Any,
    has_kinks: bool,
    max_forced_steps: float | None = None,
) -> Settings:
    """The settings that a user's arguments describe, with defaults for the rest.

    Everything is decided from static facts (dtypes, what was given): a new value of a
    tolerance never compiles anything again.
    """
    if dtype.name not in SMOOTH_RTOL:
        raise ValueError(
            f"The weights are {dtype.name}: the flow needs float32 or float64. Half "
            "precision cannot carry an adaptive solver's error estimates."
        )
    if controller is not None and (rtol is not None or atol is not None):
        raise ValueError(
            "`rtol` and `atol` belong to homoflow's own step size controller: give them "
            "to your `stepsize_controller` instead."
        )
    _refuse_second_tolerances(solver, controller)
    for name, value in (("rtol", rtol), ("atol", atol)):
        check_tolerance(name, value, dtype)
    dt0 = checked_step(dt0, dtype)
    if controller is None and not isinstance(solver, dfx.AbstractAdaptiveSolver):
        _check_constant_steps(solver, rtol, atol, dt0)
        controller = dfx.ConstantStepSize()
    if controller is None and rtol is None:
        rtol = AVERAGED_RTOL if has_kinks else _smooth_rtol(solver, dtype)
    return Settings(
        solver,
        controller,
        as_scalar(rtol, dtype),
        *_atol_and_whether(atol, dtype, is_used=controller is None),
        dt0,
        as_scalar(max_forced_steps, dtype),
    )


def _atol_and_whether(
    atol: Any, dtype: jnp.dtype, *, is_used: bool
) -> tuple[Array | None, Array | None]:
    """`atol`, and whether it was given: as arrays, so that one program does for both."""
    if not is_used:
        return None, None
    given = 0.0 if atol is None else atol
    return as_scalar(given, dtype), jax.device_put(np.asarray(atol is not None))


def _smooth_rtol(solver: dfx.AbstractSolver, dtype: jnp.dtype) -> float:
    own = as_flow_solver(solver).default_rtol(dtype.name)
    return SMOOTH_RTOL[dtype.name] if own is None else own


def _check_constant_steps(
    solver: dfx.AbstractSolver, rtol: Any, atol: Any, dt0: Array | None
) -> None:
    name = type(solver).__name__
    if dt0 is None:
        raise ValueError(
            f"{name} has no error estimate to choose its steps by: pass `dt0`, the "
            "constant step size."
        )
    if rtol is not None or atol is not None:
        raise ValueError(
            f"{name} takes constant steps: `rtol` and `atol` have no meaning for it."
        )


def _refuse_second_tolerances(
    solver: dfx.AbstractSolver, controller: dfx.AbstractStepSizeController | None
) -> None:
    """`ValueError` where tolerances would be given in two places."""
    flow_solver = as_flow_solver(solver)
    if not flow_solver.scales_errors:
        return
    name = type(solver).__name__
    if controller is not None:
        raise ValueError(
            f"{name} estimates its errors in units of the tolerance, for its own step "
            "size controller: leave `stepsize_controller` out and give `rtol`."
        )
    if flow_solver.has_tolerances:
        raise ValueError(
            f"Give `rtol` and `atol` to `flow`, not to {name}: its default `atol` depends "
            "on the weights."
        )
