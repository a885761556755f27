"""How the parameters of a function can be rescaled without changing its outputs.

The function's jaxpr is read once, from inputs to outputs. Each operation demands linear
equations between the log-scales of its operands and tells the scale of its result; the
outputs must not scale. What the equations leave free are the symmetries, exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.core
from jax.extend.core import ClosedJaxpr

from ..._jaxpr import inner_jaxprs, walk
from ._linear_equations import Equations
from ._log_scale import TooLarge
from ._tracked_array import Leaf, Tracked, constant, parameter

Rule = Callable[["Walk", Any, list[Tracked]], list[Tracked]]


class Walk:
    """One pass over a jaxpr.

    `ignores_small_constants` reads x + ε as x, for laws that hold up to ε only.
    `met_small_constants` tells whether there were any.
    """

    def __init__(
        self, rules: dict[str, Rule], *, ignores_small_constants: bool = False
    ):
        self.rules = rules
        self.equations = Equations()
        self.ignores_small_constants = ignores_small_constants
        self.met_small_constants = False
        #: Names of operations that no rule covers, and that parameters enter.
        self.opaque: set[str] = set()

    def run(self, closed: ClosedJaxpr, values: Sequence[Tracked]) -> list[Tracked]:
        """The outputs of a function, given its inputs."""
        return walk(
            closed,
            list(values),
            lambda eqn, incoming, site: self.apply(eqn, incoming),
            _as_tracked,
        )

    def apply(self, eqn, incoming: list[Tracked]) -> list[Tracked]:
        """The results of one operation."""
        rule = self.rules.get(eqn.primitive.name, _opaque)
        if rule is _opaque and (body := _only_body(eqn)) is not None:
            return self.run(body, incoming)
        try:
            results = rule(self, eqn, incoming)
        except TooLarge:
            results = _opaque(self, eqn, incoming)
        if all(v.known is not None for v in incoming):
            _note_value(eqn, incoming, results)
        return results

    def scale(self, value: Tracked):
        """The scale of a value, which now has a form."""
        return value.settled(self.equations)

    def fix(self, value: Tracked) -> None:
        """Demand that a value does not scale."""
        if not value.is_wild:
            self.equations.vanish(self.scale(value), value.shape)


def symmetries(
    closed: ClosedJaxpr,
    leaves: Sequence[Leaf],
    rules: dict[str, Rule],
    *,
    ignores_small_constants: bool = False,
) -> Walk:
    """Walk through `closed`, whose first inputs are `leaves` and whose others are data.

    Afterwards `leaf.scale` in terms of the walk's free unknowns is every symmetry.
    """
    this = Walk(rules, ignores_small_constants=ignores_small_constants)
    data = [Tracked(tuple(v.aval.shape)) for v in closed.jaxpr.invars[len(leaves) :]]
    outputs = this.run(closed, [*map(parameter, leaves), *data])
    for output in outputs:
        this.fix(output)
    return this


def _opaque(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    """An operation of which nothing is known: unscaled inputs give unscaled outputs."""
    if any(v.undecided() or v.scale for v in incoming):
        walk.opaque.add(eqn.primitive.name)
    for value in incoming:
        walk.fix(value)
    return [Tracked(tuple(v.aval.shape)) for v in eqn.outvars]


def _only_body(eqn) -> ClosedJaxpr | None:
    """The body of a call that is no more than its body (jit, custom_jvp, remat, …)."""
    bodies = list(inner_jaxprs(eqn))
    if len(bodies) != 1:
        return None
    jaxpr = bodies[0].jaxpr
    matches = len(jaxpr.invars) == len(eqn.invars)
    return bodies[0] if matches and len(jaxpr.outvars) == len(eqn.outvars) else None


def _note_value(eqn, incoming: list[Tracked], results: list[Tracked]) -> None:
    if eqn.primitive.multiple_results or len(results) != 1:
        return
    if results[0].known is None:
        thunks = [v.known for v in incoming]
        params = eqn.params

        def evaluate():
            arrays = [thunk() for thunk in thunks if thunk is not None]
            return eqn.primitive.bind(*arrays, **params)

        results[0].known = evaluate


def _as_tracked(value: Any) -> Tracked:
    if isinstance(value, jax.core.Tracer):
        return Tracked(tuple(value.shape))
    return constant(value)
