"""Interpreting a jaxpr: its equations in order, with values of any kind."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from ._primitives import CUSTOM_RULES

V = TypeVar("V")


class Site(NamedTuple):
    """Where an equation stands, and what the rest of its jaxpr does with it.

    - `is_differentiated`: for each result, whether derivatives can flow from it to an
        output.
    - `is_only_use`: for each operand, whether nothing else uses it.
    """

    jaxpr: Jaxpr
    is_differentiated: list[bool]
    is_only_use: list[bool]


def interpret(
    closed: ClosedJaxpr,
    values: list[V],
    visit: Callable[[Any, list[V], Site], list[V]],
    lift_constant: Callable[[Any], V],
    is_differentiated: list[bool] | None = None,
) -> list[V]:
    """The values of the outputs, from those of the inputs.

    `visit(equation, operands, site)` returns the values of an equation's results;
    `lift_constant(number)` is the value of a literal or of a constant of the jaxpr.
    `is_differentiated` says of which outputs derivatives are taken; of all by default.
    """
    jaxpr = closed.jaxpr
    if is_differentiated is None:
        is_differentiated = [True] * len(jaxpr.outvars)
    differentiated = differentiated_variables(jaxpr, is_differentiated)
    uses = Counter(
        atom
        for atoms in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
        for atom in atoms
        if not isinstance(atom, Literal)
    )
    environment: dict[Any, V] = dict(zip(jaxpr.invars, values, strict=True))
    constants = map(lift_constant, closed.consts)
    environment.update(zip(jaxpr.constvars, constants, strict=True))

    def read(atom) -> V:
        if isinstance(atom, Literal):
            return lift_constant(_typed(atom))
        return environment[atom]

    for eqn in jaxpr.eqns:
        site = Site(
            jaxpr,
            [is_in(v, differentiated) for v in eqn.outvars],
            [isinstance(v, Literal) or uses[v] == 1 for v in eqn.invars],
        )
        results = visit(eqn, [read(v) for v in eqn.invars], site)
        environment.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _typed(literal: Literal) -> Any:
    """A literal's number in its own dtype: Python's numbers have none."""
    dtype = getattr(literal.aval, "dtype", None)
    is_number = isinstance(literal.val, bool | int | float | complex)
    return np.asarray(literal.val, dtype) if is_number and dtype else literal.val


def inner_jaxprs(eqn) -> Iterator[ClosedJaxpr]:
    """The jaxprs that an equation holds: bodies, branches, conditions."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item
            elif isinstance(item, Jaxpr) and not item.constvars:
                yield ClosedJaxpr(item, ())


def evaluate_equation(eqn, arrays: list[Any]) -> list[Any]:
    """The results of an equation as it stands."""
    body = next(inner_jaxprs(eqn), None)
    if body is None:
        result = eqn.primitive.bind(*arrays, **eqn.params)
        return result if eqn.primitive.multiple_results else [result]
    # How functions are bound with their derivative rules differs between versions of
    # JAX; a jaxpr of this one equation leaves that to it.
    distinct = {
        v: a
        for v, a in zip(eqn.invars, arrays, strict=True)
        if not isinstance(v, Literal)
    }
    names = body.jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    alone = Jaxpr((), list(distinct), eqn.outvars, [eqn], debug_info=names)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*distinct.values())


def function_name(eqn) -> str:
    """The name of the Python function that a call primitive stands for, if any."""
    if eqn.primitive.name in CUSTOM_RULES:
        body = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
        return "" if body is None else body.jaxpr.debug_info.func_name
    return eqn.params.get("name", "")


def is_of_jax_nn(eqn) -> bool:
    """Whether a call stands for a function of `jax.nn`, rather than for a namesake."""
    return is_defined_in(eqn, "jax/_src/nn/functions.py")


def is_defined_in(eqn, path: str) -> bool:
    """Whether the function that a call stands for is written in such a file."""
    body = next(inner_jaxprs(eqn), None)
    if body is None:
        return False
    return path in str(body.jaxpr.debug_info.func_src_info).replace("\\", "/")


def differentiated_variables(jaxpr: Jaxpr, is_differentiated: list[bool]) -> set[Var]:
    """Variables from which derivatives can flow to one of the marked outputs."""
    found = {
        v
        for v, d in zip(jaxpr.outvars, is_differentiated, strict=True)
        if d and not isinstance(v, Literal)
    }
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name != "stop_gradient" and any(
            is_in(v, found) for v in eqn.outvars
        ):
            found |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return found


def is_in(atom, variables: set[Var]) -> bool:
    return not isinstance(atom, Literal) and atom in variables
