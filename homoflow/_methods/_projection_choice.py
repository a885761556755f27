"""Whether a flow's laws are restored by projection, and why."""

from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp

from .._jax._text import first_line
from .._jax._tracing import is_concrete_call
from .._laws import Law, known_laws, threshold, violations_at_random_weights
from .._models import factorization_objective
from .._problem._losses import Risk, SquaredLoss
from .._problem._problem import Problem
from .._rescaling import generating_laws
from ._float64 import widened


class Kept(NamedTuple):
    """The laws to restore, none of them if there is to be no projection, and why."""

    laws: tuple[Law, ...]
    why: str

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        return (("projection", f"{'on' if self.laws else 'off'}: {self.why}"),)


def kept_laws(
    problem: Problem,
    project: bool | None,
    *,
    is_ours: bool,
    are_given: bool = False,
    adjoint: Any = None,
    weight_decay: Any = None,
) -> Kept:
    """The laws that projection is to restore.

    `is_ours`: whether homoflow chose the solver, and projects unless told otherwise;
    `are_given`: whether the laws are a user's, who may have found them for another loss.
    Raises `ValueError` where `project` is true and cannot be.
    """
    if project is False:
        return Kept((), "not wanted")
    if project is None and not is_ours:
        return Kept((), "your solver and step size control run unaltered")
    laws = generating_laws(problem.laws)
    reason = None
    if weight_decay is not None:
        reason = "weight decay changes the laws"
    elif isinstance(adjoint, dfx.BacksolveAdjoint):
        reason = "BacksolveAdjoint solves the same equation backwards without it"
    elif not laws:
        reason = "no law is known that comes from rescalings of the weights"
        reason += f" ({problem.laws.note})" if problem.laws.note else ""
    elif not _are_proven(problem, laws, are_given):
        reason = _why_uncertified(problem, laws)
    if reason is None:
        return Kept(laws, f"restores {', '.join(law.name for law in laws)}")
    if project:
        raise ValueError(f"`project=True` is not possible here: {reason}.")
    return Kept((), reason)


def _are_proven(problem: Problem, laws: tuple[Law, ...], are_given: bool) -> bool:
    """Whether the model's structure shows the laws, for what is minimized and trained.

    That is so for homoflow's models wherever the weights act through predictions alone.
    """
    objective, model = problem.objective, problem.model
    if not (isinstance(objective, Risk) or objective is factorization_objective):
        return False
    if not are_given:
        return True
    known = known_laws(
        model, None, SquaredLoss(), objective=None, trainable=problem.mask
    )
    return all(law in known.items for law in laws)


def _why_uncertified(problem: Problem, laws: tuple[Law, ...]) -> str | None:
    """Why laws are not certain for this objective; `None` if a certificate shows them."""
    trained = {path for path, _ in jax.tree_util.tree_leaves_with_path(problem.weights)}
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
            reason = first_line(error)
            return f"the laws cannot be certified in float64 ({reason})"
        broken = [
            law.name
            for law, size in zip(laws, violations.tolist(), strict=True)
            if not size <= threshold(jnp.dtype(jnp.float64))
        ]
    if broken:
        return f"the objective breaks {', '.join(broken)}"
    return None
