"""Whether a flow's laws are restored by projection, and why."""

from collections.abc import Collection
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp

from .._jax._text import first_line
from .._jax._tracing import is_concrete_call
from .._laws import Law, Laws, known_laws, threshold, violations_at_random_weights
from .._models import factorization_objective
from .._problem._losses import Risk, SquaredLoss
from .._problem._problem import Problem
from .._rescaling import (
    Translations,
    commuting_laws,
    generating_laws,
    laws_of_entries,
    make_translations,
    names_of_some,
)
from ._float64 import widened
from ._task import Task


class ProjectionPlan(NamedTuple):
    """The laws to restore, none of them if there is to be no projection, and why.

    `translations`: those behind the model's linear laws, which are kept beside.
    """

    laws: tuple[Law, ...]
    why: str
    translations: Translations | None = None

    @property
    def note(self) -> str:
        """The same for `stats["projection"]`."""
        return f"{'on' if self.laws else 'off'}: {self.why}"


def choose_projection(
    task: Task,
    *,
    is_default_solver: bool,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> ProjectionPlan:
    """The laws that projection is to restore.

    `is_default_solver`: whether homoflow chose solver and step size control; then it
    projects unless told otherwise. Raises `ValueError` where `project` is true and cannot
    be.
    """
    if task.project is False:
        return ProjectionPlan((), "not wanted")
    if task.project is None and not is_default_solver:
        return ProjectionPlan((), "your solver and step size control run unaltered")
    problem, all_laws = task.problem, task.recorder.laws
    # Whole matrices of wide layers take longer to restore than the flow itself.
    large = () if task.project else all_laws.large
    laws = generating_laws(law for law in all_laws if law.name not in large)
    reason = None
    if not task.dynamics.conserves_laws:
        reason = f"the {task.dynamics.name} does not conserve the laws"
    elif isinstance(adjoint, dfx.BacksolveAdjoint):
        reason = "BacksolveAdjoint solves the same equation backwards without it"
    elif not laws:
        reason = "no law is known that comes from rescalings of the weights"
        reason += f" ({all_laws.note})" if all_laws.note else _searched(all_laws)
    elif not _are_proven(problem, laws, task.has_user_laws):
        reason = _why_uncertified(problem, laws)
    if reason is None:
        try:
            translations = make_translations(_linear_laws(task), problem.weights)
        except ValueError as error:
            reason = str(error)
        else:
            plan = _plan(laws, translations, problem)
            return plan._replace(why=plan.why + _searched(all_laws) + _wide(large))
    if task.project:
        raise ValueError(f"`project=True` is not possible here: {reason}.")
    return ProjectionPlan((), reason)


def _searched(laws: Laws) -> str:
    """Which laws are left alone as no rescaling of whole units is known behind them."""
    searched = laws_of_entries(laws)
    if not searched:
        return ""
    return f" (not {names_of_some(searched)}, which a search found entry by entry)"


def _wide(large: Collection[str]) -> str:
    """Which laws are left alone as nobody has asked for them whole."""
    if not large:
        return ""
    names = ", ".join(sorted(large))
    return f" (not {names} beyond that, which are large: `project=True` restores them)"


def _linear_laws(task: Task) -> tuple[Law, ...]:
    """The linear laws that any Runge–Kutta method keeps, recorded or not."""
    recorded, problem = task.recorder.laws.items, task.problem
    objective = problem.objective
    if not task.has_user_laws or not isinstance(objective, Risk):
        return recorded
    known = known_laws(
        problem.model, None, objective.loss, objective=None, trainable=problem.mask
    )
    return (*recorded, *known.items)


def _plan(
    laws: tuple[Law, ...], translations: Translations | None, problem: Problem
) -> ProjectionPlan:
    """The laws whose rescalings keep the linear laws."""
    kept, left = laws, ""
    if translations is not None:
        kept = commuting_laws(laws, translations, problem.weights)
        others = ", ".join(law.name for law in laws if law not in kept)
        left = f" (not {others}, whose rescalings break linear laws)" if others else ""
    if not kept:
        return ProjectionPlan((), f"its rescalings break linear laws{left}")
    names = ", ".join(law.name for law in kept)
    return ProjectionPlan(kept, f"restores {names}{left}", translations)


def _are_proven(problem: Problem, laws: tuple[Law, ...], are_given: bool) -> bool:
    """Whether the model's structure shows the laws, for what is minimized and trained.

    That is so for homoflow's models wherever the weights act through predictions alone.
    """
    objective = problem.objective
    if not (isinstance(objective, Risk) or objective is factorization_objective):
        return False
    if not are_given:
        return True
    known: Laws = known_laws(
        problem.model, None, SquaredLoss(), objective=None, trainable=problem.mask
    )
    return all(law in known.items for law in laws)


def _why_uncertified(problem: Problem, laws: tuple[Law, ...]) -> str | None:
    """Why laws are not certain for this objective; `None` if a certificate shows them."""
    trained: set[Any] = {
        path for path, _ in jax.tree_util.tree_leaves_with_path(problem.weights)
    }
    if not all(law.paths() <= trained for law in laws):
        return "some of the laws involve arrays that are not trained"
    if not is_concrete_call(problem):
        return (
            "inside of jit, vmap and grad only laws of homoflow's own models and losses "
            "are certain"
        )
    with jax.enable_x64(True):
        wide = widened(problem)
        try:
            violations = violations_at_random_weights(
                laws, wide.objective, wide.model, wide.data, wide.mask
            )
        except (TypeError, ValueError) as error:  # strict promotion raises either
            return f"the laws cannot be certified in float64 ({first_line(error)})"
        broken = [
            law.name
            for law, size in zip(laws, violations.tolist(), strict=True)
            if not size <= threshold(jnp.dtype(jnp.float64))
        ]
    if broken:
        return f"the objective breaks {', '.join(broken)}"
    return None
