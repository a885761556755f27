"""How the parameters of a function can be rescaled without changing its outputs.

The function's jaxpr is read once, from inputs to outputs. Each operation demands linear
equations between the log-scales of its operands and tells the scale of its result; the
outputs must not scale. What the equations leave free are the symmetries, exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._equations import Equations
from ._scale import TooLarge
from ._tracked import Leaf, Tracked, constant, parameter

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

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Tracked]):
        """The outputs, given the inputs."""
        known: dict[Any, Tracked] = dict(zip(jaxpr.invars, values, strict=True))
        known.update(zip(jaxpr.constvars, map(_as_tracked, consts), strict=True))

        def read(atom) -> Tracked:
            return constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self.apply(eqn, [read(v) for v in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def run_closed(self, closed: ClosedJaxpr | Jaxpr, values: Sequence[Tracked]):
        """The outputs of a function that an operation carries."""
        if isinstance(closed, ClosedJaxpr):
            return self.run(closed.jaxpr, closed.consts, values)
        return self.run(closed, (), values)

    def apply(self, eqn, incoming: list[Tracked]) -> list[Tracked]:
        """The results of one operation."""
        rule = self.rules.get(eqn.primitive.name, _opaque)
        if rule is _opaque and (body := _only_body(eqn)) is not None:
            return self.run_closed(body, incoming)
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
    walk = Walk(rules, ignores_small_constants=ignores_small_constants)
    data = [Tracked(tuple(v.aval.shape)) for v in closed.jaxpr.invars[len(leaves) :]]
    outputs = walk.run_closed(closed, [*map(parameter, leaves), *data])
    for output in outputs:
        walk.fix(output)
    return walk


def _opaque(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    """An operation of which nothing is known: unscaled inputs give unscaled outputs."""
    if any(v.undecided() or v.scale for v in incoming):
        walk.opaque.add(eqn.primitive.name)
    for value in incoming:
        walk.fix(value)
    return [Tracked(tuple(v.aval.shape)) for v in eqn.outvars]


def _only_body(eqn) -> ClosedJaxpr | Jaxpr | None:
    """The body of a call that is no more than its body (jit, custom_jvp, remat, …)."""
    bodies = [v for v in eqn.params.values() if isinstance(v, ClosedJaxpr | Jaxpr)]
    if len(bodies) != 1:
        return None
    (body,) = bodies
    jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    matches = len(jaxpr.invars) == len(eqn.invars)
    return body if matches and len(jaxpr.outvars) == len(eqn.outvars) else None


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
