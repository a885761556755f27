"""Whether a flow with kinks follows them exactly when nobody said how."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import diffrax as dfx
import jax.numpy as jnp

from .._jax._tracing import is_concrete
from .._kinks import Filippov
from .._kinks.averaging._options import Averaged
from .._problem._problem import Problem
from .._results._reason import REQUESTED, Reason
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._diffrax_options import kinks_of
from ._exact import exact_pairs, obstacle

#: The exact flow's cost is set by its events, hardly by the tolerance: at looser ones
#: averaging is cheaper.
LOOSEST_RTOL = 1e-5
#: Each pair's events cost gradients over all samples: beyond this many the time of a run
#: is counted in minutes.
MOST_PAIRS = 20_000
NOT_EXACT = "not the exact flow"

AnySolver = dfx.AbstractSolver | Filippov | Averaged | None


class Choice(NamedTuple):
    """Whether to follow kinks exactly, and why, for `stats`."""

    is_exact: bool
    why: Reason | None


def choose_between(
    problem: Problem, solver: AnySolver, rtol: Any, for_diffrax: Mapping[str, Any]
) -> Choice:
    """The exact flow, or Diffrax, from static facts and a concrete `rtol`.

    `for_diffrax` holds the options that only Diffrax's solvers have, `None` where not
    given.
    """
    given = [name for name, value in for_diffrax.items() if value is not None]
    if isinstance(solver, Filippov):
        if given:
            raise ValueError(
                f"`{given[0]}` is for Diffrax's solvers: `homoflow.Filippov` takes "
                "`rtol` and `max_steps` only."
            )
        return Choice(True, REQUESTED)
    if solver is not None or not kinks_of(problem):
        return Choice(False, None)
    if given:
        return _not_exact("diffrax_option", f"`{given[0]}` is for Diffrax's solvers")
    if not is_concrete(rtol):
        return _not_exact("unknown_rtol", "rtol is not known before the run")
    if rtol is None or jnp.ndim(rtol) != 0 or not 0 < float(rtol) <= LOOSEST_RTOL:
        return _not_exact("loose_rtol", f"it is considered at rtol ≤ {LOOSEST_RTOL:g}")
    reason = obstacle(problem)
    if reason is not None:
        return _not_exact("obstacle", reason)
    pairs = exact_pairs(problem)
    if pairs > MOST_PAIRS:
        return _not_exact(
            "many_pairs",
            f"{pairs:,} pairs of a sample and a kink are more than {MOST_PAIRS:,}",
        )
    text = (
        f"rtol ≤ {LOOSEST_RTOL:g} and {pairs:,} pairs of a sample and a kink: each is "
        "followed"
    )
    return Choice(True, Reason("nonsmooth_exact", text))


def _not_exact(code: str, text: str) -> Choice:
    return Choice(False, Reason(code, f"{NOT_EXACT}: {text}"))


def gave_up(trajectory: Trajectory) -> bool:
    """Whether an exact flow that nobody asked for met kinks that it cannot follow.

    Inside jit and vmap that is not known: there the result says it.
    """
    given_up = (
        RESULTS.kink_slots_exceeded,
        RESULTS.kink_mode_unsettled,
        RESULTS.stuck_on_kinks,
    )
    return is_concrete(trajectory.result) and any(
        trajectory.result == result for result in given_up
    )


def after_giving_up(trajectory: Trajectory) -> Choice:
    """To average, and where the exact flow came to its end."""
    reached = float(trajectory.stats["time_reached"])
    reason = str(RESULTS[trajectory.result]).split(". ")[0].split(":")[0]
    return _not_exact("gave_up", f"at t = {reached:.4g}, {reason}")
