"""`flow` with `t1=inf`: what it takes, and by which method."""

import dataclasses
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from .._jax._progress import Progress
from .._jax._tracing import is_concrete, is_concrete_call
from .._kinks import Filippov
from .._kinks.averaging._options import Averaged
from .._observe._time_grid import checked_span
from .._problem._checks import as_scalar
from .._problem._problem import Problem
from .._results._trajectory import Trajectory
from .._solvers import Rodas5P
from ._diffrax_options import Method, choose_method, kinks_of
from ._projection_choice import kept_laws
from ._sample_reduction import compressed
from .stationary import Segment, flow_to_rest

#: Up to so many weights a step with a dense Hessian costs little, and plateaus and slow
#: directions, on which flows to their end spend their time, are stiff.
_DENSE_WEIGHTS = 500
_DENSE_RTOL = 1e-8
_WHY_DENSE = (
    "smooth problem of few weights, to its end: steps with a dense Hessian pass plateaus "
    "and follow slow directions"
)


def is_endless(t1: Any) -> bool:
    """Whether `t1` is known to be inf."""
    return is_concrete(t1) and jnp.ndim(t1) == 0 and bool(np.isposinf(np.asarray(t1)))


def endless_flow(
    problem: Problem,
    *,
    ts: Any,
    rtol: Any,
    atol: Any,
    solver: dfx.AbstractSolver | Filippov | Averaged | None,
    stepsize_controller: dfx.AbstractStepSizeController | None,
    dt0: Any,
    weight_decay: Any,
    project: bool | None,
    laws_are_given: bool,
    save_models: bool,
    adjoint: dfx.AbstractAdjoint | None,
    estimate_error: bool | None,
    max_steps: int,
    progress: Progress,
) -> Trajectory:
    """The flow to a stationary point; `ValueError` for what cannot be followed there."""
    _refuse_what_is_finite_only(problem, solver, adjoint, estimate_error, progress)
    times = None
    if ts is not None:
        ts = np.asarray(ts if hasattr(ts, "__array__") else list(ts), float)
        last = float(ts.ravel()[-1]) if ts.size else np.nan
        if not (np.isfinite(last) and last > 0):
            raise ValueError(
                "With `t1=inf`, `ts` must be finite times that end after 0: the flow "
                "passes them on its way."
            )
        times = np.asarray(checked_span(last, ts, problem.dtype).ts)
    problem, told = compressed(problem)
    method = _method(problem, rtol, atol, solver, stepsize_controller, dt0, max_steps)
    kept = kept_laws(
        problem,
        project,
        is_ours=solver is None and stepsize_controller is None,
        are_given=laws_are_given,
        weight_decay=weight_decay,
    )
    method = method.told((*told, *kept.facts)).keeping(kept.laws)
    return flow_to_rest(
        problem,
        method,
        weight_decay=as_scalar(weight_decay, problem.dtype),
        kept=kept.laws,
        ts=times,
        max_steps=max_steps,
        save_models=save_models,
        told=_say if progress else lambda segment: None,
    )


def _refuse_what_is_finite_only(
    problem: Problem, solver: Any, adjoint: Any, estimate_error: Any, progress: Any
) -> None:
    if not is_concrete_call(problem):
        raise ValueError(
            "`t1=inf` decides between segments of the flow whether it is at its end, in "
            "Python: it cannot be inside of jit, vmap or grad. Loop over seeds in Python "
            "(nothing is compiled again), or give a finite `t1`."
        )
    if problem.dtype != jnp.float64:
        raise ValueError(
            f"The weights are {problem.dtype.name}: what a stationary point is can be "
            "decided in float64 only. Run `jax.config.update('jax_enable_x64', True)` "
            "before anything else and make the weights float64, or give a finite `t1`."
        )
    kinks = kinks_of(problem)
    if kinks:
        raise ValueError(
            f"The gradient jumps at {', '.join(kinks)}: a flow with kinks comes to rest "
            "on them, where there is no Hessian to tell minima from saddles. Give a "
            "finite `t1`."
        )
    if isinstance(solver, Filippov | Averaged):
        raise ValueError(
            f"`homoflow.{type(solver).__name__}` is for models with kinks; this one has "
            "none. Leave `solver` out."
        )
    for name, given in (("adjoint", adjoint), ("estimate_error", estimate_error)):
        if given:
            raise ValueError(
                f"`{name}` is for flows of finite length: with `t1=inf` leave it out."
            )
    if isinstance(progress, dfx.AbstractProgressMeter):
        raise ValueError(
            "A flow with `t1=inf` has no end to measure progress by: `progress=True` "
            "prints how far it is."
        )


def _method(
    problem: Problem,
    rtol: Any,
    atol: Any,
    solver: Any,
    controller: dfx.AbstractStepSizeController | None,
    dt0: Any,
    max_steps: int,
) -> Method:
    weights = sum(leaf.size for leaf in jax.tree.leaves(problem.weights))
    is_small = weights <= _DENSE_WEIGHTS
    chosen = solver is None and controller is None and is_small
    if chosen:
        solver = Rodas5P()
        rtol = _DENSE_RTOL if rtol is None else rtol
    method = choose_method(
        problem,
        rtol=rtol,
        atol=atol,
        solver=solver,
        controller=controller,
        dt0=dt0,
        max_steps=max_steps,
    )
    if not chosen:
        return method
    facts = {**dict(method.facts), "why": _WHY_DENSE}
    return dataclasses.replace(method, facts=tuple(facts.items()))


def _say(segment: Segment) -> None:
    flow = segment.trajectory
    known = np.flatnonzero(np.isfinite(np.asarray(flow.losses)))
    if len(known):
        loss, slope = flow.losses[known[-1]], flow.grad_norms[known[-1]]
        print(f"t = {segment.end:.4g}: loss {loss:.6g}, ‖∇L‖ {slope:.3g}", flush=True)
