"""An explicit solver that stiffness holds up gives way to one that it does not."""

from collections.abc import Callable

import equinox as eqx

from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._diffrax_options import MOST_EXPLICIT_STEPS, Method

Choose = Callable[[float | None], Method]
Run = Callable[[Method, int], Trajectory]


def run_until_held_up(
    choose: Choose, run: Run, max_steps: int, may_change: bool
) -> Trajectory:
    """`run` by the method that `choose` takes first, or else by the one that it takes
    when told the time to which `MOST_EXPLICIT_STEPS` of that came.

    The second begins at the start again: what the first did is lost, and counted. Whether
    there is a second is decided by numbers: only outside of jit and vmap there
    `may_change` something.
    """
    method = choose(None)
    may_change &= method.may_be_held_up and max_steps > MOST_EXPLICIT_STEPS
    if not may_change:
        return run(method, max_steps)
    first = run(method, MOST_EXPLICIT_STEPS)
    if first.result != RESULTS.max_steps_reached:
        return first
    then = run(choose(float(first.stats["time_reached"])), max_steps)
    count = "gradient_evaluations"
    stats = then.stats.with_numbers(**{count: then.stats[count] + first.stats[count]})
    return eqx.tree_at(lambda t: t.stats, then, stats)
