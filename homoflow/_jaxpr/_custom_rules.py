"""Functions with a user's own rule for derivatives, which may jump where they do not."""

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from ._interpreter import evaluate_equation, function_name, inner_jaxprs, is_defined_in
from ._primitives import CUSTOM_RULES, JUMPS

#: Files whose rules are those of their functions.
_TRUSTED = ("jax/_src/", "diffrax/", "equinox/", "lineax/", "optax/", "homoflow/_")


def jumps_of_custom_rule(eqn, operands) -> set[str]:
    """The name of a function whose own derivative rule has a jump; empty if it has none.

    The rule is traced like any function: a choice, a step or the sign of something in it
    is a jump. Where it cannot be traced it counts as one.
    """
    if eqn.primitive.name not in CUSTOM_RULES or not any(t.depends for t in operands):
        return set()
    if any(is_defined_in(eqn, path) for path in _TRUSTED):
        return set()
    name = function_name(eqn) or eqn.primitive.name
    try:
        rule = _trace_rule(eqn)
    except (TypeError, ValueError, NotImplementedError):
        return {name}
    return {name} if _has_jump(rule) else set()


def has_reverse_rule(eqn) -> bool:
    """Whether an equation holds a function that has a rule for reverse mode only."""
    if eqn.primitive.name == "custom_vjp_call":
        return True
    bodies = inner_jaxprs(eqn)
    return any(has_reverse_rule(e) for body in bodies for e in body.jaxpr.eqns)


def _trace_rule(eqn) -> ClosedJaxpr:
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    is_inexact = [jnp.issubdtype(s.dtype, jnp.inexact) for s in shapes]

    def derivative(*arrays):
        def function(*inexact):
            given = iter(inexact)
            merged = [
                next(given) if is_float else array
                for array, is_float in zip(arrays, is_inexact, strict=True)
            ]
            return evaluate_equation(eqn, merged)

        inexact = [a for a, f in zip(arrays, is_inexact, strict=True) if f]
        outputs, pull_back = jax.vjp(function, *inexact)
        return pull_back(jax.tree.map(jnp.ones_like, outputs))

    return jax.make_jaxpr(derivative)(*shapes)


def is_step(eqn) -> bool:
    """Whether numbers are made from truth values or integers, or integers from them."""
    if eqn.primitive.name != "convert_element_type":
        return False
    before, after = (v.aval.dtype for v in (eqn.invars[0], eqn.outvars[0]))
    return jnp.issubdtype(before, jnp.inexact) != jnp.issubdtype(after, jnp.inexact)


def _has_jump(closed: ClosedJaxpr) -> bool:
    for eqn in closed.jaxpr.eqns:
        name = eqn.primitive.name
        if name in JUMPS or name in ("cond", "select_n") or is_step(eqn):
            return True
        if any(_has_jump(inner) for inner in inner_jaxprs(eqn)):
            return True
    return False
