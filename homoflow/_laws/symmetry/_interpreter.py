"""How the parameters of a function can be rescaled without changing its outputs.

The function's jaxpr is read once, from inputs to outputs. Each operation has a rule: it
adds linear equations between the log-scales of the operands, and returns the log-scale of
the result. The outputs must not scale. The solutions of all equations are exactly the
symmetries that the structure shows.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.core
from jax.extend.core import ClosedJaxpr

from ..._jaxpr import inner_jaxprs, interpret
from ._constant import Constant
from ._linear_equations import LinearEquations
from ._log_scale import LogScale, TooLarge
from ._tracked_array import Leaf, TrackedArray, track_constant, track_parameter

Arrays = list[TrackedArray]
#: The results of an equation, from the interpreter, the equation and its operands.
Rule = Callable[["ScalingInterpreter", Any, Arrays], Arrays]


class ScalingInterpreter:
    """One pass over a jaxpr, by a table of rules.

    - `equations`: collected from the operations met so far.
    - `ignores_small_constants`: reads x + ε as x, for laws that hold up to ε only.
    - `met_small_constants`: whether there were any.
    - `opaque`: names of operations that no rule covers, and that parameters enter.
    """

    def __init__(
        self, rules: dict[str, Rule], *, ignores_small_constants: bool = False
    ):
        self.rules = rules
        self.equations = LinearEquations()
        self.ignores_small_constants = ignores_small_constants
        self.met_small_constants = False
        self.opaque: set[str] = set()

    def run(self, closed: ClosedJaxpr, values: Sequence[TrackedArray]) -> Arrays:
        """The outputs of a function, given its inputs."""
        return interpret(
            closed,
            list(values),
            lambda eqn, operands, site: self.apply(eqn, operands),
            _track_constant,
        )

    def apply(self, eqn, operands: Arrays) -> Arrays:
        """The results of one operation."""
        rule = self.rules.get(eqn.primitive.name, _apply_opaque)
        if rule is _apply_opaque and (body := _only_body(eqn)) is not None:
            return self.run(body, operands)
        try:
            results = rule(self, eqn, operands)
        except TooLarge:
            results = _apply_opaque(self, eqn, operands)
        if all(v.constant is not None for v in operands):
            _record_constant(eqn, operands, results)
        return results

    def scale(self, value: TrackedArray) -> LogScale:
        """The log-scale of a value; an untouched parameter gets its unknowns now."""
        return value.log_scale(self.equations)

    def scale_constant_along(
        self, value: TrackedArray, axes: Iterable[int]
    ) -> LogScale:
        """The log-scale of a value, which is required not to vary along `axes`."""
        return self.equations.require_constant_along(
            self.scale(value), axes, value.shape
        )

    def fix(self, value: TrackedArray) -> None:
        """Demand that a value does not scale."""
        if not value.has_any_scale:
            self.equations.require_zero(self.scale(value), value.shape)


def find_symmetries(
    closed: ClosedJaxpr,
    leaves: Sequence[Leaf],
    rules: dict[str, Rule],
    *,
    ignores_small_constants: bool = False,
) -> ScalingInterpreter:
    """Interpret `closed`, whose first inputs are `leaves` and whose others are data.

    Afterwards `leaf.scale`, in terms of the free unknowns of the interpreter's equations,
    is every symmetry.
    """
    interpreter = ScalingInterpreter(
        rules, ignores_small_constants=ignores_small_constants
    )
    data = closed.jaxpr.invars[len(leaves) :]
    outputs = interpreter.run(
        closed,
        [
            *map(track_parameter, leaves),
            *(TrackedArray(tuple(v.aval.shape)) for v in data),
        ],
    )
    for output in outputs:
        interpreter.fix(output)
    return interpreter


def _apply_opaque(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    """An operation of which nothing is known: unscaled inputs give unscaled outputs."""
    if any(v.is_undetermined or v.scale for v in operands):
        interpreter.opaque.add(eqn.primitive.name)
    for value in operands:
        interpreter.fix(value)
    return [TrackedArray(tuple(v.aval.shape)) for v in eqn.outvars]


def _only_body(eqn) -> ClosedJaxpr | None:
    """The body of a call that is no more than its body (jit, custom_jvp, remat, …)."""
    bodies = list(inner_jaxprs(eqn))
    if len(bodies) != 1:
        return None
    jaxpr = bodies[0].jaxpr
    matches = len(jaxpr.invars) == len(eqn.invars)
    return bodies[0] if matches and len(jaxpr.outvars) == len(eqn.outvars) else None


def _record_constant(eqn, operands: Arrays, results: Arrays) -> None:
    if eqn.primitive.multiple_results or len(results) != 1:
        return
    if results[0].constant is None:
        params = eqn.params
        results[0].constant = Constant(
            [v.constant for v in operands if v.constant is not None],
            lambda *arrays: eqn.primitive.bind(*arrays, **params),
        )


def _track_constant(value: Any) -> TrackedArray:
    if isinstance(value, jax.core.Tracer):
        return TrackedArray(tuple(value.shape))
    return track_constant(value)
